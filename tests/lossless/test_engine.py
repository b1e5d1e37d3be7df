"""Requests that come and go at any time get the tokens that each of them gets alone, whatever seat they hold."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

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
    plain,
    plain_outputs,
    requests_for,
    run,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tape import TapeRecorder
from test_bits import packed_target

from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine import engine as engine_module
from draftwing.engine import order as order_module
from draftwing.engine.engine import Engine, NewDrafter, Request, Seat
from draftwing.engine.generation import Generation
from draftwing.engine.noise import Noise
from draftwing.engine.order import Order
from draftwing.engine.penalties import Penalties
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.seats import Seats
from draftwing.engine.statistics import CycleCounts
from draftwing.engine.stepwise import Place
from draftwing.engine.stopping import StopRule
from draftwing.engine.tree_plan import Plan, TreePlan
from draftwing.target.kv_cache import KVCache
from draftwing.target.model import TargetModel

CAPACITY = 64
METHODS = ("plain", "eagle1", "eagle3", "eagle3+ngram", "medusa", "draft_model", "ngram", "lookahead")
SHARED = [5, 4, 3, 2, 1] * 5
"""What some of the prompts begin with, so that one can be copied from another's seat."""


@pytest.fixture(autouse=True)
def _short_prompts_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "LEAST_SHARED", 2)


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
    stop = StopRule(limit, (EOS,), min_new_tokens=luck.choice((0, 0, limit // 2)))
    return Request(prompt, sampling, stop, drafts=luck.random() < 0.7)


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
    target: TargetModel,
    way: tuple[NewDrafter, Plan],
    seed: int,
    num_seats: int = 3,
    recorded: bool = False,
    num_requests: int = 12,
) -> tuple[int, int]:
    """Random requests over some seats: each has its tokens, end and texts' prefix alone.

    Texts of odd seeds are kept when their seats are left. Returns what was copied, and the cycles of the engine.
    """
    luck = random.Random(seed)
    requests = [random_request(luck) for _ in range(num_requests)]
    recorder = TapeRecorder() if recorded else None
    engine = Engine(target, way[0], num_seats, CAPACITY, way[1], recorder, keeps=seed % 2 == 1)
    num_shared = num_cycles = 0
    cycle = engine._cycle

    def counted() -> Any:
        nonlocal num_cycles
        num_cycles += 1
        return cycle()

    engine._cycle = counted  # type: ignore[method-assign]
    for index, seat in serve(engine, requests, luck, leave=0.03):
        (alone,) = plain_outputs(target, [requests[index]])
        assert (seat.tokens, seat.finish_reason) == (alone.tokens, alone.finish_reason)
        num_shared += seat.num_shared
    assert engine.num_free == num_seats
    return num_shared, num_cycles


@pytest.mark.parametrize("method", METHODS)
def test_each_request_has_the_tokens_that_it_has_alone(
    target: TargetModel, ways: dict[str, tuple[NewDrafter, TreePlan]], method: str
) -> None:
    num_shared = 0

    @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32), st.integers(2, 5))
    @example(3, 5)  # whose prompts share beginnings, whatever the drafts
    def check(seed: int, num_seats: int) -> None:
        nonlocal num_shared
        num_shared += assert_as_alone(target, ways[method], seed, num_seats)[0]

    check()
    assert num_shared > 0, "some prompts were copied from another seat"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_thousands_of_cycles(
    target: TargetModel, ways: dict[str, tuple[NewDrafter, TreePlan]], dtype: torch.dtype
) -> None:
    """As above, for long: any method in float64, and in bfloat16 with the bits of a CPU those that need no draft."""
    methods = METHODS if dtype == torch.float64 else ("plain", "ngram", "lookahead")
    tried = target if dtype == torch.float64 else packed_target(dtype, "fused")
    num_cycles = 0

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from(methods))
    def check(seed: int, num_seats: int, method: str) -> None:
        nonlocal num_cycles
        num_cycles += assert_as_alone(tried, ways[method], seed, num_seats, num_requests=40)[1]

    check()
    assert num_cycles > 2000


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


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from(("plain", "eagle3+ngram", "draft_model", "medusa")))
def test_conversations_go_on_in_kept_seats(
    target: TargetModel, ways: dict[str, tuple[NewDrafter, TreePlan]], seed: int, num_seats: int, method: str
) -> None:
    """Each turn's prompt is the last one with its answer and more, or branches off from it; all is as if read anew."""
    luck = random.Random(seed)
    new_drafter, plan = ways[method]
    engine = Engine(target, new_drafter, num_seats, 128, plan, keeps=True)
    texts = [luck.choices(range(1, VOCAB_SIZE), k=8) for _ in range(3)]
    num_shared = 0
    for _ in range(10):
        chosen = luck.sample(range(3), k=luck.randint(1, min(3, num_seats)))
        turns = {}
        for number in chosen:
            kept = texts[number] if luck.random() < 0.7 else texts[number][: len(texts[number]) // 2]
            prompt = [*kept, *luck.choices(range(1, VOCAB_SIZE), k=luck.randint(1, 4))][-80:]
            request = replace(random_request(luck), prompt=prompt, stop=StopRule(luck.choice((1, 3, 6)), (EOS,)))
            turns[engine.admit(request)] = number
        while any(seat.finish_reason is None for seat in turns):
            engine.step()
        for seat, number in turns.items():
            assert [seat.tokens] == plain(target, [seat.request])
            texts[number] = [*seat.request.prompt, *seat.tokens]
            num_shared += seat.num_shared
    assert num_shared > 0 or num_seats == 1
    assert engine.num_free == num_seats
    assert_places_are_kept(engine)


def assert_places_are_kept(engine: Engine) -> None:
    """Nobody lies in two places, and what is free is clear."""
    order, lengths = engine._order, engine._seats.lengths
    lying = [seat for seat in order._at if seat is not None]
    assert sorted(map(id, lying)) == sorted(map(id, (*order.running, *order.reading, *order.kept)))
    assert all(order._at[seat.index] is seat for seat in lying)
    assert not any(lengths[index] for index, seat in enumerate(order._at) if seat is None)


def test_a_continued_text_goes_on_in_its_own_place(target: TargetModel, drafters: dict[str, NewDrafter]) -> None:
    """A text of which only the beginning is shared is copied, while there is another place; oldest texts give way."""
    engine = Engine(target, drafters["eagle3"], 2, 128, TreePlan.chain(3), keeps=True)

    def answer(prompt: list[int]) -> Seat:
        (request,) = requests_for([prompt], max_new_tokens=8, eos=())
        seat = engine.admit(request)
        while not seat.finish_reason:
            engine.step()
        assert [seat.tokens] == run(target, [request])
        assert_places_are_kept(engine)
        return seat

    first = answer(list(range(1, 21)))
    second = answer([*first.request.prompt, *first.tokens, 9, 9])
    assert second.num_shared == 27 and engine._order.kept == [second], "it went on where the first one was"
    third = answer([*range(1, 15), 60, 61])
    assert third.num_shared == 13 and engine._order.kept == [second, third], "the beginning was copied"
    fourth = answer(list(range(40, 60)))
    assert fourth.num_shared == 0 and engine._order.kept == [third, fourth], "the least recently used gave way"
    fifth = answer([*range(1, 12), 50])
    assert fifth.num_shared == 10 and engine._order.kept == [third, fifth]


def test_a_long_text_is_compared_quickly() -> None:
    text = list(range(1, 1001))
    for same in (0, 1, 255, 256, 257, 511, 999, 1000):
        other = [*text[:same], *[0] * (1000 - same)]
        assert order_module.num_same(text, other) == order_module.num_same(tuple(other), text) == same
        assert order_module.num_same(text, text[:same]) == same


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
        patch.setattr(Noise, "admit", lambda *_: (_ for _ in ()).throw(MemoryError()))
        engine.admit(sampled[0])
    assert engine.num_free == 2
    assert [seat.tokens for seat in Generation(engine, greedy).run().outputs] == run(target, greedy)


def test_a_larger_engine_serves_fewer_requests_at_once(target: TargetModel) -> None:
    engine = Engine(target, no_draft, 4, CAPACITY, TreePlan.off())
    requests = requests_for([[1], [2], [3]], max_new_tokens=5, eos=())
    generation = Generation(engine, requests, num_seats=1)
    assert max(sum(map(bool, committed.tokens)) for committed in generation.cycles()) == 1
    assert [seat.tokens for seat in generation.outputs] == run(target, requests)


def test_each_seat_counts_its_own_cycles(target: TargetModel, drafters: dict[str, NewDrafter]) -> None:
    requests = requests_for([[1, 2, 3], [4], [5, 6], [9, 9, 9]], temperature=0.6)
    generation = generate(target, requests, drafters["draft_model"], "tree:4x4x16", num_seats=2)
    total = CycleCounts()
    for seat in generation.outputs:
        assert seat.counts.num_tokens == len(seat.tokens)
        assert sum(seat.counts.histogram) == seat.counts.num_cycles
        assert 0 < seat.counts.num_accepted <= seat.counts.num_drafted == 15 * seat.counts.num_cycles
        total.num_cycles += seat.counts.num_cycles
        total.num_drafted += seat.counts.num_drafted
    statistics = generation.statistics
    assert (total.num_cycles, total.num_drafted) == (statistics.num_cycles, statistics.num_drafted)


@pytest.mark.parametrize("method", METHODS[1:])
def test_rows_that_want_no_drafts(
    target: TargetModel, ways: dict[str, tuple[NewDrafter, TreePlan]], method: str
) -> None:
    """Alone they are decoded plainly, before and after one that wants them; beside it all are drafted for."""
    plain, later, drafted = (
        replace(request, drafts=request.prompt == [7, 7]) for request in requests_for([[1, 2, 3], [5], [7, 7]], eos=())
    )
    engine = Engine(target, ways[method][0], 2, CAPACITY, ways[method][1])
    first = engine.admit(plain)
    for _ in range(8):
        engine.step()
    assert (first.counts.num_drafted, len(first.tokens)) == (0, 8)
    beside = engine.admit(drafted)
    while not (first.finish_reason and beside.finish_reason):
        engine.step()
    assert first.counts.num_drafted > 0 and beside.counts.num_drafted > 0
    last = engine.admit(later)
    while not last.finish_reason:
        engine.step()
    assert (last.counts.num_drafted, last.counts.num_cycles) == (0, len(last.tokens))
    assert [seat.tokens for seat in (first, beside, last)] == run(target, [plain, drafted, later])


def test_a_plan_that_learns_is_not_told_of_rows_that_want_no_drafts(
    target: TargetModel, heads: dict[str, DraftNetwork]
) -> None:
    plan = auto_plan()
    requests = [replace(request, drafts=False) for request in requests_for([[1, 2, 3], [4]])]
    generation = generate(target, requests, eagle(heads["eagle3"]), plan)
    assert generation.statistics.num_drafted == 0
    assert plan.expected_seconds == 0.0


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
    """A row that moves leaves its last keys and values behind."""
    exchange = KVCache.exchange
    monkeypatch.setattr(KVCache, "exchange", lambda self, first, second, n: exchange(self, first, second, n // 2))


def leave_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that moves draws with the noise rows that lie in its new seat."""

    def keep_rows(self: Noise, source: int, goal: int, num_tokens: int) -> None:
        self._seeds[goal], self._filled_to[goal] = self._seeds[source], self._filled_to[source]

    monkeypatch.setattr(Noise, "copy_seat", keep_rows)


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

    def any_other(self: Order, prompt: Sequence[int]) -> tuple[Seat | None, int]:
        if not self.running:
            return None, 0
        lender = self.running[0]
        return lender, min(len(prompt) - 2, int(self._seats.lengths[lender.index]))

    monkeypatch.setattr(Order, "lender", any_other)


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


def test_a_kept_text_of_which_too_much_stays_is_noticed(target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: the key and value of a token that another prompt does not have are left in its place."""
    first, second = requests_for([[*range(1, 21)], [*range(1, 11), *range(30, 40)]], eos=())
    expected = run(target, [second])

    def answer_both() -> list[list[int]]:
        engine = Engine(target, no_draft, 1, CAPACITY, TreePlan.off(), keeps=True)
        Generation(engine, [first]).run()
        (seat,) = Generation(engine, [second]).run().outputs
        assert seat.num_shared == 9
        return [seat.tokens]

    assert answer_both() == expected
    share = Seats.admit_behind
    monkeypatch.setattr(Seats, "admit_behind", lambda self, source, n, *row: share(self, source, n + 2, *row))
    assert answer_both() != expected
