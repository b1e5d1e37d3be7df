"""The target's own tokens in rows that draw, in one read of the logits, by two small Triton kernels.

They are those of torch's `(logits.float() / T + noise).argmax(-1)`: the same sums and quotients, each rounded once.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from draftwing.target.attention import on_device

if TYPE_CHECKING:
    from draftwing.engine.noise import KeptNoise

BLOCK = 2048
"""Tokens of a program."""


def choose_tokens(logits: torch.Tensor, noise: "KeptNoise") -> torch.Tensor:
    """The tokens `[B, N]` of rows `logits [B, N, V]`; where the temperature is 0 the likeliest. The lowest id wins."""
    (batch_size, num_nodes, vocab_size), logits = logits.shape, logits.contiguous()
    num_rows, num_blocks = batch_size * num_nodes, triton.cdiv(vocab_size, BLOCK)
    values = logits.new_empty(num_rows, num_blocks, dtype=torch.float32)
    tokens = logits.new_empty(num_rows, num_blocks, dtype=torch.int64)
    chosen = logits.new_empty(batch_size, num_nodes, dtype=torch.int64)
    with on_device(logits.device):
        _choose_in_block[(num_rows, num_blocks)](
            logits, noise.kept, noise.positions.contiguous(), noise.temperature, values, tokens,
            num_nodes, vocab_size, noise.kept.shape[1], BLOCK=BLOCK, num_warps=4,
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
