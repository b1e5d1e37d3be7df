"""Same tokens as plain decoding, token by token, in float64: the first promise."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from conftest import (
    EOS,
    VOCAB_SIZE,
    accept_always,
    auto_plan,
    eagle,
    generate,
    language_model,
    pairwise,
    plain,
    requests_for,
    run,
    tiny_llama,
)

from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine.engine import NewDrafter
from draftwing.engine.noise import Noise
from draftwing.engine.sampling import SamplingParams
from draftwing.plans.lessons import Experience
from draftwing.plans.pauses import Pause
from draftwing.target import model as target_module
from draftwing.target.kv_cache import KVCache
from draftwing.target.model import TargetModel

PLANS = ("chain:1", "chain:4", "tree:2x3x7", "tree:4x4x16", "tree:10x3x60", "eagle1")
METHODS = ("eagle1", "eagle3", "medusa", "draft_model")


def test_plain_decoding_is_transformers_greedy(target: TargetModel, prompts: list[list[int]]) -> None:
    for prompt, tokens in zip(prompts, plain(target, requests_for(prompts)), strict=True):
        stock = target.model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )
        assert tokens == stock[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("method", "plan", "temperature"), pairwise(METHODS, PLANS, (0.0, 0.7, 1.3)))
def test_tokens_equal_plain_decoding(
    target: TargetModel,
    drafters: dict[str, NewDrafter],
    prompts: list[list[int]],
    method: str,
    plan: str,
    temperature: float,
) -> None:
    requests = requests_for(prompts, temperature=temperature)
    assert run(target, requests, drafters[method], plan) == plain(target, requests)


@pytest.mark.parametrize(
    ("method", "temperature", "fixed_shapes", "step"),
    pairwise(METHODS, (0.0, 1.3), ((), ("chain:2", "tree:4x6x24")), (0.05, 3.0)),
)
def test_trees_that_size_themselves_change_no_token(
    target: TargetModel,
    drafters: dict[str, NewDrafter],
    prompts: list[list[int]],
    method: str,
    temperature: float,
    fixed_shapes: tuple[str, ...],
    step: float,
) -> None:
    """Neither while drafting pays, nor when it does not, so that it pauses and is tried again."""
    requests = requests_for(prompts, temperature=temperature)
    experience = Experience(pause=Pause(3))
    plan = auto_plan(experience, fixed_shapes=fixed_shapes, step=step)
    generation = generate(target, requests, drafters[method], plan)
    assert [output.tokens for output in generation.outputs] == plain(target, requests)
    assert generation.statistics.acceptance_length > 1
    assert (experience.pause.length > 3) == (step > 1)


def test_the_drafts_of_these_tests_draft_well(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]]
) -> None:
    """Equality would be cheap if nothing were ever accepted."""
    for method in METHODS:
        statistics = generate(target, requests_for(prompts), drafters[method], "tree:4x4x16").statistics
        assert statistics.acceptance_length > 1.5


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 0.9, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "repetition_penalty": 0.8},
        {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"temperature": 0.8, "frequency_penalty": -0.4, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_sampling_parameters_keep_equality(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], sampling: dict[str, float]
) -> None:
    requests = requests_for(prompts, **sampling)
    assert run(target, requests, eagle(heads["eagle3"]), "tree:4x4x16") == plain(target, requests)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_transformers_own_modules(
    stock_target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], temperature: float
) -> None:
    """The pass of a model that nothing is written out for."""
    requests = requests_for(prompts, temperature=temperature)
    assert run(stock_target, requests, eagle(heads["eagle3"]), "tree:4x4x16") == plain(stock_target, requests)


@pytest.mark.parametrize(
    ("method", "plan", "temperature"),
    pairwise(("eagle3", "medusa", "draft_model"), ("chain:4", "tree:4x4x16", "eagle1"), (0.3, 1.0)),
)
def test_coupled_drafts_change_what_is_accepted_and_nothing_else(
    target: TargetModel,
    drafters: dict[str, NewDrafter],
    prompts: list[list[int]],
    method: str,
    plan: str,
    temperature: float,
) -> None:
    """Ranking candidates with the target's noise: the same tokens, with more of them drafted."""
    requests = requests_for(prompts, max_new_tokens=60, eos=(), temperature=temperature)
    coupled = generate(target, requests, drafters[method], plan)
    uncoupled = generate(target, requests, drafters[method], plan, coupled=False)
    assert [o.tokens for o in coupled.outputs] == [o.tokens for o in uncoupled.outputs] == plain(target, requests)
    assert coupled.statistics.acceptance_length > uncoupled.statistics.acceptance_length


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE - 14, VOCAB_SIZE + 16])
def test_a_draft_model_may_have_another_number_of_tokens(
    target: TargetModel, prompts: list[list[int]], vocab_size: int, temperature: float
) -> None:
    """The prompts hold the target's last ids, which the smaller vocabulary lacks."""
    draft_model = TargetModel(tiny_llama(seed=3, vocab_size=vocab_size), role="draft")
    requests = requests_for([[*prompt, VOCAB_SIZE - 1, 5] for prompt in prompts], temperature=temperature)
    assert run(target, requests, language_model(draft_model), "tree:4x4x16") == plain(target, requests)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("method", ["eagle1", "eagle3"])
