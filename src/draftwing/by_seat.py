"""State by seat: tensors and arrays whose first axis is the seat, so that a range of seats is a view of them."""

import copy
from typing import Any, ClassVar, Self


class BySeat:
    """Keeps state for an engine's seats in the attributes that `by_seat` names, written in place.

    They are tensors or numpy arrays `[B, ...]`, other objects of this kind, or None. All else belongs to no seat.
    """

    by_seat: ClassVar[tuple[str, ...]] = ()

    def part(self, first: int, last: int) -> Self:
        """The same state for the seats `first .. last - 1`, which it numbers from 0. Storage is shared."""
        part = copy.copy(self)
        for name in self.by_seat:
            value = getattr(self, name)
            if value is not None:
                is_nested = isinstance(value, BySeat)
                setattr(part, name, value.part(first, last) if is_nested else value[first:last])
        return part

    def copy_seat(self, source: int, goal: int, num_tokens: int) -> None:
        """Give seat `goal` what seat `source` holds, which are at most so many committed tokens."""
        for value in self._held():
            if isinstance(value, BySeat):
                value.copy_seat(source, goal, num_tokens)
            else:
                value[goal] = value[source]

    def exchange(self, first: int, second: int, num_tokens: int) -> None:
        """Let two seats hold what the other held, which are at most so many committed tokens each."""
        for value in self._held():
            if isinstance(value, BySeat):
                value.exchange(first, second, num_tokens)
            else:
                value[[first, second]] = value[[second, first]]

    def clear(self, seat: int, num_tokens: int) -> None:
        """Forget what a seat holds: at most so many tokens, tree nodes included."""
        for value in self._held():
            if isinstance(value, BySeat):
                value.clear(seat, num_tokens)
            else:
                value[seat] = 0

    @property
    def num_bytes(self) -> int:
        """Memory of what all seats hold."""
        return sum(int(value.num_bytes if isinstance(value, BySeat) else value.nbytes) for value in self._held())

    def _held(self) -> list[Any]:
        values = (getattr(self, name) for name in self.by_seat)
        return [value for value in values if value is not None]
