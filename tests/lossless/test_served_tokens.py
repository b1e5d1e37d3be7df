"""Whoever comes and goes, each request gets from the scheduler what `generate` gives it alone."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import EOS, VOCAB_SIZE, auto_plan

from draftwing.api import SpeculativeModel
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine import order as order_module
from draftwing.engine.noise import Noise
from draftwing.engine.options import GenerateOptions
from draftwing.serving.scheduler import Delivery, Scheduler, Ticket
from draftwing.target.model import TargetModel

NUM_SEATS, MAX_MODEL_LEN = 4, 96
SECONDS = 120.0
SHARED = [5, 4, 3, 2, 1] * 4


class Letters:
    """A tokenizer whose tokens are letters, so that stop strings come up."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(ord("a") + token % 26) for token in tokens)


class Submission:
    """Some choices of one prompt, as a client asks for them."""

    def __init__(self, luck: random.Random) -> None:
        prompt = luck.choices(range(1, VOCAB_SIZE), k=luck.randint(1, 10))
        shared = SHARED[: luck.choice((0, 0, 7, 20))]
        self.prompts = [[*shared, *prompt]] * luck.choice((1, 1, 1, 3))
        self.options: dict[str, Any] = {
            "max_new_tokens": luck.choice((1, 5, 20, 40)),
            "temperature": luck.choice((0.0, 0.7, 1.2)),
            "seed": luck.randrange(2**40),
            "eos_token_id": EOS,
            "stop": luck.choice(([], [], ["a", "bc"], ["x"])),
        } | luck.choice(
            (
                {},
                {"presence_penalty": 1.0},
                {"frequency_penalty": 0.6, "repetition_penalty": 1.2},
                {"logit_bias": {EOS: 3.0}, "min_new_tokens": 1},
                {"top_p": 0.8, "min_p": 0.02},
            )
        )
        self.tokens: list[list[int]] = [[] for _ in self.prompts]
        self.reasons: list[str | None] = [None for _ in self.prompts]
        self.tickets: list[Ticket] = []
        self.ended = threading.Event()

    def send(self, scheduler: Scheduler, model: SpeculativeModel) -> None:
        requests = model.requests(self.prompts, GenerateOptions(**self.options))
        for request in requests:
            scheduler.check(request)
        self.tickets = scheduler.submit(*requests, deliver=self._take)

    def _take(self, index: int, delivery: Delivery) -> None:
        assert self.reasons[index] is None, "nothing comes after the last delivery"
        self.tokens[index] += delivery.tokens
        self.reasons[index] = delivery.finish_reason
        if all(self.reasons):
            self.ended.set()

    def assert_as_alone(self, model: SpeculativeModel) -> None:
        alone = model.generate(self.prompts, return_dict_in_generate=True, plan="off", **self.options)
        for tokens, reason, right, end in zip(
            self.tokens, self.reasons, alone.tokens, alone.finish_reasons, strict=True
        ):
            if reason == "cancelled":
                assert tokens == right[: len(tokens)]
            else:
                assert (tokens, reason) == (right, end)


@pytest.fixture(autouse=True)
def _short_prompts_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "LEAST_SHARED", 3)


@pytest.fixture(scope="module")
def model(target: TargetModel, heads: dict[str, DraftNetwork]) -> SpeculativeModel:
    return SpeculativeModel(target, heads["eagle3"], Letters())


def drive(model: SpeculativeModel, seed: int, plan: str, num_clients: int = 3) -> list[Submission]:
    """Clients that come at random times, in threads of their own, of whom some hang up; what each one got."""
    luck = random.Random(seed)
    scheduler = Scheduler(model, NUM_SEATS, MAX_MODEL_LEN, GenerateOptions(plan=plan), max_queue=99)
    if plan == "auto":
        scheduler._engine.plan = auto_plan(step=0.05)
    scheduler.start()
    lists = [[Submission(luck) for _ in range(6)] for _ in range(num_clients)]

    def client(submissions: list[Submission], luck: random.Random) -> None:
        for submission in submissions:
            submission.send(scheduler, model)
            time.sleep(luck.random() * 0.05)
            if luck.random() < 0.25:
                scheduler.cancel(*submission.tickets[: luck.randint(1, 3)])

    clients = [
        threading.Thread(target=client, args=(submissions, random.Random(luck.random()))) for submissions in lists
    ]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    everything = [submission for submissions in lists for submission in submissions]
    assert all(submission.ended.wait(SECONDS) for submission in everything)
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.is_alive
    scheduler.stop()
    assert scheduler._engine.num_free == NUM_SEATS
    return everything


@pytest.mark.parametrize(("seed", "plan"), [(1, "tree:4x4x16"), (2, "chain:3"), (3, "off"), (4, "auto")])
def test_each_request_has_the_tokens_that_it_has_alone(
    model: SpeculativeModel, seed: int, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpeculativeModel, "costs", lambda *_: None)  # the plan's are invented
    submissions = drive(model, seed, plan)
    for submission in submissions:
        submission.assert_as_alone(model)
    seats = [ticket.seat for submission in submissions for ticket in submission.tickets if ticket.seat]
    assert sum(seat.num_shared for seat in seats) > 0
    reasons = {reason for submission in submissions for reason in submission.reasons}
    assert {"eos", "length", "stop"} <= reasons


def test_a_storm_of_cancels_loses_no_seat(model: SpeculativeModel) -> None:
    luck = random.Random(7)
    scheduler = Scheduler(model, NUM_SEATS, MAX_MODEL_LEN, GenerateOptions(plan="chain:3"), max_queue=999)
    scheduler.start()
    storm = [Submission(luck) for _ in range(30)]
    for submission in storm:
        submission.send(scheduler, model)
        if luck.random() < 0.3:
            time.sleep(0.01)
        scheduler.cancel(*submission.tickets)
    assert all(submission.ended.wait(SECONDS) for submission in storm)
    last = [Submission(luck) for _ in range(6)]
    for submission in last:
        submission.send(scheduler, model)
    assert all(submission.ended.wait(SECONDS) for submission in last)
    scheduler.stop()
    for submission in storm + last:
        submission.assert_as_alone(model)
    assert scheduler._engine.num_free == NUM_SEATS


def noise_by_seat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request draws by where it lies."""
    admit = Noise.admit
    monkeypatch.setattr(Noise, "admit", lambda self, seat, seed: admit(self, seat, seat))


def share_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shared is said to be longer than it is."""
    lender = order_module.Order.lender

    def longer(self: Any, prompt: Any) -> Any:
        seat, num_shared = lender(self, prompt)
        return seat, min(num_shared + 2, len(prompt) - 2) if seat else 0

    monkeypatch.setattr(order_module.Order, "lender", longer)


@pytest.mark.parametrize("sabotage", [noise_by_seat, share_too_much])
def test_sabotage_is_noticed(
    model: SpeculativeModel, sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        sabotage(patch)
        submissions = drive(model, 5, "off")
    with pytest.raises(AssertionError):
        for submission in submissions:
            submission.assert_as_alone(model)
