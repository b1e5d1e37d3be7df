"""Requests that come and go at any time get the tokens that each of them gets alone, whatever seat they hold."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from conftest import (
    EOS,
    VOCAB_SIZE,
    auto_plan,
    eagle,
    eagle_with_ngram,
    generate,
    lookahead,
    ngram,
    no_draft,
    requests_for,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tape import TapeRecorder
from test_bits import packed_target

from draftwing.drafts.eagle.load import DraftNetwork
from draftwing.engine import engine as engine_module
from draftwing.engine.engine import Engine, NewDrafter, Request, Seat
from draftwing.engine.generation import Generation
from draftwing.engine.penalties import Penalties
from draftwing.engine.plan import Plan, TreePlan
from draftwing.engine.sampling import Noise, SamplingParams
from draftwing.engine.stepwise import Place
from draftwing.engine.stopping import StopRule
from draftwing.target.kv_cache import KVCache
from draftwing.target.model import TargetModel

CAPACITY = 64
METHODS = ("plain", "eagle1", "eagle3", "eagle3+ngram", "medusa", "draft_model", "ngram", "lookahead")
SHARED = [5, 4, 3, 2, 1] * 5
"""What some of the prompts begin with, so that one can be copied from another's seat."""


@pytest.fixture(autouse=True)
def _short_prompts_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "LEAST_SHARED", 2)


@pytest.fixture(scope="module")
def ways(drafters: dict[str, NewDrafter], heads: dict[str, DraftNetwork]) -> dict[str, tuple[NewDrafter, TreePlan]]:
    """Every method's drafter and a plan for it."""
    tree, chain, merged = TreePlan.parse("tree:4x4x16"), TreePlan.chain(4), TreePlan.parse("tree:4x4x16").with_lookup()
    return {name: (drafter, tree) for name, drafter in drafters.items()} | {
        "plain": (no_draft, TreePlan.off()),
        "eagle3+ngram": (eagle_with_ngram(heads["eagle3"]), merged),
        "ngram": (ngram, chain),
        "lookahead": (lookahead("lookahead:4x3x4"), TreePlan.parse("lookahead:4x3x4")),
    }


