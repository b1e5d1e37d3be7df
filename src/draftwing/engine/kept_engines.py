"""Idle engines that are kept, since what they have recorded is worth their memory."""

from collections.abc import Hashable

import torch

from draftwing.engine.engine import Engine, bucket
from draftwing.engine.memory import bytes_for_seats
from draftwing.engine.tree_plan import Plan

SMALLEST_CAPACITY = 1024
"""Tokens that the seats of an engine that is kept hold at least."""
MOST_KEPT = 2
"""Each holds all of its seats' memory, and other drafting options want another engine."""


class KeptEngines:
    """Idle engines on a device, by what their drafters are made with."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._engines: dict[Hashable, Engine] = {}  # the newest last

    def __len__(self) -> int:
        return len(self._engines)

    def take(self, key: Hashable, num_seats: int, capacity: int, plan: Plan) -> Engine | None:
        """A kept engine that is large enough, for this plan; one that is too small is given up."""
        engine = self._engines.pop(key, None)
        if engine is None or not engine.can_serve(num_seats, capacity, plan):
            return None
        engine.plan = plan
        return engine

    def keep(self, key: Hashable, engine: Engine) -> None:
        """Keep an engine that has recorded anything, and give up the oldest one that is too many."""
        if not engine.is_recorded:
            return
        self._engines.pop(key, None)
        if len(self._engines) >= MOST_KEPT:
            self._drop_oldest()
        self._engines[key] = engine

    def makes_room_for(self, num_bytes: int) -> bool:
        """Whether memory has room for a new engine, if need be after the oldest ones are given up."""
        while self._engines and num_bytes > bytes_for_seats(self._device):
            self._drop_oldest()
        return num_bytes <= bytes_for_seats(self._device)

    def _drop_oldest(self) -> None:
        del self._engines[next(iter(self._engines))]


def sizes_to_keep(num_seats: int, capacity: int) -> tuple[int, int]:
    """Seats and tokens of each for an engine that is to serve more than the requests that it is made for."""
    return bucket(num_seats), bucket(max(capacity, SMALLEST_CAPACITY))
