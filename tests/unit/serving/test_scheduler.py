"""The engine thread: who gets a seat, who waits, who is refused, and who ends when something fails."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import costs, requests_for, run

from draftwing.api import SpeculativeModel
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine import memory
from draftwing.engine.engine import Engine, Event, Request, Seat
from draftwing.engine.options import GenerateOptions
from draftwing.serving.metrics import ServerMetrics
from draftwing.serving.scheduler import Busy, Delivery, Draining, Scheduler, Ticket
from draftwing.target.model import TargetModel

SECONDS = 60.0


class Client:
    """Gathers what the requests of one submission get."""

    def __init__(self, scheduler: Scheduler, *requests: Request) -> None:
        self.deliveries: list[list[Delivery]] = [[] for _ in requests]
        self._left, self._all = len(requests), threading.Event()
        self.first = threading.Event()
        self.tickets: Sequence[Ticket] = scheduler.submit(*requests, deliver=self._take)

    def _take(self, index: int, delivery: Delivery) -> None:
        self.deliveries[index].append(delivery)
        self.first.set()
        self._left -= delivery.finish_reason is not None
        if not self._left:
            self._all.set()

    def wait(self) -> "Client":
        assert self._all.wait(SECONDS), "every request gets a last delivery"
        return self

    @property
    def tokens(self) -> list[list[int]]:
        return [[token for one in got for token in one.tokens] for got in self.deliveries]

    @property
    def reasons(self) -> list[str | None]:
        return [got[-1].finish_reason for got in self.deliveries]


@pytest.fixture(scope="module")
def model(target: TargetModel, heads: dict[str, DraftNetwork]) -> SpeculativeModel:
    return SpeculativeModel(target, heads["eagle3"])


@pytest.fixture
def start(model: SpeculativeModel) -> Iterator[Callable[..., Scheduler]]:
    """Makes schedulers that are stopped when the test is over."""
    made = []

    def make(num_seats: int = 3, max_queue: int = 99, starts: bool = True, plan: str = "tree:4x4x16") -> Scheduler:
        made.append(Scheduler(model, num_seats, 64, GenerateOptions(plan=plan), max_queue))
        if starts:
            made[-1].start()
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.stop()
        assert not scheduler.is_alive


def endless(num_requests: int = 1) -> list[Request]:
    """Requests that run for long."""
    return requests_for([[1, 2, 3 + row] for row in range(num_requests)], max_new_tokens=60, eos=())


def test_requests_get_their_own_tokens(target: TargetModel, start: Callable[..., Scheduler]) -> None:
    requests = requests_for([[1, 2, 3], [7], [9, 8, 7, 6], [5, 5], [4, 3, 2, 1]], temperature=0.7)
    scheduler = start(num_seats=2)
    client = Client(scheduler, *requests).wait()
    assert client.tokens == run(target, requests)
    assert set(client.reasons) <= {"eos", "length"}
    for ticket in client.tickets:
        assert ticket.submitted <= ticket.seated <= ticket.first <= ticket.ended
        assert 1 <= ticket.num_first <= len(ticket.seat.tokens)
    assert scheduler.statistics.num_tokens == sum(map(len, client.tokens))
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)


def test_an_answer_of_one_cycle_has_no_time_between_its_tokens() -> None:
    """Its first tokens are its last; a histogram's sum must not fall."""
    (request,) = requests_for([[1, 2, 3]], eos=(), max_new_tokens=4)
    figures = SimpleNamespace(seconds={}, num_cycles=0, accepted_at=[], reached_at=[])
    scheduler = SimpleNamespace(num_seats=1, num_running=0, num_waiting=0, statistics=figures)
    metrics = ServerMetrics(scheduler, "m")  # type: ignore[arg-type]
    for cycles in ([[5, 6, 7, 8]], [[5, 6, 7], [8]]):
        seat = Seat(request, 0)
        ticket = Ticket(request, 0, lambda *_: None, seat=seat, seated=0.0, submitted=0.0)
        line = SimpleNamespace(_seated={seat: ticket})
        for tokens in cycles:
            seat.tokens += tokens
            seat.finish_reason = "length" if len(seat.tokens) == 4 else None
            Scheduler._hand_out(line, Event(seat, tokens, 0, []))  # type: ignore[arg-type]
        assert ticket.first is not None and ticket.ended is not None and ticket.first <= ticket.ended
        metrics._time(ticket)
    page = metrics.page().decode()
    assert 'draftwing_token_seconds_count{model_name="m"} 1.0' in page
    assert 'draftwing_token_seconds_sum{model_name="m"} -' not in page


