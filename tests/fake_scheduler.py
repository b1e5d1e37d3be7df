"""A scheduler whose engine says what a test tells it to, cycle by cycle, from a thread of its own."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from draftwing.engine.engine import Request, Seat
from draftwing.engine.logprobs import TokenLogprobs
from draftwing.engine.statistics import Statistics
from draftwing.serving.scheduler import Busy, Deliver, Delivery, Draining, Ticket

Cycles = Sequence[tuple[list[int], int]]
"""Tokens of each cycle, and how many of them were drafted."""


class FakeScheduler:
    """Every request gets `cycles`, cut at its own limit; without an end it waits until it is cancelled."""

    seat_bytes = 1000
    num_seats, max_model_len, max_queue = 4, 512, 12

    def __init__(self, cycles: Cycles = (), finish_reason: str | None = "length", error: str | None = None) -> None:
        self.cycles, self.finish_reason, self.error = cycles, finish_reason, error
        self.is_alive, self.is_draining, self.is_full = True, False, False
        self.num_running = self.num_waiting = 0
        self.statistics = Statistics()
        self.submitted: list[Ticket] = []
        self.cancelled = threading.Event()
        self.check: Callable[[Request], None] = lambda request: None

    def submit(self, *requests: Request, deliver: Deliver) -> list[Ticket]:
        if self.is_draining:
            raise Draining("the server is shutting down")
        if self.is_full:
            raise Busy("3 requests are waiting already")
        tickets = [Ticket(request, index, deliver) for index, request in enumerate(requests)]
        self.submitted += tickets
        threading.Thread(target=self._run, args=(tickets,), daemon=True).start()
        return tickets

    def cancel(self, *tickets: Ticket) -> None:
        if any(ticket.ended is None for ticket in tickets):
            self.cancelled.set()
        for ticket in tickets:
            if ticket.ended is None:
                ticket.ended = time.perf_counter()
                ticket.deliver(ticket.index, Delivery([], 0, [], "cancelled"))

    def _run(self, tickets: list[Ticket]) -> None:
        self.num_running += len(tickets)
        for ticket in tickets:
            ticket.seat = Seat(ticket.request, 0, num_shared=2)
            ticket.seat.prompt_logprobs = [None, *map(chances, ticket.request.prompt[1:])]
            ticket.seated = time.perf_counter()
        for number, (tokens, num_drafted) in enumerate(self.cycles):
            is_last = number == len(self.cycles) - 1
            for ticket in tickets:
                self._deliver(ticket, tokens, num_drafted, self.finish_reason if is_last else None)
        if self.error is not None:
            for ticket in tickets:
                ticket.ended = time.perf_counter()
                ticket.deliver(ticket.index, Delivery([], 0, [], "error", self.error))
        self.num_running -= len(tickets)

    def _deliver(self, ticket: Ticket, tokens: list[int], num_drafted: int, reason: str | None) -> None:
        assert ticket.seat is not None
        ticket.first = ticket.first or time.perf_counter()
        ticket.ended = time.perf_counter() if reason else None
        ticket.seat.tokens += tokens
        ticket.seat.counts.count_cycle(num_drafted, 4, len(tokens), 4)
        logprobs = [] if ticket.request.num_logprobs is None else list(map(chances, tokens))
        ticket.deliver(ticket.index, Delivery(tokens, num_drafted, logprobs, reason))


def chances(token: Any) -> TokenLogprobs:
    """Log-probabilities of a token that is the second most probable one."""
    return TokenLogprobs(-1.0, [(token + 1, -0.5), (token, -1.0)])
