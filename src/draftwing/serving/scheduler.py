"""The engine thread: requests wait in line, take seats as these become free, and get what each cycle brings.

It knows no HTTP. Other threads submit, cancel and drain; the engine is touched by its own thread alone.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from draftwing.api import SpeculativeModel
from draftwing.engine.engine import Event, Request, Seat
from draftwing.engine.logprobs import TokenLogprobs
from draftwing.engine.options import GenerateOptions
from draftwing.engine.statistics import Statistics

logger = logging.getLogger(__name__)
FAILED = "the engine has failed"
"""What a client is told where the reason is none of its own; the log says more."""


class Busy(RuntimeError):
    """The line of waiting requests is full."""


class Draining(RuntimeError):
    """No further requests are taken."""


@dataclass(frozen=True)
class Delivery:
    """What one cycle brought a request; the last one says why it ended, and every request gets a last one.

    Attributes:
        num_accepted: of the tokens, drafted.
        logprobs: one for each token, where the request asks for them.
        finish_reason: eos, stop, length, cancelled or error.
        error: what went wrong, in a sentence without paths and traces.
        is_callers: whether what was asked for is wrong, such as a form that is found too ambiguous on the way.
    """

    tokens: list[int]
    num_accepted: int
    logprobs: list[TokenLogprobs]
    finish_reason: str | None = None
    error: str | None = None
    is_callers: bool = False


Deliver = Callable[[int, Delivery], None]
"""Takes what a request of a submission, by its index there, has got. Called in the engine thread; must not block."""


@dataclass(eq=False)
class Ticket:
    """One submitted request: its seat once it has one, and when it got on, in seconds of `time.perf_counter`.

    At `first` came its first `num_first` tokens.
    """

    request: Request
    index: int
    deliver: Deliver
    submitted: float = field(default_factory=time.perf_counter)
    seat: Seat | None = None
    seated: float | None = None
    first: float | None = None
    num_first: int = 0
    ended: float | None = None


class Scheduler:
    """Seats requests first come, first served, and runs the engine in a thread of its own.

    A request whose beginning another one is just reading waits until that can be copied, and those behind it with it.

    Args:
        num_seats: requests decoded at once, of at most `max_model_len` tokens each, prompt and new ones.
        settings: how drafts are made; what else they say, each request says itself.
        max_queue: requests that may wait for a seat.

    Raises:
        ValueError: seats that do not fit into memory, or drafting that the method does not know.
    """

    def __init__(
        self, model: SpeculativeModel, num_seats: int, max_model_len: int, settings: GenerateOptions, max_queue: int
    ) -> None:
        self.seat_bytes = model.seat_bytes(max_model_len, settings)
        self._engine = model.engine(num_seats, max_model_len, settings, self.seat_bytes)
        self.num_seats, self.max_model_len, self.max_queue = num_seats, max_model_len, max_queue
        self._changed = threading.Condition()  # guards what other threads change: the six below
        self._waiting: deque[Ticket] = deque()
        self._cancelled: set[Ticket] = set()
        self._is_draining = self._gives_up = self._is_stopped = self._has_failed = False
        self._seated: dict[Seat, Ticket] = {}  # the engine thread's
        self._thread = threading.Thread(target=self._run, name="draftwing-engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs and can go on."""
        return self._thread.is_alive() and not self._has_failed

    @property
    def is_draining(self) -> bool:
        """Whether further requests are refused."""
        return self._is_draining

    @property
    def num_running(self) -> int:
        """Requests that have a seat."""
        return len(self._seated)

    @property
    def num_waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    @property
    def statistics(self) -> Statistics:
        """Counts and seconds of all cycles so far."""
        return self._engine.statistics

    def start(self) -> None:
        """Start the engine thread."""
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raise a ValueError, which names the field, for a request that no seat can serve; from any thread."""
        self._engine.check(request)

    def submit(self, *requests: Request, deliver: Deliver) -> list[Ticket]:
        """Let requests wait in line, all of them or none; `deliver(index, delivery)` gets what cycles bring.

        Raises:
            Busy: so many do not fit into the line.
            Draining: no further ones are taken, or the engine has failed.
        """
        tickets = [Ticket(request, index, deliver) for index, request in enumerate(requests)]
        with self._changed:
            if self._is_draining or self._has_failed:
                raise Draining(FAILED if self._has_failed else "the server is shutting down")
            num_free = self.num_seats - self.num_running
            if len(self._waiting) + len(tickets) > self.max_queue + num_free:
                raise Busy(f"{len(self._waiting)} requests are waiting already")
            self._waiting += tickets
            self._changed.notify_all()
        return tickets

    def cancel(self, *tickets: Ticket) -> None:
        """End requests where they are, at most one cycle later; nothing happens to those that have ended."""
        with self._changed:
            self._cancelled.update(ticket for ticket in tickets if ticket.ended is None)
            self._changed.notify_all()

    def drain(self, seconds: float) -> None:
        """Refuse further requests, wait for so long until all have ended, and cancel the rest."""
        with self._changed:
            self._is_draining = True
            self._changed.notify_all()
            self._changed.wait_for(self._is_idle, timeout=seconds)
            self._gives_up = True
            self._changed.notify_all()
            self._changed.wait_for(self._is_idle)

    def stop(self) -> None:
        """Cancel all requests and end the engine thread."""
        with self._changed:
            self._is_draining = self._is_stopped = True
            self._changed.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _is_idle(self) -> bool:
        """Whether nothing waits and nothing runs, or never will again."""
        return not (self._waiting or self._seated) or not self.is_alive

    def _run(self) -> None:
        """The thread: a step of the engine at a time, while there is work."""
        reason, error = "cancelled", None
        try:
            while self._has_work():
                self._end(self._take_cancelled(), "cancelled")
                self._seat_waiting()
                for event in self._engine.step():
                    self._hand_out(event)
                self._tell_if_idle()
        except Exception:
            logger.exception("the engine has failed")
            reason, error = "error", FAILED
        with self._changed:
            self._has_failed = error is not None
            self._is_stopped = True
            rest = [*self._seated.values(), *self._waiting]
            self._waiting.clear()
            self._seated.clear()
            self._changed.notify_all()
        for ticket in rest:
            self._deliver_last(ticket, reason, error)

    def _has_work(self) -> bool:
        """Wait for something to do; False once the scheduler was stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._waiting or self._seated)
            return not self._is_stopped

    def _tell_if_idle(self) -> None:
        if not self._seated:
            with self._changed:
                self._changed.notify_all()

    def _take_cancelled(self) -> list[Ticket]:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            if self._gives_up:
                cancelled.update(self._waiting, self._seated.values())
            self._waiting = deque(ticket for ticket in self._waiting if ticket not in cancelled)
        return [ticket for ticket in cancelled if ticket.ended is None]

    def _seat_waiting(self) -> None:
        """Give free seats to those that have waited longest."""
        while self._engine.num_free and self._waiting:
            ticket = self._waiting[0]
            if self._engine.will_lend(ticket.request):
                break
            try:
                seat = self._engine.admit(ticket.request)
            except Exception as error:
                self._deliver_last(ticket, "error", *_told(error))
            else:
                assert seat is not None
                ticket.seat, ticket.seated = seat, time.perf_counter()
                self._seated[seat] = ticket
            with self._changed:
                self._waiting.remove(ticket)

    def _hand_out(self, event: Event) -> None:
        """Give a request what a cycle brought it; one that cannot take it is cancelled."""
        ticket, seat = self._seated[event.seat], event.seat
        now = time.perf_counter()
        if ticket.first is None and event.tokens:
            ticket.first, ticket.num_first = now, len(event.tokens)
        if seat.finish_reason:
            del self._seated[seat]
            ticket.ended = now
        brought = event.tokens, event.num_accepted, event.logprobs
        if not _deliver(ticket, Delivery(*brought, seat.finish_reason, *_told(seat.error))):
            self._end([ticket], None)

    def _end(self, tickets: Iterable[Ticket], reason: str | None) -> None:
        """Take tickets out of their seats; they are told the reason, if there is one, even where the engine fails."""
        seats = []
        for ticket in tickets:
            if ticket.seat is not None and self._seated.pop(ticket.seat, None) is not None:
                seats.append(ticket.seat)
            if ticket.ended is None and reason is not None:
                self._deliver_last(ticket, reason)
            ticket.ended = ticket.ended or time.perf_counter()
        self._engine.retire(*seats)

    def _deliver_last(self, ticket: Ticket, reason: str, error: str | None = None, is_callers: bool = False) -> None:
        ticket.ended = time.perf_counter()
        _deliver(ticket, Delivery([], 0, [], reason, error, is_callers))


def _deliver(ticket: Ticket, delivery: Delivery) -> bool:
    """Hand something out, and tell whether it was taken."""
    try:
        ticket.deliver(ticket.index, delivery)
    except Exception:
        logger.exception("a request's results were not taken")
        return False
    return True


def _told(error: Exception | None) -> tuple[str | None, bool]:
    """A delivery's `error` and `is_callers`: of a ValueError its text, of other errors their kind alone."""
    if error is None:
        return None, False
    is_callers = isinstance(error, ValueError)
    return str(error) if is_callers else f"the request has failed ({type(error).__name__})", is_callers
