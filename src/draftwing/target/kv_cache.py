"""Preallocated key/value slots by seat, written per tree and compacted per accepted path.

Row b's committed tokens sit at slots 0..lengths[b]-1, so a slot's index is its token's position. A forward pass over
N tree nodes writes them behind, at lengths[b]..lengths[b]+N-1; `commit` keeps the nodes of one path and drops the rest.
"""

import copy
from dataclasses import dataclass
from typing import Self

import torch

from draftwing import native
from draftwing.by_seat import BySeat


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer's cache: key/value heads and the widths of a key and of a value; and where the layer lies.

    Without a device it lies where the cache does.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    device: torch.device | None = None


class KVCache(BySeat):
    """Keys and values of every layer for B seats of at most `capacity` tokens each.

    `lengths [B]` (int64, on the device) counts committed tokens; `bound` is a host-side upper bound of it that decides
    how many slots an attention call reads. The host may tighten `bound` whenever it has read the true lengths.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.batch_size = batch_size
        self.capacity = capacity
        self.dtype = dtype
        self.bound = 0
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # Layers of one shape on one device share a slab [layers, B * slots, heads, dim]: one gather commits.
        # Each row has one slot more than its capacity: writes of padding land there and nothing ever reads it.
        self._num_slots = capacity + 1
        sides = [(layer.device or device, layer.num_heads, layer.key_dim) for layer in layers]
        sides += [(layer.device or device, layer.num_heads, layer.value_dim) for layer in layers]
        self._slabs = {
            side: torch.zeros(sides.count(side), batch_size * self._num_slots, *side[1:], dtype=dtype, device=side[0])
            for side in dict.fromkeys(sides)
        }
        free = {side: iter(slab) for side, slab in self._slabs.items()}
        views = [next(free[side]) for side in sides]
        self._keys, self._values = views[: len(layers)], views[len(layers) :]
        self._row_starts = torch.arange(batch_size, device=device)[:, None] * self._num_slots

    def part(self, first: int, last: int) -> Self:
        part = copy.copy(self)
        part.batch_size = last - first
        part.lengths = self.lengths[first:last]
        slots = self._slots_of(first, last)
        part._slabs = {side: slab[:, slots] for side, slab in self._slabs.items()}
        part._keys = [keys[slots] for keys in self._keys]
        part._values = [values[slots] for values in self._values]
        part._row_starts = self._row_starts[: last - first]
        return part

    def copy_seat(self, source: int, goal: int, num_tokens: int) -> None:
        if source == goal:
            return
        taken, given = (self._slots_of(seat, seat + 1, num_tokens) for seat in (source, goal))
        for slab in self._slabs.values():
            slab[:, given] = slab[:, taken]
        self.lengths[goal] = self.lengths[source]

    def exchange(self, first: int, second: int, num_tokens: int) -> None:
        ours, theirs = (self._slots_of(seat, seat + 1, num_tokens) for seat in (first, second))
        for slab in self._slabs.values():
            kept = slab[:, ours].clone()
            slab[:, ours] = slab[:, theirs]
            slab[:, theirs] = kept
        self.lengths[[first, second]] = self.lengths[[second, first]]

    def clear(self, seat: int, num_tokens: int) -> None:
        """Slots are zeroed, since masked ones are multiplied too: nothing that is not finite may be left in them."""
        for slab in self._slabs.values():
            slab[:, self._slots_of(seat, seat + 1, num_tokens)] = 0
        self.lengths[seat] = 0

    @property
    def num_slots(self) -> int:
        """Slots of a row; the last one is for padding."""
        return self._num_slots

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, `[B * slots, H, dim]`."""
        return self._keys[layer], self._values[layer]

    @property
    def num_bytes(self) -> int:
        """Memory of the slots."""
        return sum(slab.numel() * slab.element_size() for slab in self._slabs.values())

    def slots_behind(self, num_new: int) -> torch.Tensor:
        """The `num_new` slots behind each row's committed tokens, `[B, num_new]`, in the form `write` takes."""
        return self._flat(self.lengths[:, None] + torch.arange(num_new, device=self.lengths.device))

    def num_read(self, num_new: int) -> int:
        """How many slots, from a row's first, hold every committed token and `num_new` behind."""
        return min(self.bound + num_new, self.capacity)

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, num_read: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `[B, H, N, dim]` keys and values in `slots [B, N]`; returns views `[B, H, num_read, dim]`.

        They are kept in the cache's dtype, whatever theirs.
        """
        slots = slots.flatten()
        return (
            self._write_one(self._keys[layer], keys, slots, num_read),
            self._write_one(self._values[layer], values, slots, num_read),
        )

    def commit(self, path: torch.Tensor | None, num_kept: torch.Tensor, max_kept: int) -> None:
        """Keep `num_kept [B]` of the nodes written last: those at `path [B, L]`, or the first ones if it is None.

        `max_kept` bounds num_kept on the host. A path's nodes have increasing indices (parents come before children).
        """
        if path is not None:
            # The root lies where it is kept.
            source = self._flat(self.lengths[:, None] + path[:, 1:]).flatten()
            goal = self.slots_behind(path.shape[1])[:, 1:].flatten()
            for slab in self._slabs.values():
                source, goal = source.to(slab.device), goal.to(slab.device)
                slab.index_copy_(1, goal, slab[:, source])  # index_select would copy all of a slab that is a view
        self.lengths += num_kept
        self.bound = min(self.bound + max_kept, self.capacity)

    def _slots_of(self, first: int, last: int, num_slots: int | None = None) -> slice:
        """The slots of some seats, or the first `num_slots` of a single one, in a slab."""
        start, stop = first * self._num_slots, last * self._num_slots
        return slice(start, stop if num_slots is None else min(start + num_slots, stop))

    def _flat(self, slots: torch.Tensor) -> torch.Tensor:
        return slots.clamp(max=self.capacity) + self._row_starts

    def _write_one(self, buffer: torch.Tensor, new: torch.Tensor, slots: torch.Tensor, num_read: int) -> torch.Tensor:
        buffer.index_copy_(0, slots.to(buffer.device), new.transpose(1, 2).flatten(0, 1).to(buffer.dtype))
        return buffer.view(self.batch_size, self._num_slots, *buffer.shape[1:])[:, :num_read].transpose(1, 2)


def visible_slots(lengths: torch.Tensor, ancestors: torch.Tensor, num_read: int) -> torch.Tensor:
    """Which slots each new node reads: every committed one and its ancestors among the new ones.

    lengths `[B]`, ancestors `[B, N, M]` over the M slots behind the committed ones -> bool `[B, N, num_read]`.
    """
    num_behind = ancestors.shape[-1]
    if native.reads(lengths):
        return native.visible_slots(lengths, ancestors, num_read)
    behind = torch.arange(num_read, device=lengths.device) - lengths[:, None]  # [B, S], 0 at the first new slot
    index = behind.clamp(0, num_behind - 1)[:, None, :].expand(-1, ancestors.shape[1], -1)
    in_tree = ancestors.gather(2, index) & (behind < num_behind)[:, None, :]
    return in_tree | (behind < 0)[:, None, :]