def test_several_choices_read_one_prompt_once(target: TargetModel, start: Callable[..., Scheduler]) -> None:
    (request,) = requests_for([list(range(1, 31))], eos=(), temperature=1.0)
    choices = [replace(request, sampling=replace(request.sampling, seed=seed)) for seed in range(3)]
    scheduler = start()
    client = Client(scheduler, *choices).wait()
    assert client.tokens == run(target, choices)
    assert [ticket.seat.num_shared for ticket in client.tickets] == [0, 28, 28]


def test_a_full_line_refuses_all_of_a_submission(start: Callable[..., Scheduler]) -> None:
    scheduler = start(num_seats=1, max_queue=2, starts=False)
    waiting = Client(scheduler, *endless(2))
    with pytest.raises(Busy, match="2 requests are waiting"):
        scheduler.submit(*endless(2), deliver=lambda *_: None)
    assert scheduler.num_waiting == 2
    last = Client(scheduler, *endless(1))
    scheduler.start()
    assert waiting.wait().reasons + last.wait().reasons == ["length"] * 3


def test_cancelled_requests_leave_at_once_and_only_once(target: TargetModel, start: Callable[..., Scheduler]) -> None:
    scheduler = start(num_seats=1)
    running, waiting, other = (Client(scheduler, request) for request in endless(3))
    assert running.first.wait(SECONDS)
    for _ in range(3):
        scheduler.cancel(*running.tickets, *waiting.tickets)
    assert running.wait().reasons + waiting.wait().reasons == ["cancelled"] * 2
    assert waiting.deliveries == [[Delivery([], 0, [], "cancelled")]]
    scheduler.cancel(*running.tickets)
    assert other.wait().tokens == [run(target, endless(3))[2]]
    assert sum(one.finish_reason is not None for one in running.deliveries[0]) == 1


def test_draining_finishes_what_runs_and_refuses_others(start: Callable[..., Scheduler]) -> None:
    scheduler = start(num_seats=1)
    client = Client(scheduler, *endless(2))
    scheduler.drain(SECONDS)
    assert client.reasons == ["length", "length"]
    assert scheduler.is_alive and scheduler.is_draining
    with pytest.raises(Draining):
        scheduler.submit(*endless(), deliver=lambda *_: None)


def test_draining_cancels_what_takes_too_long(start: Callable[..., Scheduler]) -> None:
    scheduler = start(num_seats=1)
    client = Client(scheduler, *endless(3))
    scheduler.drain(0.0)
    assert client.reasons == ["cancelled"] * 3
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)


def test_stopping_tells_everybody(start: Callable[..., Scheduler]) -> None:
    scheduler = start(num_seats=1)
    client = Client(scheduler, *endless(3))
    scheduler.stop()
    assert client.wait().reasons == ["cancelled"] * 3
    with pytest.raises(Draining):
        scheduler.submit(*endless(), deliver=lambda *_: None)


def broken_decode(tokens: list[int]) -> str:
    raise KeyError("/a/path/of/the/machine")


def ambiguous(said: list[int]) -> None:
    if len(said) == 2:
        raise ValueError("response_format: too many items")


def test_a_form_that_cannot_be_followed_to_its_end_is_the_callers_mistake(start: Callable[..., Scheduler]) -> None:
    (request,) = requests_for([[1, 2, 3]], max_new_tokens=20, eos=())
    client = Client(start(), replace(request, allowed=ambiguous)).wait()
    last = client.deliveries[0][-1]
    assert (last.finish_reason, last.error, last.is_callers) == ("error", "response_format: too many items", True)


def test_a_request_that_fails_ends_alone(target: TargetModel, start: Callable[..., Scheduler]) -> None:
    """As it is seated, and in the middle of its text."""
    good, fails, too_long = requests_for([[1, 2, 3], [4, 5], [1] * 70], max_new_tokens=20, eos=())
    fails = replace(fails, stop=replace(fails.stop, stop_strings=("x",), decode=broken_decode))
    scheduler = start()
    clients = [Client(scheduler, request).wait() for request in (fails, good, too_long)]
    assert [client.reasons for client in clients] == [["error"], ["length"], ["error"]]
    assert clients[1].tokens == run(target, [good])
    assert "KeyError" in clients[0].deliveries[0][-1].error
    assert "path" not in clients[0].deliveries[0][-1].error
    assert not clients[0].deliveries[0][-1].is_callers
    assert "a seat's 64 tokens" in clients[2].deliveries[0][-1].error
    assert clients[2].deliveries[0][-1].is_callers
    assert scheduler.is_alive
    with pytest.raises(ValueError, match="max_new_tokens"):
        scheduler.check(too_long)


