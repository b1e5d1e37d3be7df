"""Growing a tree level by level with any draft network: dynamic trees (EAGLE-2) and static ones (EAGLE-1)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, singledispatch

import torch

from draftwing.engine.drafter import Ranking
from draftwing.engine.tree import Candidates, DraftTree, best_subtree, join
from draftwing.engine.tree_plan import LookupTree, RankPath, StaticTree, TreePlan, TreeShape
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
        """Log-probabilities and target ids of the `width` best children of nodes at `depth`, `[B, K, width]` each."""
        ranked = self.rank(logits, self.positions + (depth + 1), self.vocab.target_ids)
        log_probs, draft_ids = ranked.topk(width)
        return log_probs, self.vocab.to_target(draft_ids)


def grow_tree(root: torch.Tensor, plan: TreeShape, draft: RootedDraft, merge: Merge | None = None) -> DraftTree:
    """The tree that a plan of depth 1 or more asks for, below `root [B]`. `merge` adds candidates from elsewhere.

    Raises:
        ValueError: a plan that is wider than the draft's vocabulary, or Lookahead decoding's.
    """
    if plan.width > len(draft.vocab):
        raise ValueError(f"plan: width {plan.width} exceeds the draft vocabulary of {len(draft.vocab)} tokens")
    levels = draft_levels(plan, draft)
    candidates, max_depth = join(levels), len(levels)
    if merge is not None and plan.looks_up:
        candidates, max_depth = merge(candidates, plan), plan.max_depth
    num_nodes = plan.sizing.num_nodes(candidates.scores, plan.num_nodes)
    return best_subtree(root, candidates, num_nodes, max_depth)


@singledispatch
def draft_levels(plan: TreeShape, draft: RootedDraft) -> list[Candidates]:
    """The candidates that a network drafts for a tree, level by level."""
    raise ValueError("plan: lookahead:WxNxG is for the method lookahead; drafts take chain:DEPTH or a tree")


@draft_levels.register
def _(plan: LookupTree, draft: RootedDraft) -> list[Candidates]:
    return draft_levels(plan.tree, draft)


@draft_levels.register(TreePlan)
def draft_dynamic(plan: TreePlan, draft: RootedDraft) -> list[Candidates]:
    """EAGLE-2's expand and rerank (arXiv 2406.16858, 4.1-4.2): scores are sums of what the plan holds nodes worth."""
    width, sizing = plan.width, plan.sizing
    log_probs, tokens = (t.squeeze(1) for t in draft.best_children(draft.root_logits, width, 0))  # [B, K]
    scores = sizing.worth(log_probs, 1)
    parent = torch.zeros_like(tokens)  # index into the previous level's frontier
    frontier = torch.arange(width, device=tokens.device).expand_as(tokens)  # candidate index of each, best first
    to_root = torch.full_like(tokens, -1)
    drafted, num_drafted = [Candidates(tokens, scores, log_probs, to_root, torch.ones_like(tokens))], width
    for level in range(1, plan.depth):
        num_parents = sizing.num_parents(scores, level)
        if num_parents == 0:
            break
        if num_parents < scores.shape[1]:
            scores, tokens, parent, frontier = (t[:, :num_parents] for t in (scores, tokens, parent, frontier))
        log_probs, child_tokens = draft.best_children(draft.step(parent, tokens), width, level)  # [B, P, K]
        child_scores = (scores[:, :, None] + sizing.worth(log_probs, level + 1)).flatten(1)
        child_tokens = child_tokens.flatten(1)
        child_parents = frontier.repeat_interleave(width, dim=1)
        depths = torch.full_like(child_tokens, level + 1)
        drafted.append(Candidates(child_tokens, child_scores, log_probs.flatten(1), child_parents, depths))
        if level + 1 < plan.depth:
            scores, chosen = child_scores.topk(width)
            tokens = child_tokens.gather(1, chosen)
            frontier, parent = chosen + num_drafted, chosen // width
            num_drafted += child_tokens.shape[1]
    return drafted


@draft_levels.register(StaticTree)
def draft_static(plan: StaticTree, draft: RootedDraft) -> list[Candidates]:
    """EAGLE-1's fixed tree: node (.., r) is the r-th best child of its parent."""
    logits, scores = draft.root_logits, draft.root_logits.new_zeros(len(draft.root_logits), 1, dtype=torch.float32)
    drafted = []
    for depth, level in enumerate(_static_levels(plan, logits.device), 1):
        log_probs, child_tokens = draft.best_children(logits, plan.width, depth - 1)  # [B, E, K]
        level_scores, log_probs, tokens = (
            t.flatten(1).index_select(1, level.picks) for t in (scores[:, :, None] + log_probs, log_probs, child_tokens)
        )
        parents = level.parents.expand_as(tokens)
        drafted.append(Candidates(tokens, level_scores, log_probs, parents, torch.full_like(tokens, depth)))
        if depth < plan.depth:
            scores, inner = (t.index_select(1, level.inner) for t in (level_scores, tokens))
            logits = draft.step(level.inner_parents.expand_as(inner), inner)
    return drafted


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
