"""The kernels of target/row_pass.py in torch: row by row and tile by tile, with the layout of row_layout.py.

A row is computed alone, in operations of fixed shapes: what differs between a tree and one node is the layout's fault.
"""

import torch
from torch.nn import functional

from draftwing.target.row_layout import Places, RowNorm, RowProduct
from draftwing.target.row_pass import Kernels

BLOCK_KEYS = 64


def multiply_split(x: torch.Tensor, product: RowProduct) -> torch.Tensor:
    tiles, num_inputs = product.tiles, product.weight.shape[1]
    length = tiles.split_length(num_inputs)
    sums = torch.zeros(tiles.splits, len(x), len(product.weight))
    for split, row in ((split, row) for split in range(tiles.splits) for row in range(len(x))):
        for start in range(split * length, min((split + 1) * length, num_inputs), tiles.inputs):
            inputs = slice(start, start + tiles.inputs)
            sums[split, row] += (product.weight[:, inputs].float() * x[row, inputs].float()).sum(-1)
    return sums


def multiply(x: torch.Tensor, product: RowProduct) -> torch.Tensor:
    assert product.tiles.splits == 1
    total = multiply_split(x, product)[0]
    return (total if product.bias is None else total + product.bias.float()).to(x.dtype)


def multiply_gated(x: torch.Tensor, product: RowProduct) -> torch.Tensor:
    gate, up = multiply(x, product).chunk(2, dim=-1)
    return functional.silu(gate) * up


def add_splits(
    residual: torch.Tensor, sums: torch.Tensor, bias: torch.Tensor | None, norm: RowNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    y = (_joined(sums, bias) + residual.float()).to(residual.dtype)
    return y, normalise(y, norm)


def normalise(x: torch.Tensor, norm: RowNorm) -> torch.Tensor:
    wide = x.float()
    squares = torch.stack([(row * row).sum(-1, keepdim=True) for row in wide])
    scaled = (wide * (squares / x.shape[-1] + norm.eps).rsqrt()).to(x.dtype)
    return scaled * norm.weight


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
    num_key_heads, dim = keys.shape[1:]
    heads = _joined(multiply_split(x, product), product.bias).to(keys.dtype).unflatten(-1, (-1, dim))
    rotated, values[places.slots] = heads[:, :-num_key_heads], heads[:, -num_key_heads:]
    if norm is not None:
        rotated = torch.stack([normalise(row, norm) for row in rotated])
    low, high = rotated.chunk(2, dim=-1)
    c, s = cos[places.positions, None], sin[places.positions, None]
    rotated = torch.cat((low * c - high * s, high * c + low * s), dim=-1)
    keys[places.slots] = rotated[:, -num_key_heads:]
    return rotated[:, :-num_key_heads]


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: Places, scale: float
) -> torch.Tensor:
    num_slots = len(keys) // (len(queries) // places.num_nodes)
    groups = queries.shape[1] // keys.shape[1]
    output = torch.empty(len(queries), queries.shape[1], values.shape[2], dtype=queries.dtype)
    for row, query in enumerate(queries):
        parts = [_tail(query, keys, values, places.tails[row], groups, scale)]
        for part in range(int(places.num_parts[row])):
            first, last = places.starts[part : part + 2].tolist()
            positions = torch.arange(first, last + -(last - first) % BLOCK_KEYS)
            slots = torch.where(positions < min(last, int(places.limits[row])), positions, -1)
            slots = torch.where(slots < 0, -1, slots + row // places.num_nodes * num_slots)
            blocks = [_tail(query, keys, values, block, groups, scale) for block in slots.split(BLOCK_KEYS)]
            parts.append(_join(blocks))
        _, total, attended = _join(parts)
        output[row] = attended / total
    return output.flatten(1)


def _tail(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, groups: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The highest score of some slots (-1: none), the sum of weights relative to it, and of weighted values."""
    is_read, slots = slots >= 0, slots.clamp(min=0)
    key, value = (
        torch.where(is_read[:, None, None], slab[slots], 0).float().repeat_interleave(groups, 1)
        for slab in (keys, values)
    )
    score = (query.float() * key).sum(-1) * scale  # [slots, heads]
    score = torch.where(is_read[:, None], score, -torch.inf)
    best = score.amax(0)
    weight = (score - torch.where(best.isinf(), 0, best)).exp()
    return best[:, None], weight.sum(0)[:, None], (weight.to(values.dtype).float()[..., None] * value).sum(0)


def _join(
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Several of these as one, in their order."""
    best, total, attended = parts[0]
    for part_best, part_total, part_attended in parts[1:]:
        new_best = torch.maximum(best, part_best)
        shrink, share = (best - new_best).exp(), (part_best - new_best).exp()
        best, total = new_best, total * shrink + part_total * share
        attended = attended * shrink + part_attended * share
    return best, total, attended


def _joined(sums: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    return total if bias is None else total + bias.float()


EMULATED = Kernels(multiply, multiply_split, multiply_gated, add_splits, normalise, project_heads, attend)
