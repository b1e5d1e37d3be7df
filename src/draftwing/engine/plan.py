"""Tree plans: the shape of a cycle's draft, or its bounds where trees size themselves.

N counts the root. The reference code's `depth=d` makes d + 1 levels; here the depth is the number of levels.
"""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

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


class Sizing(Protocol):
    """What growth asks while it drafts a tree: the worth of a node, and whether more of them pay."""

    def worth(self, log_probs: "torch.Tensor", depth: int) -> "torch.Tensor":
        """Estimates of log P(a child is accepted | its parent is) from the drafter's own, any shape; at most 0."""

    def num_parents(self, scores: "torch.Tensor", depth: int) -> int:
        """Of how many nodes at `depth` to draft children, given their scores `[B, K]`, the best first; 0 ends it."""

    def num_nodes(self, scores: "torch.Tensor", limit: int) -> int:
        """How many nodes of a tree to keep, the root included, given its candidates' scores `[B, M]`."""


class FixedSize:
    """The papers' sizing: drafters are believed, and trees always have the plan's shape."""

    def worth(self, log_probs: "torch.Tensor", depth: int) -> "torch.Tensor":
        return log_probs

    def num_parents(self, scores: "torch.Tensor", depth: int) -> int:
        return scores.shape[1]

    def num_nodes(self, scores: "torch.Tensor", limit: int) -> int:
        return limit


class Plan(Protocol):
    """What the cycle asks: a TreePlan, which always gives itself, or an AutoPlan."""

    @property
    def learns(self) -> bool:
        """Whether `learn` is to be called after each cycle."""

    @property
    def largest(self) -> "TreePlan":
        """The largest plan that `next` gives."""

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> "TreePlan":
        """The next cycle's plan for so many rows, given the committed tokens of the longest one.

        `sampled`: whether one of them draws its tokens at a temperature.
        """

    def learn(self, report: "CycleReport") -> None:
        """Take in what became of the cycle's tree."""


