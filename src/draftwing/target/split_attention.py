"""Attention of few queries to a long context on a GPU: a Triton kernel that splits the context over the device.

With one row and a handful of key/value heads, kernels that give each head and query block to one processor leave most
of the device idle. Here each part of the context is a program of its own; a second kernel joins the parts by their
log-sum-exp ("flash decoding"). The mask is any, and the grouped query heads of a key/value head are read with it once.
"""

import torch
import triton
import triton.language as tl

from draftwing.target.attention import current_device

BLOCK_QUERIES, BLOCK_KEYS = 32, 64
PROGRAMS = 264
"""Programs to aim at: two for each processor of the largest devices."""
SIZES = ["num_nodes", "num_rows", "num_keys", "num_parts", "part_length", "mask_b", "mask_n"]
"""What differs from plan to plan: one compiled kernel serves all."""


def split_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention in float32, of queries `[B, Hq, N, dim]` to keys and values `[B, Hk, S, dim]` (any strides).

    mask `[B, 1, N, S]` is bool. A query that sees nothing gives zeros. Returns `[B, Hq, N, value_dim]` in the queries'
    dtype; in memory a node's heads lie together, as the product that follows wants them.
    """
    batch_size, num_heads, num_nodes, key_dim = queries.shape
    num_key_heads, num_keys, value_dim = keys.shape[1], keys.shape[2], values.shape[-1]
    # The query heads of one key/value head become further rows of it: row r is node r % N of its head r // N.
    num_rows = num_heads // num_key_heads * num_nodes
    row_blocks = triton.cdiv(num_rows, BLOCK_QUERIES)
    num_parts = PROGRAMS // (batch_size * num_key_heads * row_blocks)
    num_parts = max(1, min(num_parts, triton.cdiv(num_keys, 2 * BLOCK_KEYS)))
    part_length = triton.cdiv(triton.cdiv(num_keys, num_parts), BLOCK_KEYS) * BLOCK_KEYS
    num_parts = triton.cdiv(num_keys, part_length)
    parts = queries.new_empty(batch_size, num_key_heads, num_parts, num_rows, value_dim, dtype=torch.float32)
    log_sums = queries.new_empty(batch_size, num_key_heads, num_parts, num_rows, dtype=torch.float32)
    output = queries.new_empty(batch_size, num_nodes, num_heads, value_dim)
    heads = batch_size * num_key_heads
    # Triton launches on the current device.
    with current_device(queries):
        _attend_part[(row_blocks, num_parts, heads)](
            queries, keys, values, mask, parts, log_sums,
            *queries.stride(), *keys.stride(), *values.stride(), mask.stride(0), mask.stride(2), mask.stride(3),
            num_key_heads, num_nodes, num_rows, num_keys, num_parts, part_length,
            key_dim**-0.5 if scale is None else scale,
            KEY_DIM=key_dim, VALUE_DIM=value_dim,
            KEY_WIDTH=max(16, triton.next_power_of_2(key_dim)), VALUE_WIDTH=max(16, triton.next_power_of_2(value_dim)),
            BLOCK_ROWS=BLOCK_QUERIES, BLOCK_KEYS=BLOCK_KEYS, num_warps=4,
        )  # fmt: skip
        _join_parts[(num_rows, heads)](
            parts, log_sums, output, num_key_heads, num_nodes, num_rows, num_parts,
            VALUE_DIM=value_dim, VALUE_WIDTH=triton.next_power_of_2(value_dim),
            PARTS=triton.next_power_of_2(num_parts), num_warps=4,
        )  # fmt: skip
    return output.transpose(1, 2)


@triton.jit(do_not_specialize=SIZES)
def _attend_part(
    queries, keys, values, mask, parts, log_sums,
    query_b, query_h, query_n, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,
    mask_b, mask_n, mask_s,
    num_key_heads, num_nodes, num_rows, num_keys, num_parts, part_length, scale,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One block of rows of one key/value head against one part of the context: softmax(q k) v and its log-sum-exp."""
    part, head = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b, h = (head // num_key_heads).to(tl.int64), (head % num_key_heads).to(tl.int64)
    d, e, step = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH), tl.arange(0, BLOCK_KEYS)
    is_row = row < num_rows
    node, query_head = row % num_nodes, h * (num_rows // num_nodes) + row // num_nodes
    query = tl.load(
        queries + b * query_b + query_head[:, None] * query_h + node[:, None] * query_n + d[None, :] * query_d,
        mask=is_row[:, None] & (d[None, :] < KEY_DIM),
        other=0.0,
    )
    best = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    attended = tl.zeros([BLOCK_ROWS, VALUE_WIDTH], tl.float32)
    for start in range(part * part_length, tl.minimum((part + 1) * part_length, num_keys), BLOCK_KEYS):
        slot = (start + step).to(tl.int64)
        is_slot = slot < num_keys
        key = tl.load(
            keys + b * key_b + h * key_h + slot[None, :] * key_s + d[:, None] * key_d,
            mask=is_slot[None, :] & (d[:, None] < KEY_DIM),
            other=0.0,
        )
        visible = tl.load(
            mask + b * mask_b + node[:, None] * mask_n + slot[None, :] * mask_s,
            mask=is_row[:, None] & is_slot[None, :],
            other=0,
        )
        score = tl.dot(query, key, input_precision="ieee") * scale
        score = tl.where(visible != 0, score, -float("inf"))
        new_best = tl.maximum(best, tl.max(score, 1))
        finite = tl.where(new_best == -float("inf"), 0.0, new_best)  # a row that has seen nothing yet
        weight = tl.exp(score - finite[:, None])
        shrink = tl.exp(best - finite)
        value = tl.load(
            values + b * value_b + h * value_h + slot[:, None] * value_s + e[None, :] * value_d,
            mask=is_slot[:, None] & (e[None, :] < VALUE_DIM),
            other=0.0,
        )
        attended = attended * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        best = new_best
    place = (head.to(tl.int64) * num_parts + part) * num_rows + row
    seen = tl.where(total == 0.0, 1.0, total)
    tl.store(log_sums + place, best + tl.log(seen), mask=is_row)
    tl.store(
        parts + place[:, None] * VALUE_DIM + e[None, :],
        attended / seen[:, None],
        mask=is_row[:, None] & (e[None, :] < VALUE_DIM),
    )


@triton.jit(do_not_specialize=SIZES)
def _join_parts(
    parts, log_sums, output, num_key_heads, num_nodes, num_rows, num_parts,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One row of one head: the mean of its parts, each with the weight of what it has seen."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part, e = tl.arange(0, PARTS), tl.arange(0, VALUE_WIDTH)
    place = (head * num_parts + part) * num_rows + row
    log_sum = tl.load(log_sums + place, mask=part < num_parts, other=-float("inf"))
    best = tl.max(log_sum, 0)
    weight = tl.exp(log_sum - tl.where(best == -float("inf"), 0.0, best))
    value = tl.load(
        parts + place[:, None] * VALUE_DIM + e[None, :],
        mask=(part < num_parts)[:, None] & (e[None, :] < VALUE_DIM),
        other=0.0,
    )
    total = tl.sum(weight, 0)
    joined = tl.sum(value * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    groups = num_rows // num_nodes
    b, query_head = head // num_key_heads, head % num_key_heads * groups + row // num_nodes
    place = (b * num_nodes + row % num_nodes) * num_key_heads * groups + query_head
    tl.store(output + place * VALUE_DIM + e, joined, mask=e < VALUE_DIM)
