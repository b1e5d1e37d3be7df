"""Log-probabilities are those of plain decoding alone to the last bit, with any draft, plan, batch and recording."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import EOS, eagle, eagle_with_ngram, generate, ngram, no_draft, pairwise, plain_outputs, requests_for
from tape import TapeRecorder
from test_bits import packed_target

from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine import engine as engine_module
from draftwing.engine.engine import Engine, NewDrafter, Request, Seat
from draftwing.engine.generation import Generation
from draftwing.engine.logprobs import Scores, ScoresOnHost, TokenLogprobs
from draftwing.engine.tree import Verdict
from draftwing.engine.tree_plan import TreePlan
from draftwing.target.model import TargetModel

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 5, 6, 7], [3, 3, 3], [2, 4, 6, 8, 10, 12]]


def scored_requests(**sampling: float) -> list[Request]:
    """Requests that ask for some of the most probable tokens, for none beside their own, or for nothing."""
    wanted = (5, 0, None, 20, 2)
    requests = requests_for(PROMPTS, eos=(), **sampling)
    return [replace(one, num_logprobs=n, scores_prompt=n == 5) for one, n in zip(requests, wanted, strict=True)]


def scores_alone(target: TargetModel, requests: list[Request]) -> list[Seat]:
    return [plain_outputs(target, [request])[0] for request in requests]


def assert_same(outputs: list[Seat], alone: list[Seat]) -> None:
    for one, expected in zip(outputs, alone, strict=True):
        assert one.tokens == expected.tokens
        assert one.logprobs == expected.logprobs
        assert one.prompt_logprobs == expected.prompt_logprobs


def by_hand(target: TargetModel, text: list[int], num_top: int) -> list[TokenLogprobs]:
    """Of all of a text's tokens but the first, from one pass of the stock model."""
    with torch.inference_mode():
        log_probs = target.model(torch.tensor([text])).logits[0, :-1].float().log_softmax(-1)
    values, ids = log_probs.sort(dim=-1, descending=True, stable=True)
    rows = zip(text[1:], log_probs, values[:, :num_top].tolist(), ids[:, :num_top].tolist(), strict=True)
    return [TokenLogprobs(row[token].item(), list(zip(best, top, strict=True))) for token, row, top, best in rows]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_they_are_the_models_own(target: TargetModel, temperature: float) -> None:
    """Prompts of several chunks among them; biases and penalties change nothing."""
    requests = [
        replace(one, sampling=replace(one.sampling, logit_bias={5: 4.0}, repetition_penalty=1.3), scores_prompt=True)
        for one in scored_requests(temperature=temperature)
    ]
    for request, seat in zip(requests, scores_alone(target, requests), strict=True):
        num_top, num_prompt = request.num_logprobs or 0, len(request.prompt)
        expected = by_hand(target, [*request.prompt, *seat.tokens], num_top)
        assert seat.prompt_logprobs[0] is None
        found = [*seat.prompt_logprobs[1:], *seat.logprobs]
        assert len(found) == len(expected) if request.num_logprobs is not None else num_prompt - 1
        for one, right in zip(found, expected, strict=False):
            assert one.logprob == pytest.approx(right.logprob, rel=1e-5)
            assert [token for token, _ in one.top] == [token for token, _ in right.top]


@pytest.mark.parametrize(
    ("method", "temperature", "recorded"),
    pairwise(("eagle1", "eagle3", "medusa", "draft_model"), (0.0, 0.9), (False, True)),
)
def test_any_draft_gives_plain_decodings(
    target: TargetModel, drafters: dict[str, NewDrafter], method: str, temperature: float, recorded: bool
) -> None:
    requests = scored_requests(temperature=temperature)
    alone = scores_alone(target, requests)
    for plan in ("chain:3", "tree:4x4x16"):
        recorder = TapeRecorder() if recorded else None
        generation = generate(target, requests, drafters[method], plan, recorder=recorder, num_seats=3)
        assert_same(generation.outputs, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["off", "chain:3"])
