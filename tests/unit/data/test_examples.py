"""Packing: every document whole and once, rows that are full, the same rows for the same lengths."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from draftwing.data.chat_template import Example
from draftwing.data.examples import Collator, PackedExamples, as_one_row, lengths_of, pack


def document(first: int, length: int, supervised: bool = True) -> Example:
    return Example(torch.arange(first, first + length), torch.full((length,), supervised))


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_document_is_in_one_row_and_rows_hold_what_fits(lengths: list[int]) -> None:
    rows = pack(lengths, capacity=20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert all(total <= 20 for total in totals)
    # No two rows could be one: a half-empty row at most.
    assert sum(total <= 10 for total in totals) <= 1


def test_a_document_goes_where_least_room_is_left() -> None:
    # 9 and 7 open rows of 10; 3 fits behind 7 alone, 1 fills the first.
    assert pack([1, 3, 7, 9], capacity=10) == [[0, 3], [1, 2]]


def test_rows_and_their_documents_keep_the_order_given() -> None:
    rows = pack([5, 5, 5, 5, 5, 5], capacity=10)
    assert rows == sorted(rows)
    assert all(row == sorted(row) for row in rows)
    assert rows == pack([5, 5, 5, 5, 5, 5], capacity=10)


def test_packing_wastes_little() -> None:
    lengths = torch.randint(20, 800, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(lengths, capacity=1024)
    assert sum(lengths) / (1024 * len(rows)) > 0.99


def test_a_packed_row_tells_its_documents_apart() -> None:
    row = as_one_row([document(10, 2), document(20, 3, supervised=False)])
    assert row.input_ids.tolist() == [10, 11, 20, 21, 22]
    assert row.loss_mask.tolist() == [True, True, False, False, False]
    assert row.document_ids is not None
    assert row.document_ids.tolist() == [0, 0, 1, 1, 1]


def test_a_batch_of_packed_rows_is_padded_with_minus_one() -> None:
    packed = PackedExamples([document(10, 4), document(20, 3), document(30, 1)], capacity=4)
    assert lengths_of(packed) == [4, 4]
    batch = Collator(pad_token_id=7)([packed[0], as_one_row([document(40, 2)])])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13], [40, 41, 7, 7]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0], [0, 0, -1, -1]]
    assert batch["loss_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert batch["document_ids"].dtype == torch.int64
    assert batch["loss_mask"].dtype == torch.bool


def test_a_batch_without_packing_has_no_document_ids() -> None:
    assert set(Collator(0)([document(1, 3), document(5, 2)])) == {"input_ids", "loss_mask"}


def test_stored_features_are_packed_and_padded_beside_their_tokens() -> None:
    def with_features(length: int, value: float) -> Example:
        plain = document(1, length)
        values = torch.full((length, 2), value)
        return Example(plain.input_ids, plain.loss_mask, None, values, -values[:, :1])

    batch = Collator(0)(
        [as_one_row([with_features(2, 1.0), with_features(1, 2.0)]), as_one_row([with_features(2, 3.0)])]
    )
    assert batch["features"][..., 0].tolist() == [[1.0, 1.0, 2.0], [3.0, 3.0, 0.0]]
    assert batch["last_hidden"].shape == (2, 3, 1)
    assert batch["last_hidden"][0, 2, 0] == -2.0
