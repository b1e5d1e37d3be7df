"""How the sums of a pass on a GPU are laid out: by what a token is, never by how many pass with it.

A product is cut by its weight's shape. Attention is cut by positions: what lies well behind a node ("parts", the same
for all, where a slot's number is its position), and the last 33 to 64 positions up to its own ("tail"), which are
looked up in a table of slots, because some of them may be nodes of the tree. So a node reads the same numbers in the
same order in a tree and when it is decoded alone.
"""

from dataclasses import dataclass
from functools import cache

import torch

TREE_LEVELS = 32
"""Levels of a tree, its root's among them; all that lies behind a node's tail is committed."""
TAIL = 2 * TREE_LEVELS
PART_LENGTHS = ((128, 1024), (256, 2048), (512, 8192), (1024, 1 << 30))
"""Positions of a part, each length up to a position: short contexts fill a device too, long ones have few joins."""


@cache
def part_starts(num_positions: int) -> tuple[int, ...]:
    """The first positions of the parts that hold so many positions, and of the one behind."""
    starts = [0]
    for length, end in PART_LENGTHS:
        while starts[-1] < min(end, num_positions):
            starts.append(starts[-1] + length)
    return tuple(starts)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: outputs and inputs of a tile, and into how many splits the inputs.

    `warps` and `stages` say how a tile is computed, which does not change its sums.
    """

    outputs: int
    inputs: int
    splits: int
    warps: int
    stages: int

    @staticmethod
    def of(num_outputs: int, num_inputs: int, most_splits: int = 4) -> "Tiles":
        """The fastest of those tried on an H100 at the shapes of an 8B model (docs/performance.md)."""
        if num_outputs >= 16384:
            return Tiles(128, 128, 1, 4 if num_outputs >= 65536 else 8, 4)
        splits = 1
        while splits < most_splits and -(-num_outputs // 64) * splits < 80 and num_inputs >= 2048 * splits:
            splits *= 2
        return Tiles(64, 128, splits, 4, 5)

    def split_length(self, num_inputs: int) -> int:
        """Inputs of a split, in whole tiles; the last one may have fewer."""
        return -(-num_inputs // (self.splits * self.inputs)) * self.inputs


@dataclass(frozen=True)
class RowProduct:
    """`weight [out, in]` and `bias [out]` of a product, and how it is cut; `scale [out]` of an int8 weight's sums."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    tiles: Tiles
    scale: torch.Tensor | None = None


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm: `weight [D]`, or `[H, dim]` of a norm over each head, and epsilon, a number of the host's."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Places:
    """Where the R = B N nodes of a pass stand, made once for all layers.

    Attributes:
        num_nodes: N.
        positions: `[R]`.
        slots: `[R]` of their own keys and values, in a layer's B * slots.
        limits: `[R]` positions below are read in parts.
        num_parts: `[R]` parts that begin below the limit.
        tails: `[R, TAIL]` slots of the positions from the limit on; -1 where nothing is to be read.
        starts: `[P + 1]` first positions of the parts that some row may read, and the last one's end.

    All are int32.
    """

    num_nodes: int
    positions: torch.Tensor
    slots: torch.Tensor
    limits: torch.Tensor
    num_parts: torch.Tensor
    tails: torch.Tensor
    starts: torch.Tensor

    @staticmethod
    def of(
        lengths: torch.Tensor,
        depths: torch.Tensor,
        ancestors: torch.Tensor,
        num_slots: int,
        starts: torch.Tensor,
        num_positions: int,
    ) -> "Places":
        """From lengths `[B]`, depths `[B, M]` and ancestors `[B, N, M]`; see `TargetModel.forward_tree`.

        A row has `num_slots`, of which the last is for padding. A node is deeper than TREE_LEVELS - 1 only where all
        nodes are a chain, whose slots are their positions. Nodes past `num_positions`, which cannot be emitted, stand
        at the last one.
        """
        num_new, num_behind = ancestors.shape[1:]
        device, starts_at = lengths.device, torch.arange(len(lengths), device=lengths.device)[:, None] * num_slots
        positions = lengths[:, None] + depths[:, -num_new:]
        firsts = (positions // TREE_LEVELS - 1) * TREE_LEVELS
        at = firsts[..., None] + torch.arange(TAIL, device=device)
        # A node's ancestor at each depth. The others count as the root, which no depth but 0 gives.
        nodes = torch.where(ancestors, torch.arange(num_behind, device=device), 0)
        at_depth = depths.clamp(max=num_behind - 1)[:, None].expand_as(nodes)
        ancestor_at = torch.zeros_like(nodes).scatter_reduce(2, at_depth, nodes, "amax")
        behind = at - lengths[:, None, None]
        node = ancestor_at.gather(2, behind.clamp(0, num_behind - 1))
        slot = torch.where(behind < 0, at, lengths[:, None, None] + node).clamp(max=num_slots - 1)
        is_read = (at >= 0) & (at <= positions[..., None])
        tails = torch.where(is_read, starts_at[..., None] + slot, -1)
        own = lengths[:, None] + torch.arange(num_behind - num_new, num_behind, device=device)
        slots = starts_at + own.clamp(max=num_slots - 1)
        # Padding, and a seat that does not run, may stand behind all that is read; nobody looks at what they give.
        limits = torch.minimum(_flat(firsts.clamp(0, num_slots)), starts[-1])
        num_parts = torch.searchsorted(starts, limits, out_int32=True)
        positions = _flat(positions.clamp(max=num_positions - 1))
        return Places(num_new, positions, _flat(slots), limits, num_parts, _flat(tails), starts)


def _flat(by_node: torch.Tensor) -> torch.Tensor:
    """`[B, N, ...]` as int32 `[R, ...]`."""
    return by_node.flatten(0, 1).int()
