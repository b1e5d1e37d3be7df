"""Captured cycles give plain decoding's tokens. On a CPU a tape stands for the CUDA graph: see tape.py."""

import re
import time
import warnings
import weakref
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    auto_plan,
    eagle_with_ngram,
    generate,
    lookahead,
    ngram,
    no_draft,
    pairwise,
    plain,
    requests_for,
    run,
)
from tape import TapeRecorder

from draftwing import api
from draftwing.api import SpeculativeModel
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine import captured, kept_engines, memory
from draftwing.engine import engine as engine_module
from draftwing.engine.captured import CapturedSeats, CudaRecorder, context_bound
from draftwing.engine.engine import Engine, NewDrafter
from draftwing.engine.generation import Generation
from draftwing.engine.readback import CycleFacts, CycleReading, CycleReport
from draftwing.engine.tree_plan import TreePlan
from draftwing.plans import pauses
from draftwing.plans.auto import AutoPlan
from draftwing.plans.lessons import Experience
from draftwing.plans.pauses import LookupPlan, LookupTrial, Pause
from draftwing.target.kv_cache import KVCache
from draftwing.target.model import TargetModel

CAPACITY = 80
METHODS = ("eagle1", "eagle3", "medusa", "draft_model")


@pytest.mark.parametrize(
    ("method", "plan", "temperature"), pairwise(METHODS, ("chain:4", "tree:4x4x16", "eagle1"), (0.0, 1.0))
)
def test_tokens_equal_plain_decoding(
    target: TargetModel,
    drafters: dict[str, NewDrafter],
    prompts: list[list[int]],
    method: str,
    plan: str,
    temperature: float,
) -> None:
    requests = requests_for(prompts, temperature=temperature)
    eager = generate(target, requests, drafters[method], plan)
    replayed = generate(target, requests, drafters[method], plan, recorder=TapeRecorder())
    assert [output.tokens for output in replayed.outputs] == plain(target, requests)
    assert replayed.statistics.accepted_at == eager.statistics.accepted_at  # and the same is drafted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plain_decoding_and_ngrams_are_captured_too(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], temperature: float
) -> None:
    requests = requests_for(prompts, temperature=temperature)
    expected = plain(target, requests)
    merged = TreePlan.parse("tree:4x4x16").with_lookup()
    for drafter, plan in ((no_draft, "off"), (ngram, "chain:4"), (eagle_with_ngram(heads["eagle3"]), merged)):
        eager = generate(target, requests, drafter, plan)
        replayed = generate(target, requests, drafter, plan, recorder=TapeRecorder())
        assert [output.tokens for output in replayed.outputs] == expected
        assert replayed.statistics.accepted_at == eager.statistics.accepted_at


@pytest.mark.parametrize("plan", ["chain:5", "eagle1", "tree:4x4x16"])
def test_lookups_come_and_go_between_recordings(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], plan: str, monkeypatch: Any
) -> None:
    """A plan has one recording with its lookup and one without; what was looked up is learnt from in both."""
    monkeypatch.setattr(pauses, "TRIAL", 1)
    monkeypatch.setattr(pauses, "SHARE", 2.0)  # never enough: a pause after each trial
    requests = requests_for(prompts, max_new_tokens=40, eos=(), temperature=1.0)
    expected, trials = plain(target, requests), (LookupTrial(), LookupTrial())
    for trial in trials:
        trial.pause.length = 3
    for _ in range(2):
        eager, replayed = (
            generate(
                target,
                requests,
                eagle_with_ngram(heads["eagle3"]),
                LookupPlan(TreePlan.parse(plan), trial),
                recorder=recorder,
            )
            for trial, recorder in zip(trials, (None, TapeRecorder()), strict=True)
        )
        assert tokens_of(eager) == expected == tokens_of(replayed)
        assert eager.statistics.accepted_at == replayed.statistics.accepted_at
        assert trials[0].pause == trials[1].pause != LookupTrial().pause


def test_recordings_are_in_no_measured_time(target: TargetModel, prompts: list[list[int]]) -> None:
    """They take longer than cycles; what they took, a trial with them, is told apart, and only once."""
    engine = Engine(target, no_draft, 4, CAPACITY, TreePlan.off(), TapeRecorder())
    requests = requests_for(prompts, max_new_tokens=6, eos=())
    first, second = (Generation(engine, requests).run().statistics for _ in range(2))
    assert first.recording_seconds > 0
    assert second.recording_seconds == 0


