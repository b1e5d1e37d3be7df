"""Levels of a dynamic tree in single calls: the exact twin of growth.Levels, which takes ten steps for each."""

from types import ModuleType

import torch

from draftwing.engine.tree import Candidates, Frontier
from draftwing.engine.tree_plan import TreePlan


class FusedLevels:
    """As growth.Levels, by `kernels`, one of engine/kernels.py.

    `target_ids [Vd]`: those of the draft's tokens, None if they are the same. `positions [B, 1]`: the roots'.
    """

    frontier: Frontier | None = None

    def __init__(
        self, kernels: ModuleType, plan: TreePlan, target_ids: torch.Tensor | None, positions: torch.Tensor
    ) -> None:
        self._kernels, self._plan, self._target_ids = kernels, plan, target_ids
        self.num_levels = self._num_used = 0
        shape = len(positions), plan.num_candidates
        ids = [positions.new_empty(shape) for _ in range(3)]
        numbers = [positions.new_empty(shape, dtype=torch.float32) for _ in range(2)]
        self._candidates = Candidates(ids[0], *numbers, *ids[1:])

    def candidates(self) -> Candidates:
        return self._candidates.first(self._num_used)

    def add(self, log_probs: torch.Tensor, draft_ids: torch.Tensor) -> Frontier | None:
        """Add the frontier's children `[B, P, K]`; returns the best K of all, or None at the end."""
        (num_rows, num_parents, width), first = log_probs.shape, self._num_used
        self.num_levels, self._num_used = self.num_levels + 1, first + num_parents * width
        best = None if self.num_levels == self._plan.depth else self._empty_frontier(num_rows, width)
        bins = self._plan.sizing.bins(self.num_levels)
        level = log_probs, draft_ids, self._target_ids, self.frontier, bins, self._candidates, best
        self._kernels.grow_level(*level, first, self.num_levels)
        return best

    def _empty_frontier(self, num_rows: int, width: int) -> Frontier:
        ids = [self._candidates.tokens.new_empty(num_rows, width) for _ in range(3)]
        return Frontier(ids[0], self._candidates.scores.new_empty(num_rows, width), *ids[1:])