def test_a_seed_decides_the_tokens_whatever_drafts(
    target: TargetModel,
    heads: dict[str, DraftNetwork],
    prompts: list[list[int]],
    method: str,
    temperature: float,
) -> None:
    """Coupled, uncoupled, with an untrained head or another tree: different drafts, the same tokens."""
    requests = requests_for(prompts, max_new_tokens=40, eos=(), temperature=temperature)
    head, untrained = eagle(heads[method]), eagle(untrained_like(heads[method]))
    runs = [
        generate(target, requests, head, "tree:4x4x16"),
        generate(target, requests, head, "tree:4x4x16", coupled=False),
        generate(target, requests, untrained, "tree:4x4x16"),
        generate(target, requests, head, "chain:2"),
    ]
    assert len({str([output.tokens for output in generation.outputs]) for generation in runs}) == 1
    assert len({generation.statistics.num_cycles for generation in runs}) == len(runs)


def untrained_like(head: DraftNetwork) -> DraftNetwork:
    """The same network with every weight matrix of its own drawn anew."""
    generator = torch.Generator().manual_seed(0)
    fresh = copy.deepcopy(head)
    with torch.no_grad():
        for weights in fresh.parameters():
            if weights.ndim > 1:
                weights.normal_(std=weights.shape[1] ** -0.5, generator=generator)
    return fresh


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_token_limit_is_exact(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], limit: int
) -> None:
    requests = requests_for(prompts, max_new_tokens=limit, eos=())
    outputs = run(target, requests, eagle(heads["eagle3"]), "tree:4x4x16")
    assert [len(tokens) for tokens in outputs] == [limit] * len(prompts)
    assert outputs == plain(target, requests)


def test_every_stop_position_is_exact(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]]
) -> None:
    """Each token of a plain run is made the end-of-sequence token in turn: the output ends where it first occurs."""
    (full,) = run(target, requests_for(prompts[2:3], eos=()))
    for eos in dict.fromkeys(full):
        (tokens,) = run(target, requests_for(prompts[2:3], eos=(eos,)), eagle(heads["eagle3"]), "tree:4x4x16")
        assert tokens == full[: full.index(eos) + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["eagle3", "medusa", "draft_model"])
def test_a_row_does_not_depend_on_its_batch(
    target: TargetModel, drafters: dict[str, NewDrafter], prompts: list[list[int]], method: str, temperature: float
) -> None:
    requests = requests_for(prompts, temperature=temperature)
    together = run(target, requests, drafters[method], "tree:4x4x16")
    for size in (1, 2, 3):
        groups = [requests[first : first + size] for first in range(0, 4, size)]
        apart = [tokens for group in groups for tokens in run(target, group, drafters[method], "tree:4x4x16")]
        assert apart == together


def test_rows_may_differ_in_their_parameters(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]]
) -> None:
    mixed = [
        dataclasses.replace(request, sampling=SamplingParams(temperature=temperature, top_k=top_k, seed=5))
        for request, temperature, top_k in zip(requests_for(prompts), (0, 1, 0.5, 2), (0, 3, 0, 10), strict=True)
    ]
    together = run(target, mixed, eagle(heads["eagle3"]), "tree:4x4x16")
    assert together == [run(target, [request])[0] for request in mixed]


def test_prompts_longer_than_a_prefill_chunk(
    target: TargetModel, heads: dict[str, DraftNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftwing.engine.engine.PREFILL_CHUNK", 4)
    prompts = [[1 + i % 60 for i in range(length)] for length in (4, 5, 6, 21)]
    requests = requests_for(prompts)
    chunked = run(target, requests, eagle(heads["eagle3"]), "tree:4x4x16")
    monkeypatch.undo()
    assert chunked == plain(target, requests)


# Sabotaged twins: each breaks one thing that equality rests on, and the comparison above must notice.


def break_acceptance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftwing.engine.seats.walk", accept_always)


def break_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the first nodes instead of the accepted ones."""
    original = KVCache.commit
    monkeypatch.setattr(
        KVCache, "commit", lambda self, path, num_kept, max_kept: original(self, None, num_kept, max_kept)
    )


def break_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every node of a tree read every other."""
    original = target_module.visible_slots
    monkeypatch.setattr(
        target_module,
        "visible_slots",
        lambda lengths, ancestors, num_read: original(lengths, torch.ones_like(ancestors), num_read),
    )


def break_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of the cycle's own count instead of the position: reused across positions."""
    original = Noise.at
    monkeypatch.setattr(Noise, "at", lambda self, positions: original(self, positions - positions[:, :1] + 1))


def test_noise_that_drafting_uses_up_is_noticed(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: noise from a generator with a state, which a coupled draft advances and an uncoupled one does not."""
    requests = requests_for(prompts, max_new_tokens=40, eos=(), temperature=0.7)
    outputs = []
    for coupled in (True, False):
        generator = torch.Generator().manual_seed(0)
        monkeypatch.setattr(
            Noise,
            "at",
            lambda self, positions, generator=generator: (
                -torch.empty(*positions.shape, target.vocab_size).exponential_(generator=generator).log()
            ),
        )
        generation = generate(target, requests, eagle(heads["eagle3"]), "tree:4x4x16", coupled)
        outputs.append([output.tokens for output in generation.outputs])
    assert outputs[0] != outputs[1]


@pytest.mark.parametrize("sabotage", [break_acceptance, break_cache, break_mask, break_noise])
@pytest.mark.parametrize("method", ["eagle3", "medusa", "draft_model"])
def test_sabotage_is_noticed(
    target: TargetModel,
    drafters: dict[str, NewDrafter],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    sabotage: Callable[[pytest.MonkeyPatch], None],
) -> None:
    requests = requests_for(prompts, max_new_tokens=40, temperature=0.7 if sabotage is break_noise else 0.0)
    expected = plain(target, requests)
    sabotage(monkeypatch)
    assert run(target, requests, drafters[method], "tree:4x4x16") != expected
