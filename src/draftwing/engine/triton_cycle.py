"""What a cycle does beside its networks by small Triton kernels, on a GPU, where torch takes ten for each.

They are the twins of torch's steps in the modules that choose them, as those in C are on a CPU: exact ones, but for the
rounding of `top_tokens`, which only ranks drafts.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from draftwing.engine.tree import Candidates, DraftTree, Frontier
from draftwing.target.attention import on_device

if TYPE_CHECKING:
    from draftwing.engine.noise import KeptNoise
    from draftwing.engine.tree_plan import Bins

FOUND_BLOCK = 1024
"""Tokens of a program that finds a draft's best."""
MOST_FOUND = 16
"""Tokens to find at most: they are found one after the other."""
CHOICE_BLOCK = 2048
"""Tokens of a program that finds the target's own."""
MOST_WIDTH = 32
"""Nodes of a level at most: all of their children are compared with each other."""
LEVEL_CHUNK = 16
"""Children that the others are compared with at once."""
SLOTS_BLOCK = 1024
"""Slots of a program."""
MOST_CANDIDATES = 2048
"""Of a row: a program keeps them all at hand."""
NODES_CHUNK = 64
"""Candidates of a program, and of those that they are compared with at once."""
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""Stands for -inf and for what is no number."""


def top_tokens(
    logits: torch.Tensor,
    width: int,
    noise: "KeptNoise | None" = None,
    target_ids: torch.Tensor | None = None,
    error: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` highest of a draft's log-probabilities `[B, K, V]`, and their ids, `[B, K, width]`, the best first.

    In rows of a temperature T above 0 they are those of `(logits + T noise) / error` instead, with the noise of the
    `target_ids [V]` at one position a row. Ties go to the lowest id.
    """
    (batch_size, num_nodes, vocab_size), logits = logits.shape, logits.contiguous()
    num_rows, num_blocks = batch_size * num_nodes, triton.cdiv(vocab_size, FOUND_BLOCK)
    sums = logits.new_empty(num_rows, num_blocks, 2, dtype=torch.float32)
    values = logits.new_empty(num_rows, num_blocks, width, dtype=torch.float32)
    tokens = logits.new_empty(num_rows, num_blocks, width, dtype=torch.int32)
    best = logits.new_empty(batch_size, num_nodes, width, dtype=torch.float32)
    ids = logits.new_empty(batch_size, num_nodes, width, dtype=torch.int64)
    kept = (None, None, None) if noise is None else (noise.kept, noise.positions.contiguous(), noise.temperature)
    with on_device(logits.device):
        _search_block[(num_rows, num_blocks)](
            logits, *kept, target_ids, sums, values, tokens, num_nodes, vocab_size, 1 / error,
            *((0, 0) if noise is None else noise.kept.shape[1:]), WIDTH=width, BLOCK=FOUND_BLOCK, num_warps=4,
        )  # fmt: skip
        _join_blocks[(num_rows,)](
            sums, values, tokens, best, ids, num_blocks, WIDTH=width,
            BLOCKS=triton.next_power_of_2(num_blocks), FOUND=triton.next_power_of_2(num_blocks * width), num_warps=4,
        )  # fmt: skip
    return best, ids