def test_who_cannot_take_its_tokens_is_cancelled(target: TargetModel, start: Callable[..., Scheduler]) -> None:
    def refuse(index: int, delivery: Delivery) -> None:
        calls.append(delivery)
        raise RuntimeError("the client is gone")

    calls: list[Delivery] = []
    scheduler = start(num_seats=2)
    (ticket,) = scheduler.submit(*endless(), deliver=refuse)
    other = Client(scheduler, endless(2)[1]).wait()
    assert other.tokens == [run(target, endless(2))[1]]
    assert len(calls) == 1 and ticket.ended is not None
    assert scheduler.is_alive and scheduler.num_running == 0


def test_a_seat_that_cannot_be_left_hides_no_last_delivery(
    start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    scheduler = start(num_seats=2)
    client = Client(scheduler, *endless(4))
    assert client.first.wait(SECONDS)
    monkeypatch.setattr(scheduler._engine, "retire", fail)
    scheduler.cancel(*client.tickets)
    assert set(client.wait().reasons) <= {"cancelled", "error"}
    assert [sum(one.finish_reason is not None for one in got) for got in client.deliveries] == [1] * 4


def test_a_dead_engine_tells_everybody(start: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = start(num_seats=1, starts=False)
    client = Client(scheduler, *endless(2))

    def step(self: Engine) -> Any:
        raise RuntimeError("CUDA error in /a/path")

    monkeypatch.setattr(Engine, "step", step)
    scheduler.start()
    assert client.wait().reasons == ["error", "error"]
    assert {got[-1].error for got in client.deliveries} == {"the engine has failed"}
    with pytest.raises(Draining):
        scheduler.submit(*endless(), deliver=lambda *_: None)
    assert not scheduler.is_alive
    scheduler.drain(SECONDS)  # waits for nobody


def test_trees_that_size_themselves_know_every_number_of_seats(
    model: SpeculativeModel, monkeypatch: pytest.MonkeyPatch, target: TargetModel
) -> None:
    """Costs are measured for 1, 2 and 4 seats at start, greedy and sampled, and greedy rows learn apart from others."""

    monkeypatch.setattr("draftwing.plans.planner.cached_costs", lambda *_: costs(step=0.05))
    auto = model.with_method("eagle3")
    scheduler = Scheduler(auto, 3, 64, GenerateOptions(), 9)
    assert set(auto._lessons.costs) == {(size, sampled) for size in (1, 2, 4) for sampled in (False, True)}
    scheduler.start()
    requests = requests_for([[1, 2, 3], [4, 5, 6], [7, 8, 9]], max_new_tokens=40, eos=())
    requests += requests_for([[1, 2], [3, 4], [5, 6]], max_new_tokens=30, eos=(), temperature=0.8)
    assert Client(scheduler, *requests).wait().tokens == run(target, requests)
    assert {sampled for _, sampled in auto._lessons._experience} == {False, True}
    scheduler.stop()


def test_seats_that_do_not_fit_are_refused(model: SpeculativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    one = model.seat_bytes(64, GenerateOptions(plan="off"))
    assert one >= model.engine(1, 64, GenerateOptions(plan="off"))._seats.cache.num_bytes > 0
    assert model.seat_bytes(128, GenerateOptions(plan="off")) > one
    monkeypatch.setattr(memory, "free_bytes", lambda device: 4 * one)
    Scheduler(model, 3, 64, GenerateOptions(plan="off"), 9)
    with pytest.raises(ValueError, match=r"seats: 4 seats of 64 tokens take .* MiB .*expected at most 3 seats"):
        Scheduler(model, 4, 64, GenerateOptions(plan="off"), 9)
    with monkeypatch.context() as patch:
        calls: list[Any] = []
        patch.setattr("draftwing.api.seat_bytes", lambda *arguments: calls.append(arguments) or one)
        Scheduler(model, 2, 64, GenerateOptions(plan="off"), 9)
        assert len(calls) == 1, "a seat is made to be measured once"
    with pytest.raises(ValueError, match="max_model_len: expected from 2 tokens to the model's 256 positions, got 512"):
        Scheduler(model, 1, 512, GenerateOptions(plan="off"), 9)
    with pytest.raises(ValueError, match="seats: expected at least 1"):
        Scheduler(model, 0, 64, GenerateOptions(plan="off"), 9)
