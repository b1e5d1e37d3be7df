"""What a row's own text does to its scores: penalties for what was said, and ends that it may not choose yet."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from draftwing.by_seat import BySeat
from draftwing.engine.stopping import StopRule
from draftwing.engine.tree import DraftTree

if TYPE_CHECKING:
    from draftwing.engine.sampling import SamplingParams, SamplingWork

FACTORS = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Penalties(BySeat):
    """Which tokens each row has seen, how often it has said them itself, and until when its ends are held back.

    At a node its own history counts: the row's tokens and the node's ancestors. A row's neutral factors change no bit.
    """

    by_seat = (*(f"_{name}" for name in FACTORS), "_seen", "_counts", "_ends", "_held_until", "holds")
    _repetition_penalty: torch.Tensor  # [B, 1, 1], as the other factors
    _presence_penalty: torch.Tensor
    _frequency_penalty: torch.Tensor

    def __init__(self, num_seats: int, vocab_size: int, device: torch.device) -> None:
        for name in FACTORS:
            neutral = 1.0 if name == "repetition_penalty" else 0.0
            setattr(self, f"_{name}", torch.full((num_seats, 1, 1), neutral, dtype=torch.float32, device=device))
        self._shape, self._device = (num_seats, vocab_size), device
        self._seen = torch.zeros(self._shape, dtype=torch.bool, device=device)
        self._counts: torch.Tensor | None = None  # [B, V], made when a row asks for it
        self._ends: torch.Tensor | None = None  # [B, V], as those
        self._held_until = torch.zeros(num_seats, 1, dtype=torch.int64, device=device)  # the first position of an end
        self.holds = np.zeros(num_seats, dtype=bool)

    def admit(self, seat: int, params: "SamplingParams", prompt: Sequence[int], stop: StopRule) -> None:
        """Begin a row with this prompt."""
        for name in FACTORS:
            getattr(self, f"_{name}")[seat] = getattr(params, name)
        self._seen[seat] = False
        if params.repetition_penalty != 1:
            self._seen[seat, self._ids(prompt)] = True
        if params.counts and self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        if self._counts is not None:
            self._counts[seat] = 0
        ends = [token for token in stop.eos_token_ids if stop.min_new_tokens and 0 <= token < self._shape[1]]
        self.holds[seat] = len(ends) > 0
        self._held_until[seat] = len(prompt) + stop.min_new_tokens if ends else 0
        if ends:
            if self._ends is None:
                self._ends = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._ends[seat] = False
            self._ends[seat, self._ids(ends)] = True

    def observe(self, tokens: torch.Tensor, num_valid: torch.Tensor, work: "SamplingWork") -> None:
        """Count the first `num_valid [B]` of the emitted tokens `[B, L]`."""
        if not (work.has_repetition or work.has_counts):
            return
        valid = torch.arange(tokens.shape[1], device=tokens.device) < num_valid[:, None]
        counts = torch.zeros(self._seen.shape, dtype=torch.int32, device=tokens.device)
        counts.scatter_add_(1, tokens, valid.int())
        if work.has_repetition:
            self._seen |= counts > 0
        if work.has_counts:
            assert self._counts is not None
            self._counts += counts

    def apply(self, scores: torch.Tensor, tree: DraftTree, lengths: torch.Tensor, work: "SamplingWork") -> torch.Tensor:
        """The scores `[B, N, V]` of a tree's nodes whose root has position `lengths [B]`, penalised."""
        if work.has_repetition or work.has_counts:
            counts = torch.zeros(scores.shape, dtype=torch.int32, device=scores.device)
            # The root is in the row's own counts already.
            on_branch = (tree.ancestors & (tree.depths > 0)[:, None, :]).int()
            counts.scatter_add_(2, tree.tokens[:, None, :].expand_as(on_branch), on_branch)
            if work.has_repetition:
                scores = self._for_repetition(scores, counts)
            if work.has_counts:
                scores = self._for_counts(scores, counts)
        if work.holds_ends:
            assert self._ends is not None
            is_early = lengths[:, None] + tree.depths + 1 < self._held_until
            scores = scores.masked_fill(self._ends[:, None, :] & is_early[..., None], -torch.inf)
        return scores

    def _for_repetition(self, scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        seen = (counts > 0) | self._seen[:, None, :]
        penalised = torch.where(scores < 0, scores * self._repetition_penalty, scores / self._repetition_penalty)
        return torch.where(seen, penalised, scores)

    def _for_counts(self, scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        assert self._counts is not None
        counts = counts + self._counts[:, None, :]
        return scores - self._frequency_penalty * counts - self._presence_penalty * (counts > 0)

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(tokens), dtype=torch.int64, device=self._device)
