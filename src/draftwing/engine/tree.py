"""The draft tree, its ancestor mask, and the walk that accepts a path of it.

Acceptance is one rule for every method: the target chooses its own token at each node; a node is accepted if its
parent is and the parent's chosen token is this node's token. The last accepted node's choice is the bonus token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch

from draftwing import native
from draftwing.engine import native_cycle
from draftwing.engine.kernels import kernels_for


@dataclass(frozen=True)
class DraftTree:
    """N nodes a row; node 0 is the root, the last committed token. Parents come before children.

    Attributes:
        tokens: `[B, N]` token ids; valid siblings differ.
        parents: `[B, N]` node indices; the root is its own parent.
        depths: `[B, N]` distance from the root.
        valid: `[B, N]` False on nodes that are never accepted: padding, and guesses that the target is asked about.
        scores: `[B, N]` estimates of log P(the node is accepted); 0 at the root.
        log_probs: `[B, N]` the drafter's own log-probability of each node given its parent; 0 at the root.
        max_depth: host-side bound of the valid nodes' depths.
        num_generations: the same of all nodes, where others lie deeper.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    valid: torch.Tensor
    scores: torch.Tensor
    log_probs: torch.Tensor
    max_depth: int
    num_generations: int = 0

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    def only_in(self, rows: torch.Tensor) -> "DraftTree":
        """The tree in some of the rows, those that `rows [B]` is True for, and the root alone in the others."""
        return replace(self, valid=self.valid & (rows[:, None] | (self.depths == 0)))

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """`[B, N, N]` bool: True where the column's node is the row's node or an ancestor of it."""
        if native.reads(self.parents):
            return native_cycle.ancestors(self.parents)
        num_nodes, device = self.num_nodes, self.tokens.device
        reach = torch.nn.functional.one_hot(self.parents, num_nodes).float() + torch.eye(num_nodes, device=device)
        steps = 1
        num_generations = max(self.max_depth, self.num_generations)
        while steps < num_generations:  # reach covers `steps` generations; squaring doubles them
            reach = (reach @ reach).clamp(max=1.0)
            steps *= 2
        return reach > 0


class _Columns:
    """A dataclass of tensors `[B, M]`."""

    def first(self, count: int) -> Self:
        """The first so many columns; of a frontier the best."""
        parts = vars(self).values()
        return type(self)(*(part if part.shape[1] == count else part[:, :count] for part in parts))


@dataclass(frozen=True)
class Candidates(_Columns):
    """M drafted nodes a row, of which a tree keeps the best. Parents come before children.

    Attributes:
        tokens: `[B, M]` token ids; siblings differ.
        scores: `[B, M]` estimates of log P(the node is accepted), at most the parent's.
        log_probs: `[B, M]` the drafter's own log-probability of each node given its parent; NaN where it has none.
        parents: `[B, M]` candidate indices; -1 is the root.
        depths: `[B, M]` distance from the root, from 1 on.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    log_probs: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor


@dataclass(frozen=True)
class Frontier(_Columns):
    """The P nodes of a level whose children are drafted, the best first; `[B, P]` each.

    Attributes:
        tokens, scores: as in Candidates.
        numbers: candidate indices; -1 is the root.
        parents: indices among the nodes of the frontier before.
    """

    tokens: torch.Tensor
    scores: torch.Tensor
    numbers: torch.Tensor
    parents: torch.Tensor


def join(parts: Sequence[Candidates]) -> Candidates:
    """The candidates of all parts in their order; parents already count from the first part's first."""
    if len(parts) == 1:
        return parts[0]
    return Candidates(*(torch.cat([getattr(part, field.name) for part in parts], 1) for field in fields(Candidates)))


def no_candidates(root: torch.Tensor) -> Candidates:
    """Nothing drafted yet below `root [B]`."""
    none = root.new_empty(root.shape[0], 0)
    return Candidates(none, none.float(), none.float(), none, none)


@dataclass(frozen=True)
class Overlap:
    """Where a chain of D tokens lies among M candidates.

    Attributes:
        nodes: `[B, D]` the candidate that each token is, M from the first one that is none.
        is_found: `[B, D]` whether it is one.
        is_contested: `[B, D]` whether it is none, but others were drafted in its place.
    """

    nodes: torch.Tensor
    is_found: torch.Tensor
    is_contested: torch.Tensor


def follow(candidates: Candidates, chain: torch.Tensor, num_levels: int) -> Overlap:
    """Follow a `chain [B, D]` of tokens from the root for as long as it is among the candidates.

    The candidates lie on `num_levels` levels, of which the chain has at least as many.
    """
    num_rows, depth = chain.shape
    num_candidates = candidates.tokens.shape[1]
    is_same = candidates.tokens == chain.gather(1, candidates.depths - 1)
    is_on_chain = is_same.new_ones(num_rows, num_candidates + 1)  # column 0 is the root, for parent -1
    is_on_chain[:, 1:] = is_same
    parents = candidates.parents + 1
    for _ in range(num_levels):  # each round settles one more level
        has_parent_on_chain = is_on_chain.gather(1, parents)
        is_on_chain[:, 1:] = is_same & has_parent_on_chain
    numbers = torch.arange(num_candidates, device=chain.device).expand_as(parents)
    # Column 0 takes those that are not on the chain, or not beside it.
    level = torch.where(is_on_chain[:, 1:], candidates.depths, 0)
    nodes = chain.new_full((num_rows, depth + 1), num_candidates).scatter(1, level, numbers)[:, 1:]
    level = torch.where(has_parent_on_chain, candidates.depths, 0)
    has_siblings = is_same.new_zeros(num_rows, depth + 1).scatter(1, level, True)[:, 1:]
    is_found = nodes < num_candidates
    return Overlap(nodes, is_found, has_siblings & ~is_found)


