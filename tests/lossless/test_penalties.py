"""Penalties and held ends on tree branches are those of a loop that runs the model once per token."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import EOS, generate, requests_for, run
from tape import TapeRecorder

from draftwing.api import SpeculativeModel
from draftwing.engine.engine import NewDrafter, Request
from draftwing.engine.noise import gumbel
from draftwing.engine.penalties import Penalties
from draftwing.target.model import TargetModel

PROMPTS = [[1, 2, 3, 4, 5], [7], [3, 3, 3, EOS, 8, 9]]
KINDS: list[dict[str, float]] = [
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.0},
    {"frequency_penalty": -1.0},
    {"presence_penalty": -0.5, "frequency_penalty": 1.5, "repetition_penalty": 1.4},
]


def penalised_requests(least: int = 6, temperature: float = 0.0, **penalties: float) -> list[Request]:
    """Requests whose texts would soon end if their ends were not held back, as a bias makes these likely."""
    requests = requests_for(PROMPTS, temperature=temperature, **penalties)
    return [
        replace(
            one,
            sampling=replace(one.sampling, logit_bias={EOS: 4.0}),
            stop=replace(one.stop, min_new_tokens=least),
        )
        for one in requests
    ]


@torch.inference_mode()
def by_hand(target: TargetModel, request: Request) -> list[int]:
    """A loop over the stock model: bias, repetition, what was said, held ends, noise."""
    sampling, stop, said = request.sampling, request.stop, list[int]()
    while len(said) < stop.max_new_tokens and EOS not in said:
        text = [*request.prompt, *said]
        scores = target.model(torch.tensor([text])).logits[0, -1]
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        for token in set(text):
            factor = sampling.repetition_penalty
            scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
        for token, count in Counter(said).items():
            scores[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
        if len(said) < stop.min_new_tokens:
            scores[EOS] = -torch.inf
        if sampling.temperature > 0:
            noise = gumbel(torch.tensor(sampling.seed), torch.tensor([len(text)]), torch.arange(len(scores)))[0]
            scores = scores / sampling.temperature + noise
        said.append(int(scores.argmax()))
    return said


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("penalties", KINDS, ids=str)
def test_plain_and_drafted_tokens_are_the_loops(
    target: TargetModel, drafters: dict[str, NewDrafter], penalties: dict[str, float], temperature: float
) -> None:
    requests = penalised_requests(temperature=temperature, **penalties)
    expected = [by_hand(target, request) for request in requests]
    assert run(target, requests) == expected
    ways = ("draft_model", "tree:4x4x16", None), ("eagle3", "chain:4", TapeRecorder()), ("draft_model", "eagle1", None)
    for method, plan, recorder in ways:
        outputs = generate(target, requests, drafters[method], plan, recorder=recorder, num_seats=2).outputs
        assert [seat.tokens for seat in outputs] == expected


@pytest.mark.parametrize("least", [0, 1, 2, 5, 24])
def test_no_text_ends_too_early(target: TargetModel, drafters: dict[str, NewDrafter], least: int) -> None:
    requests = penalised_requests(least)
    tokens = run(target, requests, drafters["draft_model"], "tree:4x4x16")
    assert tokens == [by_hand(target, request) for request in requests]
    assert all(EOS not in said[:least] for said in tokens)
    assert least == 24 or any(len(said) == least + 1 for said in tokens), "some would have ended before"


def test_they_are_options_of_generate(target: TargetModel) -> None:
    (request,) = penalised_requests(least=4, presence_penalty=2.0, frequency_penalty=0.5)[:1]
    options: dict[str, Any] = {"presence_penalty": 2.0, "frequency_penalty": 0.5, "min_new_tokens": 4}
    options |= {"logit_bias": {EOS: 4.0}, "max_new_tokens": 24, "eos_token_id": EOS}
    output = SpeculativeModel(target).generate([PROMPTS[0]], return_dict_in_generate=True, **options)
    assert output.tokens == [by_hand(target, request)]


def forget_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is committed counts, as some engines have it."""
    for name in ("_for_counts", "_for_repetition"):
        method = getattr(Penalties, name)
        forget = lambda self, scores, counts, method=method: method(self, scores, counts * 0)
        monkeypatch.setattr(Penalties, name, forget)


def forget_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is counted when it is committed."""
    monkeypatch.setattr(Penalties, "observe", lambda *_: None)


def hold_by_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes of a tree are treated as the root."""
    apply = Penalties.apply

    def at_root(self: Penalties, scores: Any, tree: Any, lengths: Any, work: Any) -> torch.Tensor:
        return apply(self, scores, replace(tree, depths=tree.depths * 0), lengths, work)

    monkeypatch.setattr(Penalties, "apply", at_root)


@pytest.mark.parametrize("sabotage", [forget_branches, forget_counts, hold_by_the_root])
def test_sabotage_is_noticed(
    target: TargetModel,
    drafters: dict[str, NewDrafter],
    sabotage: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = penalised_requests(frequency_penalty=1.0)
    sabotage(monkeypatch)
    found = run(target, requests, drafters["draft_model"], "tree:4x4x16")
    assert found != [by_hand(target, request) for request in requests]
