"""What shapes draft trees: the tree of one cycle, and the plan that gives each cycle its tree.

A text names one of three shapes: a dynamic tree (TreePlan; a chain is one of width 1, `off` one of depth 0), a
StaticTree, a LookaheadTree. A dynamic tree may have another sizing, and a looked-up continuation may compete for nodes.
N counts the root. The reference code's `depth=d` makes d + 1 levels; here the depth is the number of levels.
"""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, TypeAlias

if TYPE_CHECKING:  # so that the command line can read a plan's name without them
    import torch

    from draftwing.engine.readback import CycleReport

RankPath = tuple[int, ...]

LOOKUP_DEPTH = 8
"""Tokens of a looked-up continuation at most; deeper trees make every commit longer."""

# EAGLE's tree (arXiv 2401.15077, figure 7; 25 draft nodes, 4/8/8/3/2 a level). (a, b) is the b-th best child of the
# root's a-th best child.
EAGLE1_PATHS: tuple[RankPath, ...] = (
    *((rank,) for rank in range(4)),
    *((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)),
    *((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)),
    *((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2)),
    *((0, 0, 0, 0, 0), (0, 0, 0, 0, 1)),
)  # fmt: skip

# Medusa's tree (arXiv 2401.10774, section 2.3.3): 63 draft nodes, the best by the accuracies of Vicuna 7B's heads.
MEDUSA_PATHS: tuple[RankPath, ...] = (
    *((rank,) for rank in range(10)),
    *((0, rank) for rank in range(10)), *((1, rank) for rank in range(7)), *((2, rank) for rank in range(3)),
    *((3, 0), (3, 1), (4, 0), (5, 0), (6, 0), (7, 0), (8, 0), (9, 0)),
    *((0, 0, rank) for rank in range(10)), *((0, 1, rank) for rank in range(3)), *((0, 2, rank) for rank in range(2)),
    *((0, rank, 0) for rank in range(3, 8)), (1, 0, 0), (1, 0, 1), (2, 0, 0), (0, 0, 0, 0), (0, 0, 0, 1),
)  # fmt: skip
STATIC_TREES = {"eagle1": EAGLE1_PATHS, "medusa": MEDUSA_PATHS}


@dataclass(frozen=True)
class Bins:
    """Bins of log-probabilities: the `edges [E]` between them, what is `added [E + 1]` in each, and the `most` then."""

    edges: "torch.Tensor"
    added: "torch.Tensor"
    most: float


class Sizing:
    """What growth asks while it drafts a tree: the worth of a node, and whether more of them pay.

    By default the papers' way: drafters are believed, and trees always have their full shape.
    """

    def bins(self, depth: int) -> "Bins | None":
        """What is added to log-probabilities at `depth`; None: nothing."""
        return None

    def worth(self, log_probs: "torch.Tensor", depth: int) -> "torch.Tensor":
        """Estimates of log P(a child is accepted | its parent is) from the drafter's own, any shape; at most 0."""
        from torch import bucketize

        bins = self.bins(depth)
        if bins is None:
            return log_probs
        return (log_probs + bins.added.take(bucketize(log_probs, bins.edges))).clamp_(max=bins.most)

    def num_parents(self, scores: "torch.Tensor", depth: int) -> int:
        """Of how many nodes at `depth` to draft children, given their scores `[B, K]`, the best first; 0 ends it."""
        return scores.shape[1]

    def num_nodes(self, scores: "torch.Tensor", limit: int) -> int:
        """How many nodes of a tree to keep, the root included, given its candidates' scores `[B, M]`."""
        return limit


IN_FULL = Sizing()


@dataclass(frozen=True)
class _Shape:
    """The shape of a cycle's tree; a plan, too: one that gives itself to every cycle.

    Attributes:
        width: nodes of a level, or n-grams side by side.
        depth: levels that are drafted; 0: no draft.
        num_nodes: nodes at most, the root included.
        num_inner: drafted nodes whose children are drafted too: what a draft network reads below the root.
        max_depth: bound of the nodes' depths, of those too that no level has.
        is_chain: whether the accepted nodes are always the first ones, so that a commit moves nothing (true of `off`).
        lookup_depth: tokens of a looked-up continuation that competes for the nodes; 0: nothing is looked up.
        sizing: what judges the nodes while a dynamic tree grows.
        cut_to: the first levels, so many, for a drafter or a limit that has no more.
    """

    lookup_depth: int = field(default=0, repr=False, kw_only=True)
    sizing: Sizing = field(default=IN_FULL, repr=False, kw_only=True)

    learns: ClassVar[bool] = False

    @property
    def largest(self) -> Self:
        return self

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> Self:
        return self

    def learn(self, report: "CycleReport") -> None:
        pass

    @property
    def looks_up(self) -> bool:
        """Whether what is looked up in the text competes for the nodes."""
        return self.lookup_depth > 0

    def with_lookup(self: "TreeShape") -> "TreeShape":  # type: ignore[misc]
        """The same nodes, for which a looked-up continuation competes; it may lie deeper than the drafted levels."""
        return replace(self, lookup_depth=min(self.num_nodes - 1, LOOKUP_DEPTH))