@triton.jit(do_not_specialize=["num_nodes"])
def _search_block(
    logits, kept, positions, temperature, target_ids, sums, values, tokens,
    num_nodes, vocab_size, scale, num_kept, num_target_ids, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row: its highest value, the sum of exponentials relative to that, and its best tokens."""
    row, block = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    is_token = token < vocab_size
    value = tl.load(logits + row.to(tl.int64) * vocab_size + token, mask=is_token, other=0.0).to(tl.float32)
    if kept is not None:
        b = (row // num_nodes).to(tl.int64)
        row_temperature = tl.load(temperature + b)
        if row_temperature > 0:
            place = (b * num_kept + tl.load(positions + b) % num_kept) * num_target_ids
            ids = token.to(tl.int64)
            if target_ids is not None:
                ids = tl.load(target_ids + token, mask=is_token, other=0)
            noise = tl.load(kept + place + ids, mask=is_token, other=0.0)
            value = value * scale + noise * (row_temperature * scale)
    value = tl.where(is_token, value, -float("inf"))
    # What is ruled out, or no number, comes last, but before what has been found, so that no token is found twice.
    known = tl.where(is_token, tl.where(value > LOWEST, value, LOWEST), -float("inf"))
    place = row.to(tl.int64) * tl.num_programs(1) + block
    highest = tl.max(known, 0)
    tl.store(sums + place * 2, highest)
    tl.store(sums + place * 2 + 1, tl.sum(tl.exp(value - highest), 0))
    for rank in tl.static_range(WIDTH):
        found = tl.argmax(known, 0)
        tl.store(values + place * WIDTH + rank, tl.max(known, 0))
        tl.store(tokens + place * WIDTH + rank, block * BLOCK + found)
        known = tl.where(token == block * BLOCK + found, -float("inf"), known)


@triton.jit
def _join_blocks(
    sums, values, tokens, best, ids, num_blocks, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, FOUND: tl.constexpr
):  # fmt: skip
    """One row: the logarithm of its sum, and the best of its blocks' tokens."""
    row = tl.program_id(0).to(tl.int64)
    block, i = tl.arange(0, BLOCKS), tl.arange(0, FOUND)
    place, is_block = (row * num_blocks + block) * 2, block < num_blocks
    highest = tl.load(sums + place, mask=is_block, other=-float("inf"))
    total = tl.load(sums + place + 1, mask=is_block, other=0.0)
    top = tl.max(highest, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    value = tl.load(values + row * num_blocks * WIDTH + i, mask=i < num_blocks * WIDTH, other=-float("inf"))
    for rank in tl.static_range(WIDTH):
        found = tl.argmax(value, 0)
        score = tl.max(value, 0)
        tl.store(best + row * WIDTH + rank, tl.where(score > LOWEST, score, -float("inf")) - log_sum)
        tl.store(ids + row * WIDTH + rank, tl.load(tokens + row * num_blocks * WIDTH + found).to(tl.int64))
        value = tl.where(i == found, -float("inf"), value)


def choose_tokens(logits: torch.Tensor, noise: "KeptNoise | None") -> torch.Tensor:
    """The target's tokens `[B, N]` of rows `logits [B, N, V]`; without noise the likeliest. The lowest id wins.

    They are those of torch's `(logits.float() / T + noise).argmax(-1)`: the same sums and quotients, each rounded once.
    """
    (batch_size, num_nodes, vocab_size), logits = logits.shape, logits.contiguous()
    num_rows, num_blocks = batch_size * num_nodes, triton.cdiv(vocab_size, CHOICE_BLOCK)
    values = logits.new_empty(num_rows, num_blocks, dtype=torch.float32)
    tokens = logits.new_empty(num_rows, num_blocks, dtype=torch.int64)
    chosen = logits.new_empty(batch_size, num_nodes, dtype=torch.int64)
    kept = (None, None, None) if noise is None else (noise.kept, noise.positions.contiguous(), noise.temperature)
    with on_device(logits.device):
        _choose_in_block[(num_rows, num_blocks)](
            logits, *kept, values, tokens,
            num_nodes, vocab_size, 0 if noise is None else noise.kept.shape[1], BLOCK=CHOICE_BLOCK, num_warps=4,
        )  # fmt: skip
        _choose_block[(num_rows,)](
            values, tokens, chosen, num_blocks, BLOCKS=triton.next_power_of_2(num_blocks), num_warps=1
        )
    return chosen


@triton.jit(do_not_specialize=["num_nodes"])
def _choose_in_block(
    logits, kept, positions, temperature, values, tokens, num_nodes, vocab_size, num_kept, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of one row: its highest value and the first token that has it."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    is_token, b = token < vocab_size, row // num_nodes
    value = tl.load(logits + row * vocab_size + token, mask=is_token, other=0.0).to(tl.float32)
    if kept is not None:
        row_temperature = tl.load(temperature + b)
        if row_temperature > 0:
            place = (b * num_kept + tl.load(positions + row) % num_kept) * vocab_size
            noise = tl.load(kept + place + token, mask=is_token, other=0.0)
            value = tl.div_rn(value, row_temperature) + noise
    value = tl.where(value == value, value, float("inf"))  # argmax takes what is no number for the highest
    value = tl.where(is_token, value, -float("inf"))
    place = row * tl.num_programs(1) + block
    tl.store(values + place, tl.max(value, 0))
    tl.store(tokens + place, (block * BLOCK + tl.argmax(value, 0)).to(tl.int64))


@triton.jit
def _choose_block(values, tokens, chosen, num_blocks, BLOCKS: tl.constexpr):
    """One row: the token of the first block that has its highest value."""
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    value = tl.load(values + row * num_blocks + block, mask=block < num_blocks, other=-float("inf"))
    tl.store(chosen + row, tl.load(tokens + row * num_blocks + tl.argmax(value, 0)))


def grow_level(
    log_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    target_ids: torch.Tensor | None,
    before: Frontier | None,
    bins: "Bins | None",
    into: Candidates,
    best: Frontier | None,
    first: int,
    depth: int,
) -> None:
    """Write a level, the children `log_probs [B, P, K]` of the frontier `before`, None for the root's, `into` the
    candidates from number `first` on, and the best K children into `best`; as growth.Levels."""
    num_rows, num_parents, width = log_probs.shape
    with on_device(log_probs.device):
        _grow_level[(num_rows,)](
            log_probs.contiguous(), draft_ids.contiguous(), target_ids,
            *((None, None) if before is None else (before.scores.contiguous(), before.numbers.contiguous())),
            *((None, None, 0.0) if bins is None else (bins.edges, bins.added, bins.most)),
            *vars(into).values(), *((None,) * 4 if best is None else vars(best).values()),
            first, depth, into.tokens.shape[1],
            NUM_EDGES=0 if bins is None else len(bins.edges), NUM_PARENTS=num_parents, WIDTH=width,
            SIZE=max(LEVEL_CHUNK, triton.next_power_of_2(num_parents * width)), CHUNK=LEVEL_CHUNK,
            num_warps=4 if num_parents * width <= 256 else 16,
        )  # fmt: skip


def inherit_slots(visible: torch.Tensor, parent: torch.Tensor, lengths: torch.Tensor, first: int) -> torch.Tensor:
    """What a level's nodes see, `[B, K, S]` bool: what their parents do, among `visible [B, P, S]`, and themselves.

    `parent [B, K]` are indices; node k lies in slot `lengths [B, 1] + first + k`, or the last.
    """
    (num_rows, num_nodes), num_slots = parent.shape, visible.shape[-1]
    seen = visible.new_empty(num_rows, num_nodes, num_slots)
    with on_device(visible.device):
        _inherit[(num_rows * num_nodes, triton.cdiv(num_slots, SLOTS_BLOCK))](
            visible.contiguous().view(torch.uint8), parent.contiguous(), lengths, seen.view(torch.uint8),
            first, num_nodes, visible.shape[1], num_slots, BLOCK=SLOTS_BLOCK, num_warps=4,
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


def best_nodes(root: torch.Tensor, candidates: Candidates, num_nodes: int, max_depth: int) -> DraftTree:
    """As tree.best_subtree."""
    num_rows, num_candidates = candidates.scores.shape
    parts = [part.contiguous() for part in vars(candidates).values()]
    ranks = root.new_empty(num_rows, num_candidates, dtype=torch.int32)
    tokens, parents, depths = (root.new_empty(num_rows, num_nodes) for _ in range(3))
    scores, log_probs = (candidates.scores.new_empty(num_rows, num_nodes) for _ in range(2))
    valid = root.new_empty(num_rows, num_nodes, dtype=torch.bool)
    num_chunks = triton.cdiv(num_candidates, NODES_CHUNK)
    with on_device(root.device):
        _rank[(num_rows, num_chunks)](parts[1], ranks, num_candidates, CHUNK=NODES_CHUNK, num_warps=4)
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
