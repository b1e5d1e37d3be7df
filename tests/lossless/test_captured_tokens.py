"""Captured cycles give plain decoding's tokens. On a CPU a tape stands for the CUDA graph: see TapeRecorder."""

import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from conftest import (
    auto_plan,
    eagle_with_ngram,
    generate,
    lookahead,
    ngram,
    no_draft,
    requests_for,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draftwing.checkpoint.load import DraftNetwork
from draftwing.decoding import lookups
from draftwing.decoding.captured import CapturedRows, CudaRecorder, Recorded, RowsPool, context_bound
from draftwing.decoding.experience import Experience
from draftwing.decoding.generate import Generation
from draftwing.decoding.lookups import LookupPlan, LookupTrial
from draftwing.decoding.pause import Pause
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.rows import DrafterFactory, Rows
from draftwing.models.kv_cache import KVCache
from draftwing.models.target import TargetModel

METHODS = ("eagle1", "eagle3", "medusa", "draft_model")
HOST_OPERATIONS = (
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,  # masks as indices
    torch.ops.aten.lift_fresh.default,  # torch.tensor(...): on a GPU a copy from the host
)


class Tape(TorchDispatchMode):
    """Operations with the tensors that they were called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_OPERATIONS:
            raise RuntimeError(f"a step turns to the host: {func}")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    @torch.inference_mode()
    def replay(self) -> None:
        """Run every operation again on the same storage; no line of Python between them runs."""
        for func, args, kwargs, output in self.calls:
            if "empty" in str(func):
                continue
            for old, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """What a CudaRecorder does, on a CPU: a replay is the same operations at the same addresses and nothing else."""

    def __init__(self, device: torch.device) -> None:
        self.num_recorded = 0

    def warm_up(self, steps: Callable[[], None]) -> None:
        steps()

    def record(self, step: Callable[[], Any]) -> Recorded[Any]:
        self.num_recorded += 1
        tape = Tape()
        with tape:
            result = step()
        return Recorded(result, tape.replay)


def captured(target: TargetModel, new_drafter: DrafterFactory, batch_size: int, capacity: int) -> CapturedRows:
    return CapturedRows(target, new_drafter, batch_size, capacity, TapeRecorder(target.device))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("plan", ["chain:4", "tree:4x4x16", "eagle1"])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_equal_plain_decoding(
    target: TargetModel,
    drafters: dict[str, DrafterFactory],
    prompts: list[list[int]],
    method: str,
    plan: str,
    temperature: float,
) -> None:
    requests = requests_for(prompts, temperature=temperature)
    eager = generate(target, requests, drafters[method], plan)
    replayed = generate(target, requests, drafters[method], plan, new_rows=captured)
    assert [output.tokens for output in replayed.outputs] == run(target, requests)
    assert replayed.statistics.accepted_at == eager.statistics.accepted_at  # and the same is drafted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plain_decoding_and_ngrams_are_captured_too(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], temperature: float
) -> None:
    requests = requests_for(prompts, temperature=temperature)
    plain = run(target, requests)
    merged = TreePlan.parse("tree:4x4x16").with_lookup()
    for drafter, plan in ((no_draft, "off"), (ngram, "chain:4"), (eagle_with_ngram(heads["eagle3"]), merged)):
        eager = generate(target, requests, drafter, plan)
        replayed = generate(target, requests, drafter, plan, new_rows=captured)
        assert [output.tokens for output in replayed.outputs] == plain
        assert replayed.statistics.accepted_at == eager.statistics.accepted_at


@pytest.mark.parametrize("plan", ["chain:5", "eagle1", "tree:4x4x16"])
def test_lookups_come_and_go_between_recordings(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], plan: str, monkeypatch: Any
) -> None:
    """A plan has one recording with its lookup and one without; what was looked up is learnt from in both."""
    monkeypatch.setattr(lookups, "TRIAL", 1)
    monkeypatch.setattr(lookups, "SHARE", 2.0)  # never enough: a pause after each trial
    requests, pool = requests_for(prompts, max_new_tokens=40, eos=(), temperature=1.0), RowsPool(TapeRecorder)
    plain, trials = run(target, requests), (LookupTrial(), LookupTrial())
    for trial in trials:
        trial.pause.length = 3
    for _ in range(2):
        eager, replayed = (
            generate(target, requests, eagle_with_ngram(heads["eagle3"]), LookupPlan(TreePlan.parse(plan), trial), rows)
            for trial, rows in zip(trials, (Rows, pool.take), strict=True)
        )
        assert tokens_of(eager) == plain == tokens_of(replayed)
        assert eager.statistics.accepted_at == replayed.statistics.accepted_at
        assert trials[0].pause == trials[1].pause != LookupTrial().pause


@pytest.mark.parametrize(
    "sampling", [{"top_k": 5}, {"top_p": 0.8, "min_p": 0.05}, {"repetition_penalty": 1.3}], ids=str
)
def test_sampling_parameters(
    target: TargetModel, drafters: dict[str, DrafterFactory], prompts: list[list[int]], sampling: dict[str, float]
) -> None:
    requests = requests_for(prompts, temperature=0.9, **sampling)
    assert tokens_of(generate(target, requests, drafters["eagle3"], "tree:4x4x16", new_rows=captured)) == run(
        target, requests
    )


@pytest.mark.parametrize("step", [0.05, 3.0])
def test_trees_that_size_themselves(
    target: TargetModel, drafters: dict[str, DrafterFactory], prompts: list[list[int]], step: float
) -> None:
    """Between fixed shapes, each with its recording, and through pauses, whose tokens the draft reads later."""
    requests = requests_for(prompts, max_new_tokens=60, eos=())
    plain, pool = run(target, requests), RowsPool(TapeRecorder)
    experience = Experience(pause=Pause(3))
    for _ in range(2):
        plan = auto_plan(len(prompts), experience, fixed_shapes=("chain:2", "tree:4x6x24"), step=step)
        assert tokens_of(generate(target, requests, drafters["eagle3"], plan, new_rows=pool.take)) == plain
    assert step < 1 or experience.pause.length > 3


def test_contexts_beyond_a_bound_are_recorded_anew(
    target: TargetModel, drafters: dict[str, DrafterFactory], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftwing.decoding.captured.SMALLEST_BOUND", 8)
    assert [context_bound(n, 1000) for n in (1, 8, 9, 13, 17, 25)] == [8, 8, 12, 16, 24, 32]
    assert context_bound(900, 1000) == 1000
    requests = requests_for(prompts, max_new_tokens=40, eos=())
    assert tokens_of(generate(target, requests, drafters["eagle3"], "tree:4x4x16", new_rows=captured)) == run(
        target, requests
    )


def test_recordings_serve_the_generations_that_follow(
    target: TargetModel, drafters: dict[str, DrafterFactory], prompts: list[list[int]]
) -> None:
    """With other prompts, seeds and temperatures: nothing of the last generation is left."""
    recorders: list[TapeRecorder] = []

    def new_recorder(device: torch.device) -> TapeRecorder:
        recorders.append(TapeRecorder(device))
        return recorders[-1]

    pool = RowsPool(new_recorder)
    for order, temperature in ((1, 0.8), (-1, 1.2), (1, 0.8)):
        requests = requests_for(prompts[::order], temperature=temperature)
        eager = generate(target, requests, drafters["eagle3"], "tree:4x4x16")
        replayed = generate(target, requests, drafters["eagle3"], "tree:4x4x16", new_rows=pool.take)
        assert tokens_of(replayed) == run(target, requests)
        assert replayed.statistics.accepted_at == eager.statistics.accepted_at
    assert [recorder.num_recorded for recorder in recorders] == [3, 3]  # draft, verify, commit; before that a trial


def test_a_generation_that_is_not_over_keeps_its_rows(
    target: TargetModel, drafters: dict[str, DrafterFactory], prompts: list[list[int]]
) -> None:
    requests, pool = requests_for(prompts, max_new_tokens=40, eos=()), RowsPool(TapeRecorder)
    plan = TreePlan.parse("chain:4")
    first = Generation(target, requests, drafters["eagle3"], plan, new_rows=pool.take)
    cycles = first.cycles()
    next(cycles)
    assert tokens_of(generate(target, requests, drafters["eagle3"], plan, new_rows=pool.take)) == run(target, requests)
    for _ in cycles:
        pass
    assert tokens_of(first) == run(target, requests)


def test_rows_are_lent_to_one_generation_at_a_time(
    target: TargetModel, drafters: dict[str, DrafterFactory], prompts: list[list[int]]
) -> None:
    """Also when a generation is closed where it stands, closed twice, or forgotten; a pool's rows end with it."""
    requests, pool = requests_for(prompts, max_new_tokens=20), RowsPool(TapeRecorder)

    start = partial(Generation, target, requests, drafters["eagle3"], TreePlan.chain(2), True, pool.take)

    first = start().run()
    first.close()
    second, third = start(), start()
    assert second._rows is first._rows
    assert third._rows is not second._rows
    next(second.cycles())
    second.close()
    assert start()._rows is second._rows
    rows = weakref.ref(third._rows)
    del pool, start
    third.close()
    del third
    assert rows() is None


def test_rows_made_in_inference_mode_serve_outside_of_it(
    target: TargetModel, drafters: dict[str, DrafterFactory], prompts: list[list[int]]
) -> None:
    requests, pool, experience = requests_for(prompts), RowsPool(TapeRecorder), Experience()
    for mode in (True, False):
        with torch.inference_mode(mode):
            plan = auto_plan(len(prompts), experience, fixed_shapes=("chain:2", "tree:4x6x24"))
            tokens = tokens_of(generate(target, requests, drafters["eagle3"], plan, new_rows=pool.take))
    assert tokens == run(target, requests)


def test_what_cannot_be_captured_is_decoded_without(
    target: TargetModel, drafters: dict[str, DrafterFactory], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_for(prompts)
    assert isinstance(RowsPool(TapeRecorder).take(target, lookahead, 1, 64), Rows)
    forward = TargetModel.forward_tree

    def forward_and_ask(self: TargetModel, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits.sum().item()
        return output

    monkeypatch.setattr(TargetModel, "forward_tree", forward_and_ask)
    pool = RowsPool(TapeRecorder)
    with pytest.warns(UserWarning, match="LlamaForCausalLM cannot be captured.*turns to the host"):
        rows = pool.take(target, drafters["eagle3"], 1, 64)
    assert type(rows) is Rows
    assert tokens_of(generate(target, requests, drafters["eagle3"], "chain:4", new_rows=pool.take)) == run(
        target, requests
    )


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
    target: TargetModel, drafters: dict[str, DrafterFactory], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_for(prompts)
    plain = run(target, requests)
    monkeypatch.setattr(KVCache, "commit", lose_the_place)
    assert tokens_of(generate(target, requests, drafters["eagle3"], "chain:4")) == plain
    assert tokens_of(generate(target, requests, drafters["eagle3"], "chain:4", new_rows=captured)) != plain


def tokens_of(generation: Generation) -> list[list[int]]:
    return [output.tokens for output in generation.outputs]
