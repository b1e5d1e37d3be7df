"""Sampling follows the target's distribution: chi-square of three-token outputs over many seeds against enumeration."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from conftest import accept_always, eagle, generate, new_head, tiny_llama
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from draftwing.config import TrainConfig
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine.engine import Request
from draftwing.engine.sampling import Sampler, SamplingParams
from draftwing.engine.stopping import StopRule
from draftwing.target.model import TargetModel

NUM_SEEDS = 1000
PROMPT = [1, 2, 3]
SMALL_VOCAB = 5


@pytest.fixture(scope="module")
def small() -> tuple[TargetModel, DraftNetwork]:
    """A target of five tokens, so that all 125 three-token outputs can be enumerated, and an untrained head."""
    target = TargetModel(tiny_llama(seed=3, vocab_size=SMALL_VOCAB))
    config = TrainConfig(objective="eagle3", output="", target="unused", aux_layers=(1, 3, 5))
    torch.manual_seed(4)
    return target, new_head(config, target, []).double()


def enumerate_outputs(target: TargetModel, sampling: SamplingParams) -> dict[tuple[int, ...], float]:
    """P(output) of every three-token output, from the stock module and transformers' own warpers."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    prefixes = torch.tensor([[*PROMPT, *pair] for pair in product(range(SMALL_VOCAB), repeat=2)])
    with torch.inference_mode():
        logits = target.model(prefixes).logits[:, len(PROMPT) - 1 :]
    probs = torch.stack([warpers(prefixes, logits[:, step]).softmax(-1) for step in range(3)], dim=1)
    outputs = {}
    for row, (a, b) in enumerate(product(range(SMALL_VOCAB), repeat=2)):
        for c in range(SMALL_VOCAB):
            outputs[a, b, c] = float(probs[row, 0, a] * probs[row, 1, b] * probs[row, 2, c])
    return outputs


def sample_outputs(
    small: tuple[TargetModel, DraftNetwork], sampling: SamplingParams, num_seeds: int = NUM_SEEDS
) -> Counter[tuple[int, ...]]:
    """Counts of the outputs of so many seeds, with coupled drafts."""
    target, head = small
    counts: Counter[tuple[int, ...]] = Counter()
    for first in range(0, num_seeds, 500):
        seeds = range(first, first + 500)
        requests = [Request(PROMPT, SamplingParams(**(vars(sampling) | {"seed": s})), StopRule(3)) for s in seeds]
        generation = generate(target, requests, eagle(head), "tree:3x2x6", coupled=True)
        assert generation.statistics.acceptance_length > 1.05, "too few drafts are accepted to test them"
        counts.update(tuple(output.tokens) for output in generation.outputs)
    return counts


def chi_square_p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """P(a statistic at least this large) under the expected distribution; outputs expected < 5 times are pooled."""
    total = sum(counts.values())
    cells = [(counts[output], p * total) for output, p in expected.items() if p * total >= 5]
    rest = total - sum(count for count, _ in cells), total - sum(mean for _, mean in cells)
    cells += [rest] if rest[1] >= 1 else []
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = len(cells) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2.0)))


SETTINGS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.3),
    SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.2, min_p=0.15),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_outputs_follow_the_target(small: tuple[TargetModel, DraftNetwork], sampling: SamplingParams) -> None:
    expected = enumerate_outputs(small[0], sampling)
    counts = sample_outputs(small, sampling)
    assert math.isclose(sum(expected.values()), 1.0, rel_tol=1e-9)
    assert all(expected[output] > 0 for output in counts), "an output outside of the warped distribution"
    assert chi_square_p_value(counts, expected) > 0.001


def test_noise_that_ignores_the_position_is_noticed(
    small: tuple[TargetModel, DraftNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: every position draws with the same noise, so the tokens of one output are correlated."""
    from draftwing.engine.noise import Noise

    original = Noise.at
    monkeypatch.setattr(Noise, "at", lambda self, positions: original(self, torch.full_like(positions, len(PROMPT))))
    sampling = SamplingParams(temperature=1.3)
    assert chi_square_p_value(sample_outputs(small, sampling, 500), enumerate_outputs(small[0], sampling)) < 0.001


def test_emitting_the_coupled_drafts_is_noticed(
    small: tuple[TargetModel, DraftNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: the drafts, draws from the head's distribution with the target's noise, are never checked."""
    monkeypatch.setattr("draftwing.engine.seats.walk", accept_always)
    sampling = SamplingParams(temperature=1.3)
    assert chi_square_p_value(sample_outputs(small, sampling, 500), enumerate_outputs(small[0], sampling)) < 0.001


def test_a_wrong_temperature_is_noticed(
    small: tuple[TargetModel, DraftNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: the target's logits are sharpened a little."""
    original = Sampler._warp
    monkeypatch.setattr(Sampler, "_warp", lambda self, scores: original(self, scores * 1.3))
    sampling = SamplingParams(temperature=0.7)
    assert chi_square_p_value(sample_outputs(small, sampling, 500), enumerate_outputs(small[0], sampling)) < 0.001