def best_subtree(root: torch.Tensor, candidates: Candidates, num_nodes: int, max_depth: int) -> DraftTree:
    """The tree of `root [B]` and the best `num_nodes - 1` candidates.

    A candidate scores at most what its parent does and comes after it, so a stable order takes parents first.
    """
    num_nodes = min(num_nodes, 1 + candidates.scores.shape[1])
    kernels = kernels_for(candidates.scores)
    if kernels and candidates.scores.shape[1] <= kernels.MOST_CANDIDATES:
        best: DraftTree = kernels.best_nodes(root, candidates, num_nodes, max_depth)
        return best
    scores = candidates.scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    chosen = order[:, : num_nodes - 1].sort(dim=1).values
    numbers = torch.arange(1, num_nodes, device=root.device).expand_as(chosen)
    # Node numbers by candidate; column 0 is the root, for parent -1.
    node_of = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.int64, device=root.device)
    node_of.scatter_(1, chosen + 1, numbers)
    parents = candidates.parents.gather(1, chosen) + 1
    parent_nodes = node_of.gather(1, parents)
    # Where rounding has put a node above its parent and the parent fell out, the node must not hang on the root.
    is_orphan = (parents > 0) & (parent_nodes == 0)
    zero = torch.zeros_like(root)[:, None]
    tree_scores = torch.cat((zero.to(scores.dtype), scores.gather(1, chosen)), 1)
    return DraftTree(
        tokens=torch.cat((root[:, None], candidates.tokens.gather(1, chosen)), 1),
        parents=torch.cat((zero, parent_nodes), 1),
        depths=torch.cat((zero, candidates.depths.gather(1, chosen)), 1),
        valid=tree_scores.isfinite() & ~torch.cat((zero > 0, is_orphan), 1),
        scores=tree_scores,
        log_probs=torch.cat((zero.to(scores.dtype), candidates.log_probs.gather(1, chosen)), 1),
        max_depth=max_depth,
    )


@dataclass(frozen=True)
class Verdict:
    """The accepted path of each row.

    Attributes:
        accepted: `[B, N]` bool, the root among them.
        path: `[B, L]` node indices from the root on, L = max_depth + 1; entries past the accepted ones are 0.
        num_accepted: `[B]` accepted draft tokens, without the bonus token.
        tokens: `[B, L]` the tokens to emit: `num_accepted` accepted ones, then the bonus token, then padding.
    """

    accepted: torch.Tensor
    path: torch.Tensor
    num_accepted: torch.Tensor
    tokens: torch.Tensor

    @property
    def bonus(self) -> torch.Tensor:
        """`[B]` the token that the target chose at the last accepted node."""
        return self.tokens.gather(1, self.num_accepted[:, None]).squeeze(1)

    def along_path(self, features: torch.Tensor) -> torch.Tensor:
        """The rows of `features [B, N, F]` that belong to the path, `[B, L, F]`."""
        return features[torch.arange(len(features), device=features.device)[:, None], self.path]


def root_tree(root: torch.Tensor, num_nodes: int = 1) -> DraftTree:
    """The tree of plain decoding: `root [B]` alone, padded with copies of it that are never accepted."""
    tokens = root[:, None].repeat(1, num_nodes)
    zeros = torch.zeros_like(tokens)
    is_root = torch.arange(num_nodes, device=root.device) == 0
    no_scores = torch.zeros_like(tokens, dtype=torch.float32)
    return DraftTree(tokens, zeros, zeros, is_root.expand_as(tokens), no_scores, no_scores, 0)


def walk(tree: DraftTree, chosen: torch.Tensor) -> Verdict:
    """Accept the longest branch that the target itself produces; `chosen [B, N]` is its own token at each node.

    A node without a choice, below 0, is not accepted.
    """
    if native.reads(chosen):
        return Verdict(*native_cycle.walk(tree, chosen))
    matches = tree.valid & (chosen.gather(1, tree.parents) == tree.tokens) & (chosen >= 0)
    matches[:, 0].fill_(True)  # an assignment would make a tensor of the value: a copy from the host
    accepted = ~(tree.ancestors & ~matches[:, None, :]).any(-1)
    # Siblings differ, so at most one node is accepted at each depth; rejected ones are sent past the end.
    length = tree.max_depth + 1
    depth = torch.where(accepted, tree.depths, length)
    nodes = torch.arange(tree.num_nodes, device=chosen.device).expand_as(depth)
    path = torch.zeros(chosen.shape[0], length + 1, dtype=torch.int64, device=chosen.device)
    path = path.scatter_(1, depth, nodes)[:, :length]
    num_accepted = accepted.sum(1) - 1
    in_path = torch.arange(length, device=path.device) <= num_accepted[:, None]
    path = torch.where(in_path, path, 0)
    return Verdict(accepted, path, num_accepted, chosen.gather(1, path))