def test_to_the_last_bit_on_a_cpu(dtype: torch.dtype, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are scored chunk by chunk here."""
    target, drafter = packed_target(dtype, "fused"), no_draft if plan == "off" else ngram
    requests = scored_requests(temperature=0.8)
    alone = scores_alone(target, requests)
    monkeypatch.setattr(engine_module, "SCORED_TOKENS", 2)
    assert_same(generate(target, requests, drafter, plan).outputs, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scored_prompt_has_the_bits_that_decoding_sees(dtype: torch.dtype) -> None:
    """So a greedy text, scored as a prompt, is the most probable one at each step by an exact comparison."""
    target = packed_target(dtype, "fused")
    decoded = scores_alone(target, scored_requests())
    for request, seat in zip(scored_requests(), decoded, strict=True):
        text = replace(request, prompt=[*request.prompt, *seat.tokens], scores_prompt=True, num_logprobs=20)
        (scored,) = scores_alone(target, [replace(text, stop=replace(text.stop, max_new_tokens=1))])
        behind = scored.prompt_logprobs[len(request.prompt) :]
        assert [one.top[0][0] for one in behind] == seat.tokens
        assert all(one.logprob == one.top[0][1] for one in behind)
        if request.num_logprobs is not None:
            assert [one.logprob for one in behind] == [one.logprob for one in seat.logprobs]


def test_there_is_one_for_each_token_that_is_emitted(target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
    """Texts are cut inside an accepted run."""
    requests = [
        replace(request, stop=replace(request.stop, max_new_tokens=limit, eos_token_ids=(EOS,)))
        for limit in (1, 2, 5, 9)
        for request in scored_requests(temperature=0.5)
    ]
    engine = Engine(target, eagle(heads["eagle3"]), 4, 64, TreePlan.parse("tree:4x4x16"))
    got: dict[int, list[TokenLogprobs]] = {}
    generation = Generation(engine, requests, num_seats=4)
    step = engine.step

    def watched() -> Any:
        events = step()
        for event in events:
            got.setdefault(id(event.seat), []).extend(event.logprobs)
        return events

    engine.step = watched  # type: ignore[method-assign]
    for seat in generation.run().outputs:
        assert len(seat.logprobs) == (0 if seat.request.num_logprobs is None else len(seat.tokens))
        assert got[id(seat)] == seat.logprobs


def test_of_equals_the_lowest_id_comes_first() -> None:
    logits = torch.tensor([[[1.0, 3.0, 3.0, 0.0, 3.0]]])
    scores = Scores.of(logits, torch.tensor([[2]]))
    (found,) = ScoresOnHost(*(part.numpy() for part in scores)).of_row(0, 3)
    assert [token for token, _ in found.top] == [1, 2, 4]
    assert found.logprob == found.top[0][1]


def test_how_many_may_be_asked_for(target: TargetModel) -> None:
    (request,) = requests_for([[1, 2]])
    for wrong in (-1, 21, True, 1.5):
        with pytest.raises(ValueError, match=r"num_logprobs: expected an integer from 0 to 20, got"):
            generate(target, [replace(request, num_logprobs=wrong)])  # type: ignore[arg-type]


def test_nothing_is_gathered_where_nobody_asks(
    target: TargetModel, heads: dict[str, DraftNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scores, "of", lambda *_: pytest.fail("nobody has asked"))
    generate(target, requests_for(PROMPTS), eagle_with_ngram(heads["eagle3"]), "tree:4x4x16")


def sabotage_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first nodes of a tree are scored instead of the accepted ones."""
    monkeypatch.setattr(Verdict, "along_path", lambda self, features: features[:, : self.path.shape[1]])


def sabotage_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's scores are another's."""
    of = Scores.of

    def rolled(logits: torch.Tensor, tokens: torch.Tensor) -> Scores:
        return of(logits.roll(1, 0), tokens)

    monkeypatch.setattr(Scores, "of", staticmethod(rolled))


@pytest.mark.parametrize("sabotage", [sabotage_path, sabotage_neighbour])
def test_sabotage_is_noticed(
    target: TargetModel, drafters: dict[str, NewDrafter], sabotage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = scored_requests(temperature=random.Random(1).random())
    alone = scores_alone(target, requests)
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(generate(target, requests, drafters["draft_model"], "tree:4x4x16").outputs, alone)