@dataclass(frozen=True)
class TreePlan(_Shape):
    """EAGLE-2's dynamic tree (arXiv 2406.16858, section 4).

    The `width` best nodes of each of `depth` levels are expanded, and the best `num_nodes - 1` of all candidates kept.
    With a `sizing` of its own these are bounds: it says in each tree how much of it pays. Two are equal only with the
    same sizing, whose tensors captured cycles read.
    """

    width: int
    depth: int
    num_nodes: int

    def __post_init__(self) -> None:
        if min(self.width, self.depth) < (1 if self.depth else 0) or self.num_nodes < 1:
            raise ValueError(f"plan: width, depth and nodes must be positive, got {self!r}")
        if self.depth and self.num_nodes - 1 > self.num_candidates:
            raise ValueError(
                f"plan: {self.num_nodes} nodes asked for, but width {self.width} and depth {self.depth} "
                f"draft only {self.num_candidates} candidates and the root"
            )

    def __str__(self) -> str:
        """As `parse` reads it."""
        if not self.depth:
            return "off"
        if self.width == 1 and self.num_nodes > self.depth:
            return f"chain:{self.depth}"
        return f"tree:{self.width}x{self.depth}x{self.num_nodes}"

    @property
    def num_candidates(self) -> int:
        """Draft nodes that are scored: `width` at the first level, `width**2` at each further."""
        return self.width + (self.depth - 1) * self.width**2 if self.depth else 0

    @property
    def num_inner(self) -> int:
        return self.width * (self.depth - 1)

    @property
    def max_depth(self) -> int:
        return max(self.depth, self.lookup_depth)

    @property
    def is_chain(self) -> bool:
        return self.width <= 1 and not self.looks_up  # a lookup may branch off anywhere

    def at_most(self, width: int) -> "TreePlan":
        """This plan, or a narrower one for a draft that has fewer tokens."""
        return self if width >= self.width else self._within(width, self.depth)

    def cut_to(self, depth: int) -> "TreePlan":
        return self if self.depth <= depth else self._within(self.width, depth)

    def _within(self, width: int, depth: int) -> "TreePlan":
        """A tree of another width and depth, with as many of the nodes as that drafts."""
        num_candidates = TreePlan(width, depth, 1).num_candidates
        return replace(self, width=width, depth=depth, num_nodes=min(self.num_nodes, 1 + num_candidates))

    @staticmethod
    def off() -> "TreePlan":
        """No speculation: the root alone."""
        return TreePlan(0, 0, 1)

    @staticmethod
    def chain(depth: int) -> "TreePlan":
        """One draft token a level."""
        return TreePlan(1, depth, depth + 1)

    @staticmethod
    def static(paths: tuple[RankPath, ...]) -> "StaticTree":
        """A tree of fixed rank paths."""
        return StaticTree(paths)

    @staticmethod
    def parse(text: str) -> "TreeShape":
        """Read `off`, `chain:DEPTH`, `tree:WIDTHxDEPTHxNODES`, `lookahead:WxNxG`, or the static tree of a paper.

        Those are `eagle1` and `medusa`.

        Raises:
            ValueError: any other text.
        """
        if text == "off":
            return TreePlan.off()
        if text in STATIC_TREES:
            return StaticTree(STATIC_TREES[text])
        if match := re.fullmatch(r"chain:(\d+)", text):
            return TreePlan.chain(int(match[1]))
        if match := re.fullmatch(r"tree:(\d+)x(\d+)x(\d+)", text):
            return TreePlan(*map(int, match.groups()))
        if match := re.fullmatch(r"lookahead:(\d+)x(\d+)x(\d+)", text):
            return LookaheadTree(*map(int, match.groups()))
        raise ValueError(
            f"plan: expected off, chain:DEPTH, tree:WIDTHxDEPTHxNODES (such as tree:10x7x60), "
            f"lookahead:WxNxG (such as lookahead:15x5x15), {' or '.join(STATIC_TREES)}, got {text!r}"
        )


