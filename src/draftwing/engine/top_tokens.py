"""The best of a draft's tokens and their log-probabilities in one read of the logits, by two small Triton kernels.

torch takes some ten for log-softmax and top-k, on a device that has little to do between them.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from draftwing.target.attention import on_device

if TYPE_CHECKING:
    from draftwing.engine.noise import KeptNoise

BLOCK = 1024
"""Tokens of a program."""
MOST_WIDTH = 16
"""Tokens to find at most: they are found one after the other."""
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
    num_rows, num_blocks = batch_size * num_nodes, triton.cdiv(vocab_size, BLOCK)
    sums = logits.new_empty(num_rows, num_blocks, 2, dtype=torch.float32)
    values = logits.new_empty(num_rows, num_blocks, width, dtype=torch.float32)
    tokens = logits.new_empty(num_rows, num_blocks, width, dtype=torch.int32)
    best = logits.new_empty(batch_size, num_nodes, width, dtype=torch.float32)
    ids = logits.new_empty(batch_size, num_nodes, width, dtype=torch.int64)
    kept = (None, None, None) if noise is None else (noise.kept, noise.positions.contiguous(), noise.temperature)
    with on_device(logits.device):
        _search_block[(num_rows, num_blocks)](
            logits, *kept, target_ids, sums, values, tokens, num_nodes, vocab_size, 1 / error,
            *((0, 0) if noise is None else noise.kept.shape[1:]), WIDTH=width, BLOCK=BLOCK, num_warps=4,
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