def test_what_the_device_still_does_is_in_no_recordings_time(
    target: TargetModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's pass may be queued when a recording begins; the clock starts behind it. Replays wait for nothing."""
    waits: list[float] = []

    def idle_since(device: torch.device) -> float:
        assert device == target.device
        waits.append(1000.0)
        return time.perf_counter() + 1000.0  # as if what is queued were done then

    for module in (captured, engine_module):
        monkeypatch.setattr(module, "idle_since", idle_since)
    engine = Engine(target, no_draft, 4, CAPACITY, TreePlan.off(), TapeRecorder())
    assert len(waits) == 1, "the trial"
    requests = requests_for(prompts[:1], max_new_tokens=6, eos=())
    seconds = [Generation(engine, requests).run().statistics.recording_seconds for _ in range(2)]
    assert -sum(waits) < seconds[0] < 10 - sum(waits)
    assert len(waits) == 2 and seconds[1] == 0


def test_the_clock_starts_when_the_device_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 5.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.update(now=clock["now"] + 7))
    assert captured.idle_since(torch.device("cpu")) == 5
    assert captured.idle_since(torch.device("cuda")) == 12


@pytest.mark.parametrize("ends_early", [False, True])
def test_lessons_are_drawn_while_the_device_is_busy(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]], ends_early: bool, monkeypatch: Any
) -> None:
    """From each cycle once the next is launched, from the last at the end; from what it was, not what came after."""
    requests = requests_for(prompts[:2], max_new_tokens=30, eos=())
    expected_tokens = plain(target, requests)
    events: list[str] = []
    facts: list[tuple[CycleFacts, CycleFacts]] = []
    commit, result, learn = CapturedSeats.commit, CycleReading.result, AutoPlan.learn
    monkeypatch.setattr(CapturedSeats, "commit", lambda *given: (events.append("launched"), commit(*given))[1])
    monkeypatch.setattr(CycleReading, "result", lambda reading: (events.append("read"), result(reading))[1])

    def compared(plan: AutoPlan, report: CycleReport) -> None:
        at_once = deepcopy(report.facts())

        def later() -> CycleFacts:
            events.append("studied")
            facts.append((at_once, report.facts()))
            return facts[-1][1]

        learn(plan, replace(report, facts=later))

    monkeypatch.setattr(AutoPlan, "learn", compared)
    plan = auto_plan(fixed_shapes=["chain:2", "tree:4x4x16"], largest=TreePlan(4, 4, 16), node=0.001, step=0.001)
    engine = Engine(target, drafters["eagle3"], 2, CAPACITY, plan, TapeRecorder())
    generation = Generation(engine, requests)
    if ends_early:
        for _ in zip(generation.cycles(), range(6), strict=False):
            pass
        generation.close()
    else:
        assert tokens_of(generation.run()) == expected_tokens
    assert re.fullmatch("(launched (studied )?read )+(studied )?", "".join(f"{event} " for event in events))
    assert events.count("studied") >= (2 if ends_early else 3)
    assert not engine._deferred
    for before, after in facts:
        assert all(np.array_equal(vars(before)[name], vars(after)[name]) for name in vars(before))


@pytest.mark.parametrize(
    "sampling", [{"top_k": 5}, {"top_p": 0.8, "min_p": 0.05}, {"repetition_penalty": 1.3}], ids=str
)
def test_sampling_parameters(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]], sampling: dict[str, float]
) -> None:
    requests = requests_for(prompts, temperature=0.9, **sampling)
    assert tokens_of(generate(target, requests, drafters["eagle3"], "tree:4x4x16", recorder=TapeRecorder())) == run(
        target, requests
    )


@pytest.mark.parametrize("step", [0.05, 3.0])
def test_trees_that_size_themselves(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]], step: float
) -> None:
    """Between fixed shapes, each with its recording, and through pauses, whose tokens the draft reads later."""
    requests = requests_for(prompts, max_new_tokens=60, eos=())
    expected, experience = plain(target, requests), Experience(pause=Pause(3))
    plan = auto_plan(experience, fixed_shapes=("chain:2", "tree:4x6x24"), step=step)
    engine = Engine(target, drafters["eagle3"], len(prompts), CAPACITY, plan, TapeRecorder())
    for _ in range(2):
        engine.plan = auto_plan(experience, fixed_shapes=("chain:2", "tree:4x6x24"), step=step)
        assert tokens_of(Generation(engine, requests).run()) == expected
    assert step < 1 or experience.pause.length > 3


