"""Tokenised samples as the trainer takes them: cut to length, batched, ordered."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from draftwing.data.chat import Example, encode_row
from draftwing.data.corpus import Row


def examples(rows: Sequence[Row], tokenizer: Any, length: int) -> list[Example]:
    """Tokenise rows; long ones are cut into pieces of `length` tokens, pieces with nothing supervised are left out."""
    pieces = []
    for row in rows:
        example = encode_row(row, tokenizer)
        for start in range(0, len(example), length):
            piece = Example(example.input_ids[start : start + length], example.loss_mask[start : start + length])
            if piece.loss_mask[2:].any():
                pieces.append(piece)
    return pieces


class Collator:
    """Pads examples on the right to the longest of the batch."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, batch: list[Example]) -> dict[str, torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence([e.input_ids for e in batch], batch_first=True, padding_value=self._pad)
        mask = nn.utils.rnn.pad_sequence([e.loss_mask for e in batch], batch_first=True, padding_value=False)
        return {"input_ids": ids, "loss_mask": mask}


class LengthGroupedOrder(Sampler[int]):
    """An order of rows by epoch that puts rows of like length together; a function of (seed, epoch), so it resumes."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))
