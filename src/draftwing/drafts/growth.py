"""Growing a tree level by level with any draft network: dynamic trees (EAGLE-2) and static ones (EAGLE-1)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, singledispatch
from types import ModuleType

import torch

from draftwing.engine.drafter import Ranking
from draftwing.engine.kernels import kernels_for
from draftwing.engine.tree import Candidates, DraftTree, Frontier, best_subtree, join
from draftwing.engine.tree_plan import RankPath, StaticTree, TreePlan, TreeShape
from draftwing.layers import DraftVocab

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Runs the nodes of the next level: their parents' indices `[B, K]` in the level before and their `tokens [B, K]`.

Returns the logits `[B, K, Vd]` of their children. The first level's parent is the root, index 0.
"""
Merge = Callable[[Candidates, TreeShape], Candidates]
"""Adds candidates from elsewhere to those drafted for a plan."""


@dataclass(frozen=True)
class RootedDraft:
    """A draft network that has read the root and can be run down a tree from there.

    Attributes:
        root_logits: `[B, 1, Vd]` of the root's children.
        step: runs one more level.
        positions: `[B, 1]` of the root.
        vocab: what the logits are over.
        rank: gives the candidates' log-probabilities.
    """

    root_logits: torch.Tensor
    step: Step
    positions: torch.Tensor
    vocab: DraftVocab
    rank: Ranking

    def best_children(self, logits: torch.Tensor, width: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and draft ids of the `width` best children of nodes at `depth`, `[B, K, width]` each."""
        return self.rank(logits, self.positions + (depth + 1), self.vocab.target_ids).topk(width)


def grow_tree(root: torch.Tensor, plan: TreeShape, draft: RootedDraft, merge: Merge | None = None) -> DraftTree:
    """The tree that a plan of depth 1 or more asks for, below `root [B]`. `merge` adds candidates from elsewhere.

    Raises:
        ValueError: a plan that is wider than the draft's vocabulary, or Lookahead decoding's.
    """
    if plan.width > len(draft.vocab):
        raise ValueError(f"plan: width {plan.width} exceeds the draft vocabulary of {len(draft.vocab)} tokens")
    candidates, max_depth = draft_levels(plan, draft)
    if merge is not None and plan.looks_up:
        candidates, max_depth = merge(candidates, plan), plan.max_depth
    num_nodes = plan.sizing.num_nodes(candidates.scores, plan.num_nodes)
    return best_subtree(root, candidates, num_nodes, max_depth)


@singledispatch
def draft_levels(plan: TreeShape, draft: RootedDraft) -> tuple[Candidates, int]:
    """The candidates that a network drafts for a tree, level by level, and the number of levels."""
    raise ValueError("plan: lookahead:WxNxG is for the method lookahead; drafts take chain:DEPTH or a tree")


@draft_levels.register(TreePlan)
def draft_dynamic(plan: TreePlan, draft: RootedDraft) -> tuple[Candidates, int]:
    """EAGLE-2's expand and rerank (arXiv 2406.16858, 4.1-4.2): scores are sums of what the plan holds nodes worth."""
    logits, levels = draft.root_logits, _levels_of(plan, draft)
    for depth in range(1, plan.depth + 1):
        frontier = levels.add(*draft.best_children(logits, plan.width, depth - 1))
        if frontier is None or not (num_parents := plan.sizing.num_parents(frontier.scores, depth)):
            break
        frontier = levels.frontier = frontier.first(num_parents)
        logits = draft.step(frontier.parents, frontier.tokens)
    return levels.candidates(), levels.num_levels


class Levels:
    """A dynamic tree's candidates, level by level, and the `frontier` whose children come next."""

    def __init__(self, plan: TreePlan, draft: RootedDraft) -> None:
        self._plan, self._vocab = plan, draft.vocab
        self._drafted: list[Candidates] = []
        root = torch.zeros_like(draft.positions)
        dtype = torch.float64 if draft.root_logits.dtype == torch.float64 else torch.float32
        self.frontier = Frontier(root, root.to(dtype), root - 1, root)

    @property
    def num_levels(self) -> int:
        return len(self._drafted)

    def candidates(self) -> Candidates:
        return join(self._drafted)

    def add(self, log_probs: torch.Tensor, draft_ids: torch.Tensor) -> Frontier | None:
        """Add the frontier's children `[B, P, K]`; returns the best K of all, ties to the first, or None at the end."""
        before, width, depth = self.frontier, self._plan.width, self.num_levels + 1
        worth = self._plan.sizing.worth(log_probs, depth)
        scores, tokens = (before.scores[:, :, None] + worth).flatten(1), self._vocab.to_target(draft_ids).flatten(1)
        parents, depths = before.numbers.repeat_interleave(width, dim=1), torch.full_like(tokens, depth)
        num_before = sum(level.tokens.shape[1] for level in self._drafted)
        self._drafted.append(Candidates(tokens, scores, log_probs.flatten(1), parents, depths))
        if depth == self._plan.depth:
            return None
        chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
        tokens, scores = tokens.gather(1, chosen), scores.gather(1, chosen)
        return Frontier(tokens, scores, chosen + num_before, chosen // width)


class FusedLevels:
    """The exact twin of Levels, which takes ten steps for each level, in single calls of `kernels` (engine/kernels.py).

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


def _levels_of(plan: TreePlan, draft: RootedDraft) -> Levels | FusedLevels:
    kernels = kernels_for(draft.root_logits)
    if kernels and plan.width <= kernels.MOST_WIDTH:
        return FusedLevels(kernels, plan, draft.vocab.target_ids, draft.positions)
    return Levels(plan, draft)


@draft_levels.register(StaticTree)
def draft_static(plan: StaticTree, draft: RootedDraft) -> tuple[Candidates, int]:
    """EAGLE-1's fixed tree: node (.., r) is the r-th best child of its parent."""
    logits, scores = draft.root_logits, draft.root_logits.new_zeros(len(draft.root_logits), 1, dtype=torch.float32)
    drafted = []
    for depth, level in enumerate(_static_levels(plan, logits.device), 1):
        log_probs, draft_ids = draft.best_children(logits, plan.width, depth - 1)  # [B, E, K]
        level_scores, log_probs, draft_ids = (
            t.flatten(1).index_select(1, level.picks) for t in (scores[:, :, None] + log_probs, log_probs, draft_ids)
        )
        tokens = draft.vocab.to_target(draft_ids)
        parents = level.parents.expand_as(tokens)
        drafted.append(Candidates(tokens, level_scores, log_probs, parents, torch.full_like(tokens, depth)))
        if depth < plan.depth:
            scores, inner = (t.index_select(1, level.inner) for t in (level_scores, tokens))
            logits = draft.step(level.inner_parents.expand_as(inner), inner)
    return join(drafted), plan.depth


@dataclass(frozen=True)
class _StaticLevel:
    """Where a static tree's nodes of one depth lie, `[M]`, and which of them have children, `[E]`.

    Attributes:
        picks: among the children `[E, K]`, flattened, of the level before's nodes with children.
        parents: candidate indices; -1 is the root.
        inner: of the nodes with children, among this level's.
        inner_parents: their parents, among the level before's nodes with children.
    """

    picks: torch.Tensor
    parents: torch.Tensor
    inner: torch.Tensor
    inner_parents: torch.Tensor


@cache
def _static_levels(plan: StaticTree, device: torch.device) -> list[_StaticLevel]:
    """A static tree's levels, sent to the device once and kept, for captured cycles go on reading them."""
    number_of = {(): -1} | {path: number for number, path in enumerate(plan.paths)}
    expanded: list[RankPath] = [()]
    levels = []
    for paths in plan.levels:
        inner = [index for index, path in enumerate(paths) if path in plan.inner_paths]
        indices = (
            [expanded.index(path[:-1]) * plan.width + path[-1] for path in paths],
            [number_of[path[:-1]] for path in paths],
            inner,
            [expanded.index(paths[index][:-1]) for index in inner],
        )
        levels.append(_StaticLevel(*(torch.tensor(part, dtype=torch.int64, device=device) for part in indices)))
        expanded = [paths[index] for index in inner]
    return levels