def test_contexts_beyond_a_bound_are_recorded_anew(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftwing.engine.captured.SMALLEST_BOUND", 8)
    assert [context_bound(n, 1000) for n in (1, 8, 9, 13, 17, 25)] == [8, 8, 12, 16, 24, 32]
    assert context_bound(900, 1000) == 1000
    requests = requests_for(prompts, max_new_tokens=40, eos=())
    assert tokens_of(generate(target, requests, drafters["eagle3"], "tree:4x4x16", recorder=TapeRecorder())) == run(
        target, requests
    )


def test_recordings_serve_the_generations_that_follow(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]]
) -> None:
    """With other prompts, seeds and temperatures: nothing of the last generation is left."""
    recorder, plan = TapeRecorder(), TreePlan.parse("tree:4x4x16")
    engine = Engine(target, drafters["eagle3"], len(prompts), CAPACITY, plan, recorder)
    for order, temperature in ((1, 0.8), (-1, 1.2), (1, 0.8)):
        requests = requests_for(prompts[::order], eos=(), temperature=temperature)
        eager = generate(target, requests, drafters["eagle3"], plan)
        replayed = Generation(engine, requests).run()
        assert tokens_of(replayed) == plain(target, requests)
        assert replayed.statistics.accepted_at == eager.statistics.accepted_at
        assert recorder.num_recorded <= 3 * 4, "draft, verify, commit for 4, 2 and 1 rows; before that a trial"


def test_a_generation_that_is_closed_leaves_its_engine_free(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]]
) -> None:
    """Closed where it stands, and once more; it is given back once."""
    requests, given_back = requests_for(prompts, max_new_tokens=20), []
    engine = Engine(target, drafters["eagle3"], len(prompts), CAPACITY, TreePlan.chain(2), TapeRecorder())
    generation = Generation(engine, requests, given_back.append)
    next(generation.cycles())
    for _ in range(2):
        generation.close()
    assert generation.is_done and given_back == [engine] and engine.num_free == len(prompts)
    assert tokens_of(Generation(engine, requests).run()) == plain(target, requests)


def test_an_engine_made_in_inference_mode_serves_outside_of_it(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]]
) -> None:
    requests, experience = requests_for(prompts), Experience()
    plan = auto_plan(experience, fixed_shapes=("chain:2", "tree:4x6x24"))
    with torch.inference_mode():
        engine = Engine(target, drafters["eagle3"], len(prompts), CAPACITY, plan, TapeRecorder())
        Generation(engine, requests).run()
    assert tokens_of(Generation(engine, requests).run()) == plain(target, requests)


def test_what_cannot_be_captured_is_decoded_without(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, recorder = requests_for(prompts), TapeRecorder()
    generate(target, requests, lookahead("lookahead:3x3x3"), "lookahead:3x3x3", recorder=recorder)
    assert recorder.num_recorded == 0
    forward = TargetModel.forward_tree

    def forward_and_ask(self: TargetModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits.sum().item()
        return output

    monkeypatch.setattr(TargetModel, "forward_tree", forward_and_ask)
    with pytest.warns(UserWarning, match="LlamaForCausalLM cannot be captured.*turns to the host"):
        generation = generate(target, requests, drafters["eagle3"], "chain:4", recorder=TapeRecorder())
    assert tokens_of(generation) == plain(target, requests)


def test_only_so_many_cycles_stay_recorded(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server runs for weeks, with every number of seats and every context; what is used stays."""
    monkeypatch.setattr(captured, "MOST_RECORDINGS", 2)
    requests, recorder = requests_for(prompts, eos=()), TapeRecorder()
    engine = Engine(target, drafters["eagle3"], len(prompts), CAPACITY, TreePlan.chain(2), recorder)
    for plan in (TreePlan.chain(2), TreePlan.parse("tree:4x4x16"), TreePlan.chain(2)):
        engine.plan = plan
        assert tokens_of(Generation(engine, requests).run()) == plain(target, requests)
        assert len(engine._recordings) == 2
    num_recorded = recorder.num_recorded
    one_row = requests_for(prompts[:1], eos=())
    for _ in range(2):
        assert tokens_of(Generation(engine, one_row).run()) == plain(target, one_row)
    assert recorder.num_recorded == num_recorded


def test_a_recording_that_fails_without_a_word_is_told_by_its_kind(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]]
) -> None:
    class Silent(TapeRecorder):
        def record(self, step: Any) -> Any:
            try:
                next(iter(()))
            except StopIteration:
                raise RuntimeError("the capture has ended")  # noqa: B904 - as the end of a capture does

    requests = requests_for(prompts[:1])
    with pytest.warns(UserWarning, match="cannot be captured, so cycles are slower: StopIteration"):
        generation = generate(target, requests, drafters["eagle3"], "chain:2", recorder=Silent())
    assert tokens_of(generation) == plain(target, requests)


class FullRecorder(TapeRecorder):
    """Has memory for so many recordings, behind the trial's three."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.held = most, 0

    def record(self, step: Any) -> Any:
        if self.num_recorded >= 3 and self.held >= self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        recorded = super().record(step)
        self.held += 1
        weakref.finalize(recorded, self._lose)
        return recorded

    def _lose(self) -> None:
        self.held -= 1


def test_a_full_memory_is_given_to_the_cycle_that_needs_it(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]]
) -> None:
    """With room for one cycle each is recorded when it comes, without a warning."""
    requests = requests_for(prompts[:1], eos=())
    engine = Engine(target, drafters["eagle3"], 1, CAPACITY, TreePlan.chain(3), FullRecorder(3))
    for plan in (TreePlan.chain(2), TreePlan.chain(3), TreePlan.chain(2)):
        engine.plan = plan
        assert tokens_of(Generation(engine, requests).run()) == plain(target, requests)
        assert len(engine._recordings) == 1 and None not in engine._recordings.values()


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_cycle_that_cannot_be_recorded_runs_as_it_is_written(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]], most: int
) -> None:
    """A full memory ends no request: the other recordings give theirs up, then cycles are slower."""
    requests = requests_for(prompts, temperature=0.8)
    engine = Engine(
        target, drafters["eagle3"], len(prompts), CAPACITY, TreePlan.parse("tree:4x4x16"), FullRecorder(most)
    )
    with pytest.warns(UserWarning, match="a cycle cannot be recorded, so it is slower: CUDA out of memory"):
        for _ in range(2):
            assert tokens_of(Generation(engine, requests).run()) == plain(target, requests)
    assert set(engine._recordings.values()) == {None}
    assert tokens_of(Generation(engine, requests).run()) == plain(target, requests), "and nothing is tried again"


