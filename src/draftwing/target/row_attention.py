"""Queries, keys and values, rotated and written, and attention in Triton, laid out by row_layout.py.

Attention is two launches. One has a program for each part of the context and block of rows (a node's query heads of one
key/value head are rows), and one for each node's tail; a tile has the same height whatever the number of nodes, so that
there is one kernel, compiled once. The other joins a row's tail and parts, in their order, for each query head.
"""

import torch
import triton
import triton.language as tl

from draftwing.target.row_layout import TAIL, Places, RowNorm, RowProduct
from draftwing.target.row_products import halves, multiply_split, shared_bytes, sum_tile, tiling

BLOCK_ROWS, BLOCK_KEYS, JOINED_AT_ONCE = 64, 64, 32
MOST_SCRATCH = 1 << 28
"""Bytes of parts that wait to be joined; nodes of a long prompt are attended some at a time."""
LOG2_E = 1.4426950408889634


def project_heads(
    x: torch.Tensor,
    product: RowProduct,
    norm: RowNorm | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: Places,
) -> torch.Tensor:
    """Queries `[R, Hq, dim]` of `x [R, D]`, rotated; keys, rotated, and values go to their slots of `[slots, Hk, dim]`.

    The product has `(Hq + 2 Hk) dim` outputs; cos, sin `[positions, dim / 2]`; a norm is over each query and key head,
    `[Hq + Hk, dim]`. Two launches, or one with the same bits.
    """
    num_rows, (_, num_key_heads, dim) = len(x), keys.shape
    num_heads = len(product.weight) // dim - 2 * num_key_heads
    queries = keys.new_empty(num_rows, num_heads, dim)
    tables = cos, sin, queries, keys, values, places.positions, places.slots
    if turns_in_tiles(product, norm, dim):
        grid, sizes, options = tiling(x, product)
        _multiply_rotated[grid](
            x, product.weight, product.scale, product.bias, *tables, *sizes, num_heads, num_key_heads,
            HAS_BIAS=product.bias is not None, DIM=dim, **options,
        )  # fmt: skip
        return queries
    sums = multiply_split(x, product)
    _rotate[(num_rows, num_heads + 2 * num_key_heads)](
        sums, product.bias, None if norm is None else norm.weight, *tables,
        num_rows, num_heads, num_key_heads, 0.0 if norm is None else norm.eps,
        SPLITS=len(sums), HAS_BIAS=product.bias is not None, HAS_NORM=norm is not None,
        HALF=dim // 2, WIDTH=triton.next_power_of_2(dim // 2), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return queries


def turns_in_tiles(product: RowProduct, norm: RowNorm | None, dim: int) -> bool:
    """Whether a tile of the product can hold, whole, what rotates together."""
    return norm is None and product.tiles.splits == 1 and dim % product.tiles.outputs == 0


@triton.jit(do_not_specialize=["num_rows"])
def _multiply_rotated(
    x, weight, scale, bias, cos, sin, queries, keys, values, positions, slots,
    num_rows, num_outputs, num_inputs, split_length, num_heads, num_key_heads,
    HAS_BIAS: tl.constexpr, DIM: tl.constexpr, HAS_SCALE: tl.constexpr, IS_EVEN: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    """A product's tile of one head: some numbers of its lower half, and those of its upper half that they turn with."""
    PART: tl.constexpr = BLOCK_OUTPUTS // 2
    TILES: tl.constexpr = DIM // BLOCK_OUTPUTS
    head, first = tl.program_id(1) // TILES, tl.program_id(1) % TILES * PART
    row, i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_OUTPUTS)
    output = head * DIM + first + i % PART + (i // PART) * (DIM // 2)
    is_row = row < num_rows
    total = sum_tile(
        x, weight, scale, bias, row, is_row, output, output < num_outputs, 0, num_inputs, split_length,
        HAS_SCALE, HAS_BIAS, IS_EVEN, BLOCK_OUTPUTS, BLOCK_ROWS, BLOCK_INPUTS,
    )  # fmt: skip
    low, high = halves(total.to(queries.dtype.element_ty).to(tl.float32), PART, BLOCK_ROWS)
    position, slot = tl.load(positions + row, mask=is_row, other=0), tl.load(slots + row, mask=is_row, other=0)
    _store_head(
        low, high, row[None, :], position[None, :], slot[None, :], head, (first + tl.arange(0, PART))[:, None],
        is_row[None, :], cos, sin, queries, keys, values, num_heads, num_key_heads, DIM // 2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "eps"])
def _rotate(
    sums, bias, weight, cos, sin, queries, keys, values, positions, slots, num_rows, num_heads, num_key_heads, eps,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of one row, from the splits of a product `[splits, R, (Hq + 2 Hk) dim]`."""
    r, head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, WIDTH)
    mask = i < HALF
    dtype: tl.constexpr = queries.dtype.element_ty
    low, high = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    for split in tl.static_range(SPLITS):
        row = (split * num_rows + r).to(tl.int64)
        source = sums + (row * (num_heads + 2 * num_key_heads) + head) * (2 * HALF) + i
        low += tl.load(source, mask=mask, other=0.0)
        high += tl.load(source + HALF, mask=mask, other=0.0)
    if HAS_BIAS:
        low += tl.load(bias + head * 2 * HALF + i, mask=mask, other=0.0).to(tl.float32)
        high += tl.load(bias + head * 2 * HALF + HALF + i, mask=mask, other=0.0).to(tl.float32)
    low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
    if HAS_NORM:  # noqa: SIM102 (decided while Triton compiles)
        if head < num_heads + num_key_heads:
            scale = tl.rsqrt(tl.sum(low * low + high * high, 0) / (2 * HALF) + eps)
            weight_low = tl.load(weight + head * 2 * HALF + i, mask=mask, other=0.0).to(tl.float32)
            weight_high = tl.load(weight + head * 2 * HALF + HALF + i, mask=mask, other=0.0).to(tl.float32)
            low = ((low * scale).to(dtype).to(tl.float32) * weight_low).to(dtype).to(tl.float32)
            high = ((high * scale).to(dtype).to(tl.float32) * weight_high).to(dtype).to(tl.float32)
    _store_head(
        low, high, r, tl.load(positions + r), tl.load(slots + r), head, i,
        mask, cos, sin, queries, keys, values, num_heads, num_key_heads, HALF,
    )  # fmt: skip


@triton.jit
def _store_head(
    low, high, row, position, slot, head, i, mask, cos, sin, queries, keys, values, num_heads, num_key_heads,
    HALF: tl.constexpr,
):  # fmt: skip
    """Numbers `i` of both halves of a head, rounded, go to their place: values as they are, others rotated."""
    dtype: tl.constexpr = queries.dtype.element_ty
    slot = slot.to(tl.int64)
    if head >= num_heads + num_key_heads:
        goal = values + (slot * num_key_heads + head - num_heads - num_key_heads) * (2 * HALF) + i
        tl.store(goal, low.to(dtype), mask=mask)
        tl.store(goal + HALF, high.to(dtype), mask=mask)
    else:
        c = tl.load(cos + position * HALF + i, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + position * HALF + i, mask=mask, other=0.0).to(tl.float32)
        goal = queries + (row.to(tl.int64) * num_heads + head) * (2 * HALF) + i
        if head >= num_heads:
            goal = keys + (slot * num_key_heads + head - num_heads) * (2 * HALF) + i
        tl.store(goal, ((low * c).to(dtype).to(tl.float32) - high * s).to(dtype), mask=mask)
        tl.store(goal + HALF, ((high * c).to(dtype).to(tl.float32) + low * s).to(dtype), mask=mask)


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: Places, scale: float
) -> torch.Tensor:
    """Attention of `queries [R, Hq, dim]` to a layer's slots `[B * slots, Hk, dim]`; returns `[R, Hq * value_dim]`."""
    num_rows, num_heads, key_dim = queries.shape
    num_key_heads, value_dim = keys.shape[1], values.shape[2]
    num_nodes, groups = places.num_nodes, num_heads // num_key_heads
    batch_size, num_parts = num_rows // num_nodes, len(places.starts) - 1
    heads = batch_size * num_key_heads
    output = queries.new_empty(num_rows, num_heads * value_dim)
    node_bytes = 4 * batch_size * num_heads * (num_parts + 1) * (value_dim + 2)
    step = min(num_nodes, max(BLOCK_ROWS // groups, MOST_SCRATCH // node_bytes))
    sums = queries.new_empty(heads, num_parts + 1, step * groups, 2, dtype=torch.float32)
    parts = queries.new_empty(heads, num_parts + 1, step * groups, value_dim, dtype=torch.float32)
    row_blocks = triton.cdiv(step * groups, BLOCK_ROWS)
    shape = {
        "GROUPS": groups, "KEY_DIM": key_dim, "VALUE_DIM": value_dim,
        "KEY_WIDTH": max(16, triton.next_power_of_2(key_dim)),
        "VALUE_WIDTH": max(16, triton.next_power_of_2(value_dim)),
    }  # fmt: skip
    width_bytes = BLOCK_KEYS * queries.element_size() * (shape["KEY_WIDTH"] + shape["VALUE_WIDTH"])
    for first in range(0, num_nodes, step):
        nodes = min(step, num_nodes - first)
        _attend[(row_blocks * num_parts + nodes, heads)](
            queries, keys, values, places.limits, places.tails, places.starts, sums, parts,
            num_key_heads, num_nodes, first, nodes, num_parts, row_blocks, step * groups,
            len(keys) // batch_size, scale * LOG2_E,
            **shape, TAIL_ROWS=max(16, triton.next_power_of_2(groups)), TAIL=TAIL,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS, num_warps=4,
            num_stages=max(1, min(3, shared_bytes(queries.device) // width_bytes - 1)),
        )  # fmt: skip
        _join_parts[(nodes, batch_size * num_heads)](
            sums, parts, places.num_parts, output, num_heads, num_nodes, first, num_parts, step * groups,
            GROUPS=groups, VALUE_DIM=value_dim, VALUE_WIDTH=shape["VALUE_WIDTH"], CHUNK=JOINED_AT_ONCE, num_warps=4,
        )  # fmt: skip
    return output


VARYING = ["num_nodes", "first_node", "nodes", "num_parts", "row_blocks", "num_rows", "num_slots"]
"""What differs from pass to pass: one compiled kernel serves all, so that all round alike."""


@triton.jit(do_not_specialize=VARYING)
def _attend(
    queries, keys, values, limits, tails, starts, sums, parts,
    num_key_heads, num_nodes, first_node, nodes, num_parts, row_blocks, num_rows, num_slots, scale,
    GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, TAIL_ROWS: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """A block of rows against one part, the last parts first, or behind those one node's rows against its tail."""
    program, head = tl.program_id(0), tl.program_id(1)
    if program < num_parts * row_blocks:
        _attend_part(
            queries, keys, values, limits, starts, sums, parts, num_parts - 1 - program // row_blocks,
            program % row_blocks, head, num_key_heads, num_nodes, first_node, nodes, num_parts, num_rows, num_slots,
            scale, GROUPS, KEY_DIM, VALUE_DIM, KEY_WIDTH, VALUE_WIDTH, BLOCK_ROWS, BLOCK_KEYS,
        )  # fmt: skip
    else:
        _attend_tail(
            queries, keys, values, tails, sums, parts, program - num_parts * row_blocks, head,
            num_key_heads, num_nodes, first_node, num_parts, num_rows, scale,
            GROUPS, KEY_DIM, VALUE_DIM, KEY_WIDTH, VALUE_WIDTH, TAIL_ROWS, TAIL,
        )  # fmt: skip


@triton.jit
def _attend_part(
    queries, keys, values, limits, starts, sums, parts, part, block, head,
    num_key_heads, num_nodes, first_node, nodes, num_parts, num_rows, num_slots, scale,
    GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """A block of rows against one part: highest scores, the sums of weights relative to them, and weighted values."""
    b, h = head // num_key_heads, head % num_key_heads
    d, e = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    row, step = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_KEYS)
    is_row = row < nodes * GROUPS
    node = b * num_nodes + first_node + row // GROUPS
    limit = tl.load(limits + node, mask=is_row, other=0)
    first = tl.load(starts + part)
    last = tl.minimum(tl.load(starts + part + 1), tl.max(limit, 0))
    if first < last:
        query_head = node.to(tl.int64) * (num_key_heads * GROUPS) + h * GROUPS + row % GROUPS
        query = tl.load(
            queries + query_head[:, None] * KEY_DIM + d[None, :],
            mask=is_row[:, None] & (d[None, :] < KEY_DIM),
            other=0.0,
        )
        base = b.to(tl.int64) * num_slots
        best = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        attended = tl.zeros([BLOCK_ROWS, VALUE_WIDTH], tl.float32)
        for start in range(first, last, BLOCK_KEYS):
            position = start + step
            place = (base + position) * num_key_heads + h
            is_read = position < last
            key = tl.load(
                keys + place[None, :] * KEY_DIM + d[:, None],
                mask=is_read[None, :] & (d[:, None] < KEY_DIM),
                other=0.0,
            )
            score = tl.dot(query, key, input_precision="ieee") * scale
            score = tl.where(position[None, :] < limit[:, None], score, -float("inf"))
            new_best = tl.maximum(best, tl.max(score, 1))
            finite = tl.where(new_best == -float("inf"), 0.0, new_best)  # a row that has seen nothing yet
            weight = tl.exp2(score - finite[:, None])
            shrink = tl.exp2(best - finite)
            value = tl.load(
                values + place[:, None] * VALUE_DIM + e[None, :],
                mask=is_read[:, None] & (e[None, :] < VALUE_DIM),
                other=0.0,
            )
            attended = tl.dot(weight.to(value.dtype), value, attended * shrink[:, None], input_precision="ieee")
            total = total * shrink + tl.sum(weight, 1)
            best = new_best
        goal = (head.to(tl.int64) * (num_parts + 1) + 1 + part) * num_rows + row
        is_kept = is_row & (limit > first)
        tl.store(sums + goal * 2, best, mask=is_kept)
        tl.store(sums + goal * 2 + 1, total, mask=is_kept)
        tl.store(
            parts + goal[:, None] * VALUE_DIM + e[None, :],
            attended,
            mask=is_kept[:, None] & (e[None, :] < VALUE_DIM),
        )


@triton.jit
def _attend_tail(
    queries, keys, values, tails, sums, parts, n, head,
    num_key_heads, num_nodes, first_node, num_parts, num_rows, scale,
    GROUPS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, TAIL_ROWS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The same of node `n` against the slots of its tail; it stands before the parts."""
    b, h = head // num_key_heads, head % num_key_heads
    d, e = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    r, g = b * num_nodes + first_node + n, tl.arange(0, TAIL_ROWS)
    slot = tl.load(tails + r * TAIL + tl.arange(0, TAIL))
    is_seen, is_group = slot >= 0, g < GROUPS
    place = tl.maximum(slot, 0).to(tl.int64) * num_key_heads + h
    query_head = r.to(tl.int64) * (num_key_heads * GROUPS) + h * GROUPS + g
    query = tl.load(
        queries + query_head[:, None] * KEY_DIM + d[None, :],
        mask=is_group[:, None] & (d[None, :] < KEY_DIM),
        other=0.0,
    )
    key = tl.load(
        keys + place[None, :] * KEY_DIM + d[:, None], mask=is_seen[None, :] & (d[:, None] < KEY_DIM), other=0.0
    )
    score = tl.dot(query, key, input_precision="ieee") * scale
    score = tl.where(is_seen[None, :], score, -float("inf"))
    best = tl.max(score, 1)
    weight = tl.exp2(score - best[:, None])
    value = tl.load(
        values + place[:, None] * VALUE_DIM + e[None, :],
        mask=is_seen[:, None] & (e[None, :] < VALUE_DIM),
        other=0.0,
    )
    attended = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
    goal = head.to(tl.int64) * (num_parts + 1) * num_rows + n * GROUPS + g
    tl.store(sums + goal * 2, best, mask=is_group)
    tl.store(sums + goal * 2 + 1, tl.sum(weight, 1), mask=is_group)
    tl.store(
        parts + goal[:, None] * VALUE_DIM + e[None, :],
        attended,
        mask=is_group[:, None] & (e[None, :] < VALUE_DIM),
    )


@triton.jit(do_not_specialize=VARYING)
def _join_parts(
    sums, parts, num_parts_of, output, num_heads, num_nodes, first_node, num_parts, num_rows,
    GROUPS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query head of one node: its tail and then its parts, some at a time in their order."""
    n, b, query_head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    r = b * num_nodes + first_node + n
    count = 1 + tl.load(num_parts_of + r)
    head = (b * (num_heads // GROUPS) + query_head // GROUPS).to(tl.int64)
    base = head * (num_parts + 1) * num_rows + n * GROUPS + query_head % GROUPS
    step, e = tl.arange(0, CHUNK), tl.arange(0, VALUE_WIDTH)
    best = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    attended = tl.zeros([VALUE_WIDTH], tl.float32)
    for first in range(0, count, CHUNK):
        place = base + (first + step).to(tl.int64) * num_rows
        is_part = first + step < count
        part_best = tl.load(sums + place * 2, mask=is_part, other=-float("inf"))
        part_total = tl.load(sums + place * 2 + 1, mask=is_part, other=0.0)
        part_attended = tl.load(
            parts + place[:, None] * VALUE_DIM + e[None, :],
            mask=is_part[:, None] & (e[None, :] < VALUE_DIM),
            other=0.0,
        )
        new_best = tl.maximum(best, tl.max(part_best, 0))
        share, shrink = tl.exp2(part_best - new_best), tl.exp2(best - new_best)
        total = total * shrink + tl.sum(part_total * share, 0)
        attended = attended * shrink + tl.sum(part_attended * share[:, None], 0)
        best = new_best
    place = (r.to(tl.int64) * num_heads + query_head) * VALUE_DIM + e
    tl.store(output + place, (attended / total).to(output.dtype.element_ty), mask=e < VALUE_DIM)
