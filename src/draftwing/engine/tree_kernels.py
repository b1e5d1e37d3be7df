"""The best candidates of a tree by two Triton kernels: the exact twin of best_subtree, which takes fifteen steps."""

import torch
import triton
import triton.language as tl

from draftwing.engine.tree import Candidates, DraftTree
from draftwing.target.attention import on_device

MOST_CANDIDATES = 2048
"""Of a row: a program keeps them all at hand."""
CHUNK = 64
"""Candidates of a program, and of those that they are compared with at once."""


def best_nodes(root: torch.Tensor, candidates: Candidates, num_nodes: int, max_depth: int) -> DraftTree:
    """As tree.best_subtree."""
    num_rows, num_candidates = candidates.scores.shape
    parts = [part.contiguous() for part in vars(candidates).values()]
    ranks = root.new_empty(num_rows, num_candidates, dtype=torch.int32)
    tokens, parents, depths = (root.new_empty(num_rows, num_nodes) for _ in range(3))
    scores, log_probs = (candidates.scores.new_empty(num_rows, num_nodes) for _ in range(2))
    valid = root.new_empty(num_rows, num_nodes, dtype=torch.bool)
    with on_device(root.device):
        _rank[(num_rows, triton.cdiv(num_candidates, CHUNK))](parts[1], ranks, num_candidates, CHUNK=CHUNK, num_warps=4)
        _keep[(num_rows,)](
            root.contiguous(), ranks, *parts, tokens, parents, depths, valid.view(torch.uint8), scores, log_probs,
            num_candidates, num_nodes, SIZE=triton.next_power_of_2(num_candidates), num_warps=4,
        )  # fmt: skip
    return DraftTree(tokens, parents, depths, valid, scores, log_probs, max_depth)


@triton.jit
def _known(scores, row, i, num_candidates):
    """The scores of a row's candidates `i`; those that are no number count as -inf."""
    score = tl.load(scores + row * num_candidates + i, mask=i < num_candidates, other=-float("inf"))
    return tl.where(score == score, score, -float("inf"))


@triton.jit(do_not_specialize=["num_candidates"])
def _rank(scores, ranks, num_candidates, CHUNK: tl.constexpr):
    """How many of a row's candidates come before some of them: those of a higher score, or the same and earlier."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    score = _known(scores, row, i, num_candidates)
    rank = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, num_candidates, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = _known(scores, row, j, num_candidates)
        is_equal = (other[None, :] == score[:, None]) & (j[None, :] < i[:, None])
        rank += tl.sum(((other[None, :] > score[:, None]) | is_equal).to(tl.int32), 1)
    tl.store(ranks + row * num_candidates + i, rank, mask=i < num_candidates)


@triton.jit(do_not_specialize=["num_candidates", "num_nodes"])
def _keep(
    root, ranks, tokens, scores, log_probs, parents, depths,
    node_tokens, node_parents, node_depths, node_valid, node_scores, node_log_probs,
    num_candidates, num_nodes, SIZE: tl.constexpr,
):  # fmt: skip
    """One row: the root, then the chosen candidates in their order, numbered anew."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    is_there, place = i < num_candidates, row * num_candidates + i
    is_chosen = is_there & (tl.load(ranks + place, mask=is_there, other=0) < num_nodes - 1)
    number = tl.cumsum(is_chosen.to(tl.int32), 0)
    parent = tl.load(parents + place, mask=is_there, other=-1).to(tl.int32)
    parent_number = tl.gather(tl.where(is_chosen, number, 0), tl.maximum(parent, 0), 0)
    parent_number = tl.where(parent < 0, 0, parent_number)
    score = _known(scores, row, i, num_candidates)
    is_orphan = (parent >= 0) & (parent_number == 0)  # its parent, which rounding has put below it, fell out
    goal = row * num_nodes + number
    tl.store(node_tokens + goal, tl.load(tokens + place, mask=is_there, other=0), mask=is_chosen)
    tl.store(node_parents + goal, parent_number.to(tl.int64), mask=is_chosen)
    tl.store(node_depths + goal, tl.load(depths + place, mask=is_there, other=0), mask=is_chosen)
    tl.store(node_valid + goal, ((tl.abs(score) < float("inf")) & (is_orphan == 0)).to(tl.uint8), mask=is_chosen)
    tl.store(node_scores + goal, score, mask=is_chosen)
    tl.store(node_log_probs + goal, tl.load(log_probs + place, mask=is_there, other=0.0), mask=is_chosen)
    goal = row * num_nodes
    tl.store(node_tokens + goal, tl.load(root + row))
    tl.store(node_parents + goal, 0)
    tl.store(node_depths + goal, 0)
    tl.store(node_valid + goal, 1)
    tl.store(node_scores + goal, 0.0)
    tl.store(node_log_probs + goal, 0.0)
