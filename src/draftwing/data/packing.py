"""Packing: several documents in one row of the batch, so that little of it is padding."""

from collections.abc import Sequence

import torch

from draftwing.data.chat_template import Example


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of document indices whose lengths sum to at most `capacity`: best-fit decreasing.

    Longest first, each document goes where least room is left behind it. A function of its arguments alone. Documents
    of a row, and rows by their first document, are in the order given.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room left in them
    rooms = 0  # bit r is set where some row has room r
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        assert 0 < length <= capacity
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(document)
        else:
            row, room = len(rows), capacity
            rows.append([document])
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return sorted(sorted(row) for row in rows)


class PackedExamples(Sequence[Example]):
    """Documents packed into rows of at most `capacity` tokens, with the number of each token's document."""

    def __init__(self, documents: Sequence[Example], lengths: Sequence[int], capacity: int) -> None:
        self._documents = documents
        self._rows = pack(lengths, capacity)
        self.lengths = [sum(lengths[document] for document in row) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return join([self._documents[document] for document in self._rows[index]])


def join(documents: Sequence[Example]) -> Example:
    """One row of several documents."""
    lengths = torch.tensor([len(document) for document in documents])
    return Example(
        torch.cat([document.input_ids for document in documents]),
        torch.cat([document.loss_mask for document in documents]),
        torch.arange(len(documents)).repeat_interleave(lengths),
        _join_stored([document.features for document in documents]),
        _join_stored([document.last_hidden for document in documents]),
    )


def _join_stored(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    stored = [part for part in parts if part is not None]
    return torch.cat(stored) if stored else None