def test_idle_engines_are_few_and_no_larger_than_memory_allows(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds all of its seats' memory; they are rounded up, so that they serve others, only where there is room."""
    model = SpeculativeModel(target, heads["eagle3"])
    monkeypatch.setattr(model, "_captures", True)
    monkeypatch.setattr(api, "CudaRecorder", lambda device: TapeRecorder())
    for window in (5, 6, 7):
        model.generate(prompts[:1], max_new_tokens=2, plan="chain:2", draft_window=window)
    assert len(model._kept) == kept_engines.MOST_KEPT
    sizes = []
    for window in (8, 9, 10):
        generation = model.start(prompts[:3], max_new_tokens=4, plan="chain:2", draft_window=window)
        sizes.append((generation._engine.num_seats, generation._engine.capacity))
        generation.run()
        monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    assert sizes[0] == (4, kept_engines.SMALLEST_CAPACITY)
    longest = max(map(len, prompts[:3])) + 4
    assert sizes[1:] == [(3, longest)] * 2
    assert len(model._kept) == 1, "those before gave their memory up"


def test_the_watch_for_what_turns_to_the_host_is_silent_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of its debug mode once; here, as in every test, a warning is an error."""
    modes: list[object] = [0]

    def set_mode(mode: object) -> None:
        modes.append(mode)
        if len(modes) == 2:
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    def turn_to_the_host() -> None:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(CudaRecorder, "_on_stream", lambda self: nullcontext())
    recorder = object.__new__(CudaRecorder)  # a new one asks the device for a stream
    with pytest.raises(RuntimeError, match="synchronizing"):
        recorder.warm_up(turn_to_the_host)
    assert modes == [0, "error", 0]


def lose_the_place(self: KVCache, path: torch.Tensor | None, num_kept: torch.Tensor, max_kept: int) -> None:
    """A commit that counts in new storage, which a recording does not see."""
    lengths = self.lengths
    KEEP_THE_PLACE(self, path, num_kept, max_kept)
    self.lengths = lengths.clone()
    lengths -= num_kept


KEEP_THE_PLACE = KVCache.commit


def test_sabotage_is_noticed(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_for(prompts[1:2])  # nothing is read and nobody leaves: eager cycles find the new storage again
    expected = plain(target, requests)
    monkeypatch.setattr(KVCache, "commit", lose_the_place)
    assert tokens_of(generate(target, requests, drafters["eagle3"], "chain:4")) == expected
    assert tokens_of(generate(target, requests, drafters["eagle3"], "chain:4", recorder=TapeRecorder())) != expected


def tokens_of(generation: Generation) -> list[list[int]]:
    return [output.tokens for output in generation.outputs]