@dataclass(frozen=True)
class TreePlan:
    """How a draft tree is shaped.

    A dynamic plan (EAGLE-2, arXiv 2406.16858, section 4) expands the `width` best nodes of each of `depth` levels and
    keeps the best `num_nodes - 1` of all candidates. A static plan has fixed rank `paths` instead. Depth 0 is no draft.
    With a `sizing` of its own, width, depth and nodes are upper bounds (dynamic plans only).
    With a `lookup_depth`, a continuation looked up in the text, as deep as that, competes for the same nodes.
    With a `window` of so many columns, it is Lookahead decoding's: beside it are `width` n-grams of `depth` tokens.
    """

    width: int
    depth: int
    num_nodes: int
    paths: tuple[RankPath, ...] = ()
    sizing: Sizing = field(default=FixedSize(), compare=False, repr=False)
    lookup_depth: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        if min(self.width, self.depth) < (1 if self.depth else 0) or self.num_nodes < 1:
            raise ValueError(f"plan: width, depth and nodes must be positive, got {self!r}")
        if self.depth and not (self.paths or self.window) and self.num_nodes - 1 > self.num_candidates:
            raise ValueError(
                f"plan: {self.num_nodes} nodes asked for, but width {self.width} and depth {self.depth} "
                f"draft only {self.num_candidates} candidates and the root"
            )

    def __str__(self) -> str:
        """As `parse` reads it, but for static trees of no paper."""
        if self.window:
            return f"lookahead:{self.window}x{self.depth + 1}x{self.width}"
        if self.paths:
            named = (name for name, paths in STATIC_TREES.items() if set(paths) == set(self.paths))
            return next(named, f"static tree of {self.num_nodes} nodes")
        if self.width == 1 and self.num_nodes > self.depth:
            return f"chain:{self.depth}"
        if not self.depth:
            return "off"
        return f"tree:{self.width}x{self.depth}x{self.num_nodes}"

    @property
    def num_candidates(self) -> int:
        """Draft nodes that a dynamic plan scores: `width` at the first level, `width**2` at each further."""
        return self.width + (self.depth - 1) * self.width**2 if self.depth else 0

    @cached_property
    def inner_paths(self) -> frozenset[RankPath]:
        """A static plan's nodes that have children, the root `()` among them."""
        return frozenset(path[:-1] for path in self.paths)

    @property
    def num_inner(self) -> int:
        """Drafted nodes whose children are drafted too: what a draft network reads below the root."""
        return len(self.inner_paths) - 1 if self.paths else self.width * (self.depth - 1)

    @property
    def learns(self) -> bool:
        return False

    @property
    def largest(self) -> "TreePlan":
        return self

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> "TreePlan":
        return self

    def learn(self, report: "CycleReport") -> None:
        pass

    @property
    def is_chain(self) -> bool:
        """Whether the accepted nodes are always the first ones, so that a commit moves nothing (true of `off` too).

        A lookup may branch off anywhere.
        """
        return not self.paths and self.width <= 1 and not self.lookup_depth and not self.window

    @property
    def max_depth(self) -> int:
        """Bound of the nodes' depths, those of a window included."""
        return max(self.depth, self.lookup_depth, self.window and self.window + self.depth - 2)

    def at_most(self, width: int) -> "TreePlan":
        """This dynamic plan, or a narrower one for a draft that has fewer tokens."""
        if width >= self.width:
            return self
        narrow = TreePlan(width, self.depth, 1)
        return replace(narrow, num_nodes=min(self.num_nodes, 1 + narrow.num_candidates))

    def with_lookup(self) -> "TreePlan":
        """The same nodes, for which a looked-up continuation competes; it may be deeper than the draft."""
        return replace(self, lookup_depth=min(self.num_nodes - 1, LOOKUP_DEPTH))

    def cut_to(self, depth: int) -> "TreePlan":
        """The plan's first `depth` levels, for a drafter or a limit that has no more."""
        if self.depth <= depth:
            return self
        if self.window:
            return TreePlan.lookahead(self.window, depth + 1, self.width)
        if self.paths:
            return TreePlan.static(tuple(path for path in self.paths if len(path) <= depth))
        num_candidates = TreePlan(self.width, depth, 1).num_candidates
        return replace(self, depth=depth, num_nodes=min(self.num_nodes, 1 + num_candidates))

    @staticmethod
    def off() -> "TreePlan":
        """No speculation: the root alone."""
        return TreePlan(0, 0, 1)

    @staticmethod
    def chain(depth: int) -> "TreePlan":
        """One draft token a level."""
        return TreePlan(1, depth, depth + 1)

    @staticmethod
    def static(paths: tuple[RankPath, ...]) -> "TreePlan":
        """A tree of fixed rank paths (each path's prefix must be in the list too)."""
        known = {(), *paths}
        if not paths or len(known) != len(paths) + 1 or min(min(path, default=-1) for path in paths) < 0:
            raise ValueError("plan: expected one or more different paths of ranks from 0 on")
        for path in paths:
            if path[:-1] not in known:
                raise ValueError(f"plan: path {path} has no parent in the tree")
        ordered = tuple(sorted(paths, key=lambda path: (len(path), path)))
        width = max(max(path) for path in ordered) + 1
        return TreePlan(width, max(map(len, ordered)), len(ordered) + 1, ordered)

    @staticmethod
    def lookahead(window: int, ngram: int, num_ngrams: int) -> "TreePlan":
        """Lookahead decoding's W columns, n-grams of N tokens and G of them verified (arXiv 2402.02057, section 3).

        Raises:
            ValueError: no column, no n-gram, or n-grams of fewer than 2 tokens.
        """
        if window < 1 or num_ngrams < 1 or ngram < 2:
            raise ValueError(
                f"plan: expected lookahead:WxNxG with W and G from 1 on and N from 2 on, got "
                f"lookahead:{window}x{ngram}x{num_ngrams}"
            )
        return TreePlan(num_ngrams, ngram - 1, (window + num_ngrams) * (ngram - 1), window=window)

    @staticmethod
    def parse(text: str) -> "TreePlan":
        """Read `off`, `chain:DEPTH`, `tree:WIDTHxDEPTHxNODES`, `lookahead:WxNxG`, or the static tree of a paper.

        Those are `eagle1` and `medusa`.

        Raises:
            ValueError: any other text.
        """
        if text == "off":
            return TreePlan.off()
        if text in STATIC_TREES:
            return TreePlan.static(STATIC_TREES[text])
        if match := re.fullmatch(r"chain:(\d+)", text):
            return TreePlan.chain(int(match[1]))
        if match := re.fullmatch(r"tree:(\d+)x(\d+)x(\d+)", text):
            width, depth, num_nodes = map(int, match.groups())
            return TreePlan(width, depth, num_nodes)
        if match := re.fullmatch(r"lookahead:(\d+)x(\d+)x(\d+)", text):
            return TreePlan.lookahead(*map(int, match.groups()))
        raise ValueError(
            f"plan: expected off, chain:DEPTH, tree:WIDTHxDEPTHxNODES (such as tree:10x7x60), "
            f"lookahead:WxNxG (such as lookahead:15x5x15), {' or '.join(STATIC_TREES)}, got {text!r}"
        )

    @cached_property
    def levels(self) -> tuple[tuple[RankPath, ...], ...]:
        """A static plan's paths by depth, from depth 1 on."""
        return tuple(tuple(path for path in self.paths if len(path) == d) for d in range(1, self.depth + 1))
