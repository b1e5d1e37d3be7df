"""Training a draft model for an existing target: what it reads, what it learns, and that it learns it."""

import pytest
import torch

from draftwing.config import TrainConfig, from_mapping
from draftwing.training.train_language_model import IGNORED, blocks, distillation_loss


class Vocabulary(dict[str, int]):
    """What `blocks` asks of a tokenizer when rows are token ids already."""

    eos_token_id = 5

    def get_vocab(self) -> dict[str, int]:
        return self


TOKENIZER = Vocabulary({"<|endoftext|>": 0} | {f"token {n}": n for n in range(1, 8)})
ROWS = [{"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, {"input_ids": [4, 6], "loss_mask": [1, 0]}]


def test_rows_of_ids_become_blocks() -> None:
    """One after the other, each closed by the end of text; what does not fill a block is left out."""
    (block,) = blocks(ROWS, TOKENIZER, length=6)
    assert block["input_ids"].tolist() == block["labels"].tolist() == [1, 2, 3, 0, 4, 6]


def test_what_the_target_did_not_say_is_read_but_not_learnt() -> None:
    (block,) = blocks(ROWS, TOKENIZER, length=6, is_masked=True)
    assert block["input_ids"].tolist() == [1, 2, 3, 0, 4, 6]
    assert block["labels"].tolist() == [IGNORED, 2, 3, IGNORED, 4, IGNORED]


def test_a_blocks_first_token_is_not_learnt_nor_counted() -> None:
    labels = [block["labels"].tolist() for block in blocks(ROWS, TOKENIZER, length=2, is_masked=True)]
    assert labels == [[IGNORED, 2], [IGNORED, IGNORED], [IGNORED, IGNORED]]  # 3 and 4 begin blocks


def test_a_foreign_tokenizer_closes_rows_with_its_end_of_sequence() -> None:
    tokenizer = Vocabulary({f"token {n}": n for n in range(8)})
    (block,) = blocks(ROWS, tokenizer, length=7)
    assert block["input_ids"].tolist() == [1, 2, 3, 5, 4, 6, 5]


def test_the_loss_is_the_cross_entropy_before_learnt_tokens() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    labels = torch.tensor([[1, 2, IGNORED, 3], [1, IGNORED, IGNORED, IGNORED]])
    slots = [(0, 0), (0, 2)]  # those before (0, 1) and (0, 3); nothing predicts a block's first token
    expected = sum(-(teacher[s].softmax(-1) * logits[s].log_softmax(-1)).sum() for s in slots)
    torch.testing.assert_close(distillation_loss(logits, teacher, labels), expected)
    assert distillation_loss(logits, teacher, torch.full_like(labels, IGNORED)) == 0


def test_a_teacher_without_its_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer: a language_model that learns from a teacher needs"):
        from_mapping(TrainConfig, {"objective": "language_model", "output": "out", "teacher": "tiny"})
