"""What a client has asked for and the engine works at: results come over from the engine thread, in both directions.

A client that goes away ends its requests, whether it reads a stream or waits for the whole.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.types import Receive

from draftwing.serving.intake import Call
from draftwing.serving.scheduler import Delivery, Scheduler, Ticket


class Gone(Exception):
    """The client does not listen any more."""


class Submission:
    """A call that was submitted. Raises as `Scheduler.submit` does; made in the event loop."""

    def __init__(self, scheduler: Scheduler, call: Call, receive: Receive) -> None:
        self._scheduler, self._receive = scheduler, receive
        self._loop = asyncio.get_running_loop()
        self._arrivals: asyncio.Queue[tuple[int, Delivery] | None] = asyncio.Queue()
        self.tickets: list[Ticket] = scheduler.submit(*call.requests, deliver=self._deliver)
        self._watch = asyncio.create_task(self._watch_client())

    def _deliver(self, index: int, delivery: Delivery) -> None:
        """Hand something to the event loop; one that has ended needs nothing any more."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrivals.put_nowait, (index, delivery))

    async def deliveries(self) -> AsyncIterator[tuple[int, Delivery]]:
        """What cycles bring, until all have ended.

        Raises:
            Gone: the client has gone; its requests are cancelled.
        """
        num_left = len(self.tickets)
        try:
            while num_left:
                arrival = await self._arrivals.get()
                if arrival is None:
                    raise Gone
                num_left -= arrival[1].finish_reason is not None
                yield arrival
        finally:
            self.close()

    def close(self) -> None:
        """End what still runs."""
        self._watch.cancel()
        self._scheduler.cancel(*self.tickets)

    async def _watch_client(self) -> None:
        message: Any = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await self._receive()
        self._scheduler.cancel(*self.tickets)  # here too: an answer that nobody reads never begins
        self._arrivals.put_nowait(None)
