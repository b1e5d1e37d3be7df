"""Requests decoded together to their ends."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from draftwing.engine.captured import Recorder
from draftwing.engine.engine import Engine, Event, NewDrafter, Request, Seat, check_requests
from draftwing.engine.statistics import Statistics
from draftwing.engine.tree_plan import Plan
from draftwing.target.model import TargetModel


@dataclass(frozen=True)
class Committed:
    """The tokens that one cycle committed, per row; `num_accepted` of them were drafted (the rest is the bonus)."""

    tokens: list[list[int]]
    num_accepted: list[int]


class Generation:
    """Requests that an engine serves as seats become free; `run` it to the end, or iterate its `cycles()`.

    `outputs` are the rows that have had a seat, in the order of their requests; when a generation is over, all.
    `give_back` is called when it is, with the engine. At most `num_seats` of the engine's seats are held at once.

    Raises:
        ValueError: no requests, or one that the engine cannot serve.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        give_back: Callable[[Engine], None] | None = None,
        num_seats: int | None = None,
    ) -> None:
        check_requests(requests, engine.check)
        self.statistics = Statistics()
        self.outputs: list[Seat] = []
        self._engine, self._give_back = engine, give_back
        self._num_seats = num_seats or len(requests)
        self._num_rows, self._waiting = len(requests), deque(requests)
        self._is_closed = False
        engine.count_into(self.statistics)
        self._admit()

    @property
    def is_done(self) -> bool:
        """Whether every row has stopped, or the generation was closed."""
        return self._is_closed or (not self._waiting and all(seat.finish_reason for seat in self.outputs))

    def cycles(self) -> Iterator[Committed]:
        """Run cycles until every row has stopped, yielding what each commits."""
        for events in self._steps():
            if events:
                yield self._by_row(events)

    def run(self) -> "Generation":
        """Run cycles until every row has stopped; returns itself."""
        for _ in self._steps():
            pass
        return self

    def close(self) -> None:
        """End the generation where it stands; it may be closed already."""
        self._is_closed = True
        self._engine.retire(*self.outputs)
        if self._give_back is not None:
            self._give_back(self._engine)
            self._give_back = None

    def _steps(self) -> Iterator[list[Event]]:
        while not self.is_done:
            try:
                events = self._engine.step()
                for error in [event.seat.error for event in events if event.seat.error]:
                    raise error
                self._admit()
            except Exception:
                self.close()
                raise
            yield events
        self.close()

    def _admit(self) -> None:
        num_running = sum(seat.finish_reason is None for seat in self.outputs)
        for _ in range(min(self._num_seats - num_running, self._engine.num_free, len(self._waiting))):
            seat = self._engine.admit(self._waiting[0])
            assert seat is not None
            self._waiting.popleft()
            self.outputs.append(seat)

    def _by_row(self, events: Sequence[Event]) -> Committed:
        tokens: list[list[int]] = [[] for _ in range(self._num_rows)]
        num_accepted = [0] * self._num_rows
        row_of = {seat: row for row, seat in enumerate(self.outputs)}
        for event in events:
            tokens[row_of[event.seat]] = event.tokens
            num_accepted[row_of[event.seat]] = event.num_accepted
        return Committed(tokens, num_accepted)


def start_generation(
    target: TargetModel,
    requests: Sequence[Request],
    new_drafter: NewDrafter,
    plan: Plan,
    coupled: bool = True,
    recorder: Recorder | None = None,
    num_seats: int | None = None,
) -> Generation:
    """A generation with an engine of its own; by default a seat for each request."""
    capacity = max((request.most_tokens for request in requests), default=0)
    engine = Engine(target, new_drafter, num_seats or len(requests), capacity, plan, recorder, coupled)
    return Generation(engine, requests)
