"""Training a draft model for an existing target: what it reads, what it learns, and that it learns it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from draftwing.config import TrainConfig, from_mapping
from draftwing.data.chat_template import Example
from draftwing.data.prompts import read_prompts
from draftwing.data.rows import read_rejects
from draftwing.training.train_language_model import IGNORED, blocks, distillation_loss, train_language_model


class Vocabulary(dict[str, int]):
    """What `blocks` asks of a tokenizer."""

    eos_token_id = 5

    def get_vocab(self) -> dict[str, int]:
        return self


TOKENIZER = Vocabulary({"<|endoftext|>": 0} | {f"token {n}": n for n in range(1, 8)})
ROWS = [
    Example(torch.tensor(ids), torch.tensor(mask, dtype=torch.bool))
    for ids, mask in (([1, 2, 3], [0, 1, 1]), ([4, 6], [1, 0]))
]


def test_rows_of_ids_become_blocks() -> None:
    """One after the other, each closed by the end of text; what does not fill a block is left out."""
    (block,) = blocks(ROWS, TOKENIZER, length=6)
    assert block["input_ids"].tolist() == block["labels"].tolist() == [1, 2, 3, 0, 4, 6]


def test_nothing_becomes_no_block() -> None:
    assert blocks([], TOKENIZER, length=6) == []


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


@pytest.mark.parametrize("tokenizer", ["", "tiny"])
def test_rows_that_do_not_fit_are_listed_and_left_out(tmp_path: Path, tokenizer: str) -> None:
    """Conversations that begin with an answer, and ids where the tokenizer is a new one."""
    user, answer = {"role": "user", "content": "Write it."}, {"role": "assistant", "content": "line\n" * 9}
    rows: list[dict[str, Any]] = [{"messages": [user, answer]}] * 8
    rows += [
        {"messages": [answer, user, answer]},
        {"input_ids": [1, 2]},
        {"messages": [user, answer], "held_out": True},
    ]
    rows += [{"messages": [user, answer, user, answer], "held_out": True}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    stage = {"objective": "language_model", "output": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl")}
    stage |= {"tokenizer": tokenizer, "vocab_size": 300, "sequence_length": 16, "batch_size": 2, "max_steps": 1}
    more = {"architecture": sizes | {"num_key_value_heads": 1}, "warmup_steps": 0, "bf16": False}
    train_language_model(from_mapping(TrainConfig, stage | more))
    assert (tmp_path / "model" / "model.safetensors").is_file()
    lines = [reject.line for reject in read_rejects(tmp_path / "model" / "rejects.jsonl")]
    assert lines == ([9] if tokenizer else [9, 10])
    if not tokenizer:
        assert len(read_prompts(tmp_path / "model" / "prompts.jsonl")) == 1


def test_a_teacher_without_its_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer: a language_model that learns from a teacher needs"):
        from_mapping(TrainConfig, {"objective": "language_model", "output": "out", "teacher": "tiny"})