@dataclass(frozen=True)
class StaticTree(_Shape):
    """EAGLE-1's and Medusa's tree of fixed rank `paths`, kept by depth, then by rank.

    Raises:
        ValueError: no paths, the same one twice, negative ranks, or a path whose prefix is not among them.
    """

    paths: tuple[RankPath, ...]

    def __post_init__(self) -> None:
        known = {(), *self.paths}
        is_distinct = len(known) == len(self.paths) + 1
        if not self.paths or not is_distinct or min(min(path, default=-1) for path in self.paths) < 0:
            raise ValueError("plan: expected one or more different paths of ranks from 0 on")
        for path in self.paths:
            if path[:-1] not in known:
                raise ValueError(f"plan: path {path} has no parent in the tree")
        object.__setattr__(self, "paths", tuple(sorted(self.paths, key=lambda path: (len(path), path))))

    def __str__(self) -> str:
        """As TreePlan.parse reads it, but for trees of no paper."""
        named = (name for name, paths in STATIC_TREES.items() if set(paths) == set(self.paths))
        return next(named, f"static tree of {self.num_nodes} nodes")

    @cached_property
    def width(self) -> int:
        return max(max(path) for path in self.paths) + 1

    @property
    def depth(self) -> int:
        return len(self.paths[-1])

    @property
    def num_nodes(self) -> int:
        return len(self.paths) + 1

    @property
    def num_inner(self) -> int:
        return len(self.inner_paths) - 1

    @property
    def max_depth(self) -> int:
        return max(self.depth, self.lookup_depth)

    is_chain = False

    @cached_property
    def inner_paths(self) -> frozenset[RankPath]:
        """The nodes that have children, the root `()` among them."""
        return frozenset(path[:-1] for path in self.paths)

    @cached_property
    def levels(self) -> tuple[tuple[RankPath, ...], ...]:
        """The paths by depth, from depth 1 on."""
        return tuple(tuple(path for path in self.paths if len(path) == d) for d in range(1, self.depth + 1))

    def cut_to(self, depth: int) -> "StaticTree":
        return replace(self, paths=tuple(path for path in self.paths if len(path) <= depth))


@dataclass(frozen=True)
class LookaheadTree(_Shape):
    """Lookahead decoding's tree: W columns of guesses, and G n-grams of N tokens (arXiv 2402.02057, section 3).

    Raises:
        ValueError: no column, no n-gram, or n-grams of fewer than 2 tokens.
    """

    num_columns: int
    ngram_length: int
    num_ngrams: int

    is_chain = False

    def __post_init__(self) -> None:
        if self.num_columns < 1 or self.num_ngrams < 1 or self.ngram_length < 2:
            raise ValueError(f"plan: expected lookahead:WxNxG with W and G from 1 on and N from 2 on, got {self}")

    def __str__(self) -> str:
        return f"lookahead:{self.num_columns}x{self.ngram_length}x{self.num_ngrams}"

    @property
    def width(self) -> int:
        return self.num_ngrams

    @property
    def depth(self) -> int:
        return self.ngram_length - 1

    @property
    def num_nodes(self) -> int:
        return (self.num_columns + self.num_ngrams) * self.depth

    @property
    def num_inner(self) -> int:
        return self.width * (self.depth - 1)

    @property
    def max_depth(self) -> int:
        """The last guess of the window stands W - 1 + N - 2 tokens behind the root."""
        return max(self.depth, self.num_columns + self.depth - 2)

    def cut_to(self, depth: int) -> "LookaheadTree":
        return self if self.depth <= depth else replace(self, ngram_length=depth + 1)


TreeShape: TypeAlias = TreePlan | StaticTree | LookaheadTree
"""The shape of a cycle's tree."""
OFF = TreePlan.off()


class Plan(Protocol):
    """What gives each cycle its tree: a shape chosen by hand, which gives itself, or one of those in plans/."""

    @property
    def learns(self) -> bool:
        """Whether `learn` is to be called after each cycle."""

    @property
    def largest(self) -> TreeShape:
        """The largest tree that `next` gives."""

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> TreeShape:
        """The next cycle's tree for so many rows, given the committed tokens of the longest one.

        `sampled`: whether one of them draws its tokens at a temperature.
        """

    def learn(self, report: "CycleReport") -> None:
        """Take in what became of the cycle's tree."""
