"""Same tokens as plain decoding with Lookahead decoding, whose passes hold guesses beside the drafts; in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import generate, lookahead, plain, requests_for, run
from test_tokens import break_acceptance, break_cache, break_mask, break_noise

from draftwing.drafts import lookahead as lookahead_module
from draftwing.drafts.lookahead import LookaheadDrafter
from draftwing.engine.tree import DraftTree
from draftwing.target.model import TargetModel

PLANS = ("lookahead:1x2x1", "lookahead:5x2x3", "lookahead:4x3x4", "lookahead:7x4x3", "lookahead:3x5x8")
PLAN = "lookahead:7x4x5"


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
@pytest.mark.parametrize("plan", PLANS)
def test_tokens_equal_plain_decoding(
    target: TargetModel, prompts: list[list[int]], plan: str, temperature: float
) -> None:
    requests = requests_for(prompts, max_new_tokens=40, temperature=temperature)
    assert run(target, requests, lookahead(plan), plan) == plain(target, requests)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.0, "repetition_penalty": 1.3}, {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 0.8}],
    ids=str,
)
def test_sampling_parameters_keep_equality(
    target: TargetModel, prompts: list[list[int]], sampling: dict[str, float]
) -> None:
    requests = requests_for(prompts, max_new_tokens=40, **sampling)
    assert run(target, requests, lookahead(PLAN), PLAN) == plain(target, requests)


def test_its_ngrams_are_accepted(target: TargetModel, prompts: list[list[int]]) -> None:
    """Equality would be cheap if nothing were ever accepted."""
    requests = requests_for(prompts, max_new_tokens=120, eos=())
    statistics = generate(target, requests, lookahead(PLAN), PLAN).statistics
    assert statistics.acceptance_length > 1.5
    assert len(statistics.acceptance_rate) == 3, "guesses that lie deeper than the n-grams count for nothing"


def test_a_row_does_not_depend_on_its_batch(target: TargetModel, prompts: list[list[int]]) -> None:
    requests = requests_for(prompts, max_new_tokens=40, temperature=0.7)
    together = run(target, requests, lookahead(PLAN), PLAN)
    assert together == [run(target, [request], lookahead(PLAN), PLAN)[0] for request in requests]


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_token_limit_is_exact(target: TargetModel, prompts: list[list[int]], limit: int) -> None:
    requests = requests_for(prompts, max_new_tokens=limit, eos=())
    assert run(target, requests, lookahead(PLAN), PLAN) == plain(target, requests)


def test_every_stop_position_is_exact(target: TargetModel, prompts: list[list[int]]) -> None:
    (full,) = run(target, requests_for(prompts[:1], max_new_tokens=60, eos=()))
    ends = dict.fromkeys(full)
    requests = [requests_for(prompts[:1], max_new_tokens=60, eos=(end,))[0] for end in ends]
    for end, tokens in zip(ends, run(target, requests, lookahead(PLAN), PLAN), strict=True):
        assert tokens == full[: full.index(end) + 1]


def test_guesses_reach_past_the_models_last_position(target: TargetModel) -> None:
    """The window looks further ahead than the model has positions."""
    limit = target.max_positions
    assert limit is not None
    requests = requests_for([[1 + i % 60 for i in range(limit - 12)]], max_new_tokens=12, eos=())
    assert run(target, requests, lookahead(PLAN), PLAN) == plain(target, requests)


# Sabotaged twins: each breaks one thing that equality rests on, and the comparison above must notice.


def break_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hangs every n-gram below the root on its own, so that siblings are equal."""

    def keep_apart(ngrams: torch.Tensor, is_found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_ngrams, depth = ngrams.shape[1:]
        nodes = 1 + torch.arange(num_ngrams * depth).view(1, num_ngrams, depth).expand_as(ngrams)
        parents = torch.cat((torch.zeros_like(nodes[..., :1]), nodes[..., :-1]), -1)
        return parents, is_found[..., None].expand_as(ngrams)

    monkeypatch.setattr(lookahead_module, "_merge_prefixes", keep_apart)


def break_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets guesses be accepted, which equal drafts and each other."""
    original = LookaheadDrafter.grow

    def grow(self: LookaheadDrafter, *args: object) -> DraftTree:
        tree = original(self, *args)  # type: ignore[arg-type]
        return replace(tree, valid=torch.ones_like(tree.valid), max_depth=tree.num_generations)

    monkeypatch.setattr(LookaheadDrafter, "grow", grow)


@pytest.mark.parametrize("sabotage", [break_acceptance, break_cache, break_mask, break_noise])
def test_sabotage_is_noticed(
    target: TargetModel,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    sabotage: Callable[[pytest.MonkeyPatch], None],
) -> None:
    requests = requests_for(prompts, max_new_tokens=80, eos=(), temperature=0.7 if sabotage is break_noise else 0.0)
    expected = plain(target, requests)
    sabotage(monkeypatch)
    assert run(target, requests, lookahead(PLAN), PLAN) != expected


@pytest.mark.parametrize("sabotage", [break_prefixes, break_guesses])
def test_equal_siblings_are_noticed(
    target: TargetModel,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    sabotage: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """More nodes are accepted than a path has, which the cycle cannot even index."""
    sabotage(monkeypatch)
    with pytest.raises(RuntimeError, match="out of bounds"):
        run(target, requests_for(prompts, max_new_tokens=80, eos=()), lookahead(PLAN), PLAN)
