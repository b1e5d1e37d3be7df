"""Levels of a dynamic tree, each by one small Triton kernel: the exact twin of growth.Levels, which takes ten steps.

Another one keeps the drafted nodes' visible slots. Neither has anything to round but sums of two numbers.
"""

import torch
import triton
import triton.language as tl

from draftwing.engine.tree import Candidates, Frontier
from draftwing.engine.tree_plan import TreePlan
from draftwing.target.attention import on_device

MOST_WIDTH = 32
"""Nodes of a level at most: all of their children are compared with each other."""
CHUNK = 16
"""Children that the others are compared with at once."""
BLOCK = 1024
"""Slots of a program."""


class FusedLevels:
    """As growth.Levels, for a plan whose trees have all of its levels; one row of candidates takes all of them.

    `target_ids [Vd]`: those of the draft's tokens, None if they are the same. `positions [B, 1]`: the roots'.
    """

    frontier: Frontier | None = None

    def __init__(self, plan: TreePlan, target_ids: torch.Tensor | None, positions: torch.Tensor) -> None:
        self._plan, self._target_ids, self.num_levels = plan, target_ids, 0
        shape = len(positions), plan.num_candidates
        ids = [positions.new_empty(shape) for _ in range(3)]
        numbers = [positions.new_empty(shape, dtype=torch.float32) for _ in range(2)]
        self._candidates = Candidates(ids[0], *numbers, *ids[1:])

    def candidates(self) -> Candidates:
        return self._candidates

    def add(self, log_probs: torch.Tensor, draft_ids: torch.Tensor) -> Frontier | None:
        """Add the frontier's children `[B, P, K]`; returns the best K of all, or None at the end."""
        (num_rows, num_parents, width), depth = log_probs.shape, self.num_levels + 1
        first = 0 if depth == 1 else width + (depth - 2) * width**2
        bins, is_last = self._plan.sizing.bins(depth), depth == self._plan.depth
        best = None if is_last else _empty_frontier(self._candidates, width)
        into = (None,) * 4 if best is None else vars(best).values()
        before = (None, None) if self.frontier is None else (self.frontier.scores, self.frontier.numbers)
        with on_device(log_probs.device):
            _grow_level[(num_rows,)](
                log_probs.contiguous(), draft_ids.contiguous(), self._target_ids, *before,
                *((None, None, 0.0) if bins is None else (bins.edges, bins.added, bins.most)),
                *vars(self._candidates).values(), *into, first, depth, self._plan.num_candidates,
                NUM_EDGES=0 if bins is None else len(bins.edges), NUM_PARENTS=num_parents, WIDTH=width,
                SIZE=max(CHUNK, triton.next_power_of_2(num_parents * width)), CHUNK=CHUNK,
                num_warps=4 if num_parents * width <= 256 else 16,
            )  # fmt: skip
        self.num_levels = depth
        return best


def _empty_frontier(like: Candidates, width: int) -> Frontier:
    shape = len(like.tokens), width
    tokens, numbers, parents = (like.tokens.new_empty(shape) for _ in range(3))
    return Frontier(tokens, like.scores.new_empty(shape), numbers, parents)


