"""Products of few rows in Triton, laid out by row_layout.py, and the joins of their splits with residual and norm.

A row's bits do not depend on the rows beside it: they only fill columns of a tile. Weights are the tall operand, so
that few rows waste nothing.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from draftwing.target.row_layout import RowNorm, RowProduct

MOST_ROWS = 128
"""Rows of a tile at most."""
LEAST_SHARED_BYTES = 99 * 1024
"""Memory of a program on the smallest of the devices from compute capability 8 on."""


def multiply(x: torch.Tensor, product: RowProduct) -> torch.Tensor:
    """`x [R, in] @ weight.T + bias`, of a product that is not split."""
    assert product.tiles.splits == 1
    y = x.new_empty(len(x), len(product.weight))
    _launch(x, product, product.bias, y)
    return y


def multiply_split(x: torch.Tensor, product: RowProduct) -> torch.Tensor:
    """The splits' sums without the bias, in float32, `[splits, R, out]`."""
    sums = x.new_empty(product.tiles.splits, len(x), len(product.weight), dtype=torch.float32)
    _launch(x, product, None, sums)
    return sums


def multiply_gated(x: torch.Tensor, product: RowProduct) -> torch.Tensor:
    """`silu(gate) * up` `[R, out / 2]` of a product that is not split, and whose weight is gate's above up's."""
    assert product.tiles.splits == 1
    y = x.new_empty(len(x), len(product.weight) // 2)
    _launch(x, product, product.bias, y, is_gated=True)
    return y


def add_splits(
    residual: torch.Tensor, sums: torch.Tensor, bias: torch.Tensor | None, norm: RowNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual `[R, D]` plus the splits' sums and the bias, rounded once; and the norm of that."""
    y, normed = torch.empty_like(residual), torch.empty_like(residual)
    _launch_join(residual, sums, bias, norm, y, normed, num_splits=len(sums))
    return y, normed


def normalise(x: torch.Tensor, norm: RowNorm) -> torch.Tensor:
    """The norm of each row of `x [R, D]`."""
    normed = torch.empty_like(x)
    _launch_join(x, x, None, norm, x, normed, num_splits=0)
    return normed


def _launch(
    x: torch.Tensor, product: RowProduct, bias: torch.Tensor | None, y: torch.Tensor, is_gated: bool = False
) -> None:
    grid, sizes, options = tiling(x, product)
    _multiply[grid](
        x, product.weight, product.scale, bias, y, *sizes, HAS_BIAS=bias is not None, IS_GATED=is_gated, **options
    )


def tiling(x: torch.Tensor, product: RowProduct) -> tuple[tuple[int, int, int], tuple[int, ...], dict[str, Any]]:
    """How a product is launched: its grid (blocks of rows, blocks of outputs, splits), sizes, and constants."""
    tiles, (num_outputs, num_inputs), num_rows = product.tiles, product.weight.shape, len(x)
    block_rows = min(MOST_ROWS, max(16, triton.next_power_of_2(num_rows)))
    split_length = tiles.split_length(num_inputs)
    stage_bytes = (tiles.outputs + block_rows) * tiles.inputs * x.element_size()
    options = {
        "HAS_SCALE": product.scale is not None,
        "IS_EVEN": num_inputs == split_length * tiles.splits and num_outputs % tiles.outputs == 0,
        "BLOCK_OUTPUTS": tiles.outputs,
        "BLOCK_ROWS": block_rows,
        "BLOCK_INPUTS": tiles.inputs,
        "num_warps": max(tiles.warps, tiles.outputs * block_rows // 2048),
        "num_stages": max(1, min(tiles.stages, shared_bytes(x.device) // stage_bytes)),
        "enable_fp_fusion": False,  # tiles of all heights, compiled apart, must round alike
    }
    grid = triton.cdiv(num_rows, block_rows), triton.cdiv(num_outputs, tiles.outputs), tiles.splits
    return grid, (num_rows, num_outputs, num_inputs, split_length), options


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may use."""
    if device.type != "cuda":
        return LEAST_SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x, weight, scale, bias, y, num_rows, num_outputs, num_inputs, split_length,
    HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, HAS_SCALE: tl.constexpr, IS_EVEN: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    """A tile of outputs x rows over one split of the inputs."""
    block, split = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i = tl.arange(0, BLOCK_OUTPUTS)
    HALF: tl.constexpr = BLOCK_OUTPUTS // 2
    if IS_GATED:  # the first half of a tile is gate's, the second up's
        inner = block * HALF + i % HALF
        output = inner + (i // HALF) * (num_outputs // 2)
        is_output = inner < num_outputs // 2
    else:
        output = block * BLOCK_OUTPUTS + i
        is_output = output < num_outputs
    is_row = row < num_rows
    total = sum_tile(
        x, weight, scale, bias, row, is_row, output, is_output, split * split_length, num_inputs, split_length,
        HAS_SCALE, HAS_BIAS, IS_EVEN, BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_INPUTS,
    )  # fmt: skip
    dtype: tl.constexpr = y.dtype.element_ty
    if IS_GATED:
        gate, up = halves(total.to(dtype).to(tl.float32), HALF, BLOCK_ROWS)
        gated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        j = block * HALF + tl.arange(0, HALF)
        place = row[None, :] * (num_outputs // 2) + j[:, None]
        tl.store(y + place, gated.to(dtype), mask=is_row[None, :] & (j < num_outputs // 2)[:, None])
    else:
        place = (split.to(tl.int64) * num_rows + row)[None, :] * num_outputs + output[:, None]
        tl.store(y + place, total.to(dtype), mask=is_row[None, :] & is_output[:, None])


@triton.jit
def sum_tile(
    x, weight, scale, bias, row, is_row, output, is_output, start, num_inputs, split_length,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, IS_EVEN: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    """The sums `[outputs, rows]` of a tile over the inputs of a split, in float32, with their scale and bias."""
    step = tl.arange(0, BLOCK_INPUTS)
    weights_at = weight + output[:, None].to(tl.int64) * num_inputs + (start + step)[None, :]
    x_at = x + row[None, :] * num_inputs + (start + step)[:, None]
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_ROWS], tl.float32)
    for k in range(0, split_length, BLOCK_INPUTS):
        if IS_EVEN:
            weights = tl.load(weights_at, eviction_policy="evict_first")
            inputs = tl.load(x_at, mask=is_row[None, :], other=0.0)
        else:
            is_input = start + k + step < num_inputs
            weights = tl.load(weights_at, mask=is_output[:, None] & is_input[None, :], other=0.0)
            inputs = tl.load(x_at, mask=is_row[None, :] & is_input[:, None], other=0.0)
        total = tl.dot(weights.to(inputs.dtype), inputs, total, input_precision="ieee")
        weights_at += BLOCK_INPUTS
        x_at += BLOCK_INPUTS
    if HAS_SCALE:
        total *= tl.load(scale + output, mask=is_output, other=0.0)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def halves(tile, HALF: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The upper and the lower half of a tile `[2 * HALF, rows]`."""
    return tl.split(tl.permute(tl.reshape(tile, (2, HALF, BLOCK_ROWS)), (1, 2, 0)))


def _launch_join(
    residual: torch.Tensor,
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    norm: RowNorm,
    y: torch.Tensor,
    normed: torch.Tensor,
    num_splits: int,
) -> None:
    num_rows, width = y.shape
    block = triton.next_power_of_2(width)
    _join_splits[(num_rows,)](
        residual, sums, bias, norm.weight, y, normed, num_rows, width, norm.eps,
        SPLITS=num_splits, HAS_BIAS=bias is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "eps"])
def _join_splits(
    residual, sums, bias, weight, y, normed, num_rows, width, eps,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's splits in their order, bias and residual, rounded; and the norm of that. Without splits the norm."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < width
    rounded = tl.load(residual + row * width + i, mask=mask, other=0.0)
    if SPLITS > 0:
        total = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(sums + (split * num_rows + row) * width + i, mask=mask, other=0.0)
        if HAS_BIAS:
            total += tl.load(bias + i, mask=mask, other=0.0).to(tl.float32)
        rounded = (total + rounded.to(tl.float32)).to(y.dtype.element_ty)
        tl.store(y + row * width + i, rounded, mask=mask)
    wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    scaled = (wide * scale).to(normed.dtype.element_ty).to(tl.float32)
    scaled *= tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + row * width + i, scaled.to(normed.dtype.element_ty), mask=mask)