def random_request(luck: random.Random) -> Request:
    """A prompt, sampling parameters and stops of any kind."""
    prompt = luck.choices(range(1, VOCAB_SIZE), k=luck.randint(1, 12))
    if luck.random() < 0.4:
        prompt = SHARED[: luck.randint(1, len(SHARED))] + prompt
    kinds: list[dict[str, float]] = [{}, {"top_k": 5}, {"top_p": 0.8, "min_p": 0.05}, {"repetition_penalty": 1.5}]
    kinds += [{"presence_penalty": 1.0, "frequency_penalty": 0.8}]
    sampling = SamplingParams(
        temperature=luck.choice((0.0, 0.7, 1.3)),
        seed=luck.randrange(2**40),
        logit_bias={luck.choice((EOS, luck.randrange(VOCAB_SIZE))): 4.0} if luck.random() < 0.3 else {},
        **luck.choice(kinds),  # type: ignore[arg-type]
    )
    limit = luck.choice((1, 2, 7, 24))
    return Request(prompt, sampling, StopRule(limit, (EOS,), min_new_tokens=luck.choice((0, 0, limit // 2))))


def serve(
    engine: Engine, requests: Sequence[Request], luck: random.Random, leave: float = 0.0
) -> Iterator[tuple[int, Seat]]:
    """Admit requests at random times and run them; some leave in the middle. Yields who has ended."""
    waiting, seated = list(enumerate(requests)), dict[Seat, int]()
    while waiting or seated:
        while waiting and luck.random() < 0.6 and (seat := engine.admit(waiting[0][1])):
            seated[seat] = waiting.pop(0)[0]
        for event in engine.step():
            if event.seat.finish_reason:
                yield seated.pop(event.seat), event.seat
        for seat in list(seated):
            if luck.random() < leave:
                engine.retire(seat)
                engine.retire(seat)  # once more does nothing
                del seated[seat]


def assert_as_alone(
    target: TargetModel, way: tuple[NewDrafter, Plan], seed: int, num_seats: int = 3, recorded: bool = False
) -> int:
    """Random requests over some seats: each has its tokens, end and texts' prefix alone. Returns what was copied."""
    luck = random.Random(seed)
    requests = [random_request(luck) for _ in range(12)]
    recorder = TapeRecorder() if recorded else None
    engine = Engine(target, way[0], num_seats, CAPACITY, way[1], recorder)
    num_shared = 0
    for index, seat in serve(engine, requests, luck, leave=0.03):
        (alone,) = generate(target, [requests[index]]).outputs
        assert (seat.tokens, seat.finish_reason) == (alone.tokens, alone.finish_reason)
        num_shared += seat.num_shared
    assert engine.num_free == num_seats
    return num_shared


@pytest.mark.parametrize("method", METHODS)
def test_each_request_has_the_tokens_that_it_has_alone(
    target: TargetModel, ways: dict[str, tuple[NewDrafter, TreePlan]], method: str
) -> None:
    num_shared = 0

    @settings(max_examples=4, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32), st.integers(2, 5))
    def check(seed: int, num_seats: int) -> None:
        nonlocal num_shared
        num_shared += assert_as_alone(target, ways[method], seed, num_seats)

    check()
    assert num_shared > 0, "some prompts were copied from another seat"


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_trees_that_size_themselves(
    target: TargetModel, heads: dict[str, DraftNetwork], recorded: bool, seed: int
) -> None:
    """They choose anew as seats fill and empty; captured cycles among fixed shapes."""
    shapes = ("chain:2", "tree:4x6x24") if recorded else ()
    plan = auto_plan(fixed_shapes=shapes, step=0.05)
    assert_as_alone(target, (eagle(heads["eagle3"]), plan), seed, recorded=recorded)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "lookahead"])
def test_captured_cycles(target: TargetModel, ways: dict[str, tuple[NewDrafter, TreePlan]], method: str) -> None:
    """Recordings are for a power of two of seats, the last ones of which may be idle, or still read their prompts."""
    assert_as_alone(target, ways[method], seed=4, num_seats=4, recorded=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["off", "chain:3"])
def test_to_the_last_bit_on_a_cpu(dtype: torch.dtype, plan: str) -> None:
    """A row's own products and sums have the same bits beside any others, in any seat."""
    assert_as_alone(packed_target(dtype, "fused"), (ngram if plan != "off" else no_draft, TreePlan.parse(plan)), seed=5)


def test_prompts_are_read_in_chunks_between_cycles(
    target: TargetModel, drafters: dict[str, NewDrafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A running request gets a cycle in every step while another one's prompt is read."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 4)
    first, second = requests_for([[1, 2, 3], list(range(1, 31))], max_new_tokens=20, eos=())
    engine = Engine(target, drafters["eagle3"], 2, CAPACITY, TreePlan.chain(2))
    seat = engine.admit(first)
    engine.step()
    engine.admit(second)
    for _ in range(3):
        assert [event.seat for event in engine.step()] == [seat]


def test_a_seat_is_left_at_any_time_without_a_trace(
    target: TargetModel, drafters: dict[str, NewDrafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retired before its prompt is read, in the middle of it, and in the middle of its text."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK", 4)
    left, stays, comes = requests_for([list(range(9, 39)), [7, 7, 7], list(range(30, 50))], max_new_tokens=20)
    alone = run(target, [stays, comes])
    for num_steps in (0, 3, 12):
        engine = Engine(target, drafters["eagle3"], 3, CAPACITY, TreePlan.parse("tree:4x4x16"))
        seats = [engine.admit(request) for request in (left, stays)]
        for _ in range(num_steps):
            engine.step()
        engine.retire(seats[0])
        seats.append(engine.admit(comes))
        while not all(seat.finish_reason for seat in seats[1:]):
            engine.step()
        assert [seat.tokens for seat in seats[1:]] == alone
        assert engine.num_free == 3
        held = (value for value in engine._seats.__dict__.values() if isinstance(value, KVCache))
        assert all(not slab.any() for cache in held for slab in cache._slabs.values()), "slots are zeroed"


def test_rows_in_step_begin_together_however_long_their_prompts_are(
    target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read in several steps, and wait for each other."""

    class Greedy:
        in_step = True

        def __init__(self) -> None:
            self.rows: list[list[int]] = []

        def choose(self, rows: Sequence[int], logits: torch.Tensor, noise: torch.Tensor | None) -> list[int]:
            self.rows.append(list(rows))
            return logits.argmax(-1).tolist()

    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 8)
    requests = requests_for([[1, 2, 3, 4, 5], [9, 8, 7, 6], [7], list(range(1, 20))], max_new_tokens=6, eos=())
    steps = Greedy()
    in_step = [
        replace(request, sampling=replace(request.sampling, place=Place(steps, row)))
        for row, request in enumerate(requests)
    ]
    assert run(target, in_step, ngram, "chain:3") == run(target, requests)
    assert all(rows == [0, 1, 2, 3] for rows in steps.rows)


def test_a_request_that_cannot_be_seated_leaves_the_seat_as_it_was(
    target: TargetModel, drafters: dict[str, NewDrafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory runs out in the middle."""
    sampled, greedy = requests_for([[1, 2, 3]], temperature=1.0), requests_for([[4, 5], [6, 7]])
    engine = Engine(target, drafters["eagle3"], 2, CAPACITY, TreePlan.chain(2))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Noise, "__init__", lambda *_: (_ for _ in ()).throw(MemoryError()))
        engine.admit(sampled[0])
    assert engine.num_free == 2
    assert [seat.tokens for seat in Generation(engine, greedy).run().outputs] == run(target, greedy)


def test_a_larger_engine_serves_fewer_requests_at_once(target: TargetModel) -> None:
    engine = Engine(target, no_draft, 4, CAPACITY, TreePlan.off())
    requests = requests_for([[1], [2], [3]], max_new_tokens=5, eos=())
    generation = Generation(engine, requests, num_seats=1)
    assert max(sum(map(bool, committed.tokens)) for committed in generation.cycles()) == 1
    assert [seat.tokens for seat in generation.outputs] == run(target, requests)


def test_plans_of_too_many_levels_are_refused(target: TargetModel) -> None:
    with pytest.raises(ValueError, match="plan: expected at most 255 levels, got chain:256"):
        Engine(target, ngram, 1, CAPACITY, TreePlan.chain(256))


def test_who_cannot_be_seated(target: TargetModel) -> None:
    engine = Engine(target, no_draft, 1, CAPACITY, TreePlan.off())
    request, too_long = requests_for([[1, 2], [1] * CAPACITY])
    with pytest.raises(ValueError, match=r"max_new_tokens: the prompt has 64 tokens.*a seat's 64 tokens"):
        engine.admit(too_long)
    engine.admit(request)
    assert engine.admit(request) is None, "all seats are taken"


def test_more_requests_than_seats(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]]
) -> None:
    requests = requests_for(prompts * 2, temperature=0.7)
    for num_seats in (1, 3):
        generation = generate(target, requests, drafters["eagle3"], "tree:4x4x16", num_seats=num_seats)
        assert [output.tokens for output in generation.outputs] == run(target, requests)


# Sabotaged twins: each leaves something of a seat's last row behind, and the comparison above must notice.


def leave_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that moves leaves its last key and value behind."""
    copy_seat = KVCache.copy_seat
    monkeypatch.setattr(KVCache, "copy_seat", lambda self, source, goal, n: copy_seat(self, source, goal, n - 2))


def leave_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new row draws with the noise rows that its predecessor has made."""
    admit = Noise.admit

    def keep_rows(self: Noise, seat: int, seed: int) -> None:
        filled_to = self._filled_to[seat]
        admit(self, seat, seed)
        self._filled_to[seat] = filled_to

    monkeypatch.setattr(Noise, "admit", keep_rows)


def leave_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that moves is penalised for what was said in its new seat."""
    leave_behind(monkeypatch, "_seen", "_counts")


def leave_held_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that moves may end too early."""
    leave_behind(monkeypatch, "_held_until")


def leave_behind(monkeypatch: pytest.MonkeyPatch, *left: str) -> None:
    """Of a row's penalties, not all move with it."""
    by_seat, copy_seat = Penalties.by_seat, Penalties.copy_seat

    def keep(self: Penalties, source: int, goal: int, num_tokens: int) -> None:
        monkeypatch.setattr(Penalties, "by_seat", tuple(name for name in by_seat if name not in left))
        copy_seat(self, source, goal, num_tokens)
        monkeypatch.setattr(Penalties, "by_seat", by_seat)

    monkeypatch.setattr(Penalties, "copy_seat", keep)


def share_other_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another prompt's beginning is copied, whatever it says."""

    def any_other(self: Engine, prompt: Sequence[int]) -> tuple[Seat | None, int]:
        if not self._running:
            return None, 0
        lender = self._running[0]
        return lender, min(len(prompt) - 2, int(self._seats.lengths[lender.index]))

    monkeypatch.setattr(Engine, "_longest_shared", any_other)


@pytest.mark.parametrize("sabotage", [leave_slots, leave_noise, leave_penalties, leave_held_ends, share_other_text])
def test_sabotage_is_noticed(
    target: TargetModel,
    ways: dict[str, tuple[NewDrafter, TreePlan]],
    sabotage: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(6):
            assert_as_alone(target, ways["plain"], seed, num_seats=4)