def inherit_slots(visible: torch.Tensor, parent: torch.Tensor, lengths: torch.Tensor, first: int) -> torch.Tensor:
    """What a level's nodes see, `[B, K, S]` bool: what their parents do, among `visible [B, P, S]`, and themselves.

    `parent [B, K]` are indices; node k lies in slot `lengths [B, 1] + first + k`, or the last.
    """
    (num_rows, num_nodes), num_slots = parent.shape, visible.shape[-1]
    seen = visible.new_empty(num_rows, num_nodes, num_slots)
    with on_device(visible.device):
        _inherit[(num_rows * num_nodes, triton.cdiv(num_slots, BLOCK))](
            visible.contiguous().view(torch.uint8), parent.contiguous(), lengths, seen.view(torch.uint8),
            first, num_nodes, visible.shape[1], num_slots, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return seen


@triton.jit
def _score(
    log_probs, parent_scores, edges, added, most, row, i,
    NUM_EDGES: tl.constexpr, NUM_PARENTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The scores of a row's children `i`, -inf behind the last."""
    is_child = i < NUM_PARENTS * WIDTH
    log_prob = tl.load(log_probs + row * NUM_PARENTS * WIDTH + i, mask=is_child, other=-float("inf"))
    score = log_prob
    if NUM_EDGES > 0:
        place = tl.zeros_like(i)
        for edge in tl.static_range(NUM_EDGES):
            place += (log_prob > tl.load(edges + edge)).to(tl.int32)
        score = log_prob + tl.load(added + place)
        score = tl.where(score > most, most, score)  # tl.minimum would make a number of what is none
    if parent_scores is not None:
        score += tl.load(parent_scores + row * NUM_PARENTS + i // WIDTH, mask=is_child, other=0.0)
    return score


@triton.jit
def _key(score):
    """What scores are ordered by: as torch sorts, what is no number counts as the highest."""
    return tl.where(score == score, score, float("inf"))


@triton.jit(do_not_specialize=["first", "depth", "num_candidates"])
def _grow_level(
    log_probs, draft_ids, target_ids, parent_scores, parent_numbers, edges, added, most,
    tokens, scores, own_log_probs, parents, depths,
    best_tokens, best_scores, best_numbers, best_parents,
    first, depth, num_candidates,
    NUM_EDGES: tl.constexpr, NUM_PARENTS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row: its children's candidates, and the best of them by how many are better."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    is_child, place = i < NUM_PARENTS * WIDTH, row * NUM_PARENTS * WIDTH + i
    token = tl.load(draft_ids + place, mask=is_child, other=0)
    if target_ids is not None:
        token = tl.load(target_ids + token, mask=is_child, other=0)
    number = tl.full((SIZE,), -1, tl.int64)
    if parent_numbers is not None:
        number = tl.load(parent_numbers + row * NUM_PARENTS + i // WIDTH, mask=is_child, other=0)
    score = _score(log_probs, parent_scores, edges, added, most, row, i, NUM_EDGES, NUM_PARENTS, WIDTH)
    goal = row * num_candidates + first + i
    tl.store(tokens + goal, token, mask=is_child)
    tl.store(scores + goal, score, mask=is_child)
    tl.store(own_log_probs + goal, tl.load(log_probs + place, mask=is_child, other=0.0), mask=is_child)
    tl.store(parents + goal, number, mask=is_child)
    tl.store(depths + goal, tl.zeros_like(number) + depth, mask=is_child)
    if best_tokens is not None:
        key, num_better = _key(score), tl.zeros((SIZE,), tl.int32)
        for start in range(0, NUM_PARENTS * WIDTH, CHUNK):
            j = start + tl.arange(0, CHUNK)
            other = _score(log_probs, parent_scores, edges, added, most, row, j, NUM_EDGES, NUM_PARENTS, WIDTH)
            other = _key(other)
            is_equal = (other[None, :] == key[:, None]) & (j[None, :] < i[:, None])
            num_better += tl.sum(((other[None, :] > key[:, None]) | is_equal).to(tl.int32), 1)
        is_best, goal = is_child & (num_better < WIDTH), row * WIDTH + num_better
        tl.store(best_tokens + goal, token, mask=is_best)
        tl.store(best_scores + goal, score, mask=is_best)
        tl.store(best_numbers + goal, (first + i).to(tl.int64), mask=is_best)
        tl.store(best_parents + goal, (i // WIDTH).to(tl.int64), mask=is_best)


@triton.jit(do_not_specialize=["first", "num_nodes", "num_parents", "num_slots"])
def _inherit(visible, parent, lengths, seen, first, num_nodes, num_parents, num_slots, BLOCK: tl.constexpr):
    """A block of one node's slots."""
    node, slot = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, is_slot = node // num_nodes, slot < num_slots
    source = row * num_parents + tl.load(parent + node)
    value = tl.load(visible + source * num_slots + slot, mask=is_slot, other=0)
    own = tl.minimum(tl.load(lengths + row) + first + node % num_nodes, num_slots - 1)
    tl.store(seen + node * num_slots + slot, tl.where(slot == own, 1, value).to(tl.uint8), mask=is_slot)
