"""Log-probabilities of tokens as the target gives them: before anything warps, biases or penalises them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

MOST_TOP = 20
"""Of the most probable tokens that a request may ask for."""


class TokenLogprobs(NamedTuple):
    """A token's log-probability, and the most probable tokens with theirs, the best first.

    Log-softmax of the target's logits in float32. Of equals the lowest id comes first, as decoding has it. The token
    is the most probable one iff its log-probability equals the first of them.
    """

    logprob: float
    top: list[tuple[int, float]]


class Scores(NamedTuple):
    """Log-probabilities of tokens `chosen [B, L]`, and of the K most probable ones: `top [B, L K]`, their ids."""

    chosen: torch.Tensor
    top: torch.Tensor
    top_ids: torch.Tensor

    @staticmethod
    def of(logits: torch.Tensor, tokens: torch.Tensor) -> "Scores":
        """The scores of `tokens [B, L]` by `logits [B, L, V]`."""
        log_probs = logits.float().log_softmax(-1)
        top, top_ids = log_probs.topk(min(MOST_TOP, log_probs.shape[-1]))
        return Scores(log_probs.gather(-1, tokens[..., None]).squeeze(-1), top.flatten(1), top_ids.flatten(1))


@dataclass(frozen=True)
class ScoresOnHost:
    """Scores that have been read: arrays of the same shapes."""

    chosen: np.ndarray[Any, np.dtype[Any]]
    top: np.ndarray[Any, np.dtype[Any]]
    top_ids: np.ndarray[Any, np.dtype[Any]]

    def of_row(self, row: int, num_top: int) -> Iterator[TokenLogprobs]:
        """A row's tokens, one after the other."""
        length = self.chosen.shape[1]
        top, top_ids = (array[row].reshape(length, -1).tolist() for array in (self.top, self.top_ids))
        for logprob, best, ids in zip(self.chosen[row].tolist(), top, top_ids, strict=True):
            ordered = sorted(zip(ids, best, strict=True), key=lambda pair: (-pair[1], pair[0]))
            yield TokenLogprobs(logprob, list(islice(ordered, num_top)))
