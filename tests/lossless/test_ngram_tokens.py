"""Same tokens as plain decoding with looked-up n-grams, alone and merged into EAGLE trees; in float64."""

from collections.abc import Callable

import pytest
import torch
from conftest import auto_plan, eagle, eagle_with_ngram, generate, ngram, pairwise, plain, requests_for, run

from draftwing.drafts import ngram as ngram_module
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine.engine import NewDrafter
from draftwing.engine.tree import Candidates, Overlap
from draftwing.engine.tree_plan import TreePlan
from draftwing.target.model import TargetModel

CHAINS = ("chain:1", "chain:6")
TEMPERATURES = (0.0, 0.7, 1.3)
MERGED = ("chain:1", "chain:3", "tree:2x3x7", "tree:4x4x16", "tree:10x3x60", "eagle1")


def method_of(heads: dict[str, DraftNetwork], method: str, plan: str) -> tuple[NewDrafter, TreePlan]:
    if method == "ngram":
        return ngram, TreePlan.parse(plan)
    return eagle_with_ngram(heads[method]), TreePlan.parse(plan).with_lookup()


@pytest.fixture(scope="module")
def repetitive() -> list[list[int]]:
    """Ragged prompts with something to find in each but the second."""
    return [[1, 2, 3, 4] * 4, [7], [9, 8, 7, 6, 5, 4, 9, 8, 7, 6], [3, 3, 3]]


@pytest.mark.parametrize(
    ("method", "plan", "temperature"),
    pairwise(["ngram"], CHAINS, TEMPERATURES) + pairwise(["eagle1", "eagle3"], MERGED, TEMPERATURES),
)
def test_tokens_equal_plain_decoding(
    target: TargetModel,
    heads: dict[str, DraftNetwork],
    repetitive: list[list[int]],
    method: str,
    plan: str,
    temperature: float,
) -> None:
    requests = requests_for(repetitive, temperature=temperature)
    assert run(target, requests, *method_of(heads, method, plan)) == plain(target, requests)


@pytest.mark.parametrize("step", [0.05, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_lookups_in_trees_that_size_themselves(
    target: TargetModel,
    heads: dict[str, DraftNetwork],
    repetitive: list[list[int]],
    temperature: float,
    step: float,
) -> None:
    requests = requests_for(repetitive, temperature=temperature)
    plan = auto_plan(largest=TreePlan(4, 3, 24), with_lookup=True, step=step)
    assert run(target, requests, eagle_with_ngram(heads["eagle3"]), plan) == plain(target, requests)


@pytest.mark.parametrize(("method", "plan"), [("ngram", "chain:6"), ("eagle3", "tree:2x3x7")])
def test_a_row_does_not_depend_on_its_batch(
    target: TargetModel, heads: dict[str, DraftNetwork], repetitive: list[list[int]], method: str, plan: str
) -> None:
    requests = requests_for(repetitive, temperature=0.7)
    together = run(target, requests, *method_of(heads, method, plan))
    assert together == [run(target, [request], *method_of(heads, method, plan))[0] for request in requests]


def test_lookups_are_accepted(target: TargetModel, heads: dict[str, DraftNetwork], repetitive: list[list[int]]) -> None:
    """Equality would be cheap if nothing were ever found: greedy text of so small a model repeats itself."""
    requests = requests_for(repetitive, max_new_tokens=120, eos=())

    def tau(drafter: NewDrafter, plan: TreePlan) -> float:
        return generate(target, requests, drafter, plan).statistics.acceptance_length

    alone = tau(eagle(heads["eagle3"]), TreePlan.parse("tree:2x3x7"))
    assert tau(ngram, TreePlan.parse("chain:6")) > 1.5
    assert tau(*method_of(heads, "eagle3", "tree:2x3x7")) > alone


@pytest.mark.parametrize("limit", range(1, 9))
@pytest.mark.parametrize(("method", "plan"), [("ngram", "chain:6"), ("eagle3", "tree:2x3x7")])
def test_the_token_limit_is_exact(
    target: TargetModel, heads: dict[str, DraftNetwork], repetitive: list[list[int]], method: str, plan: str, limit: int
) -> None:
    requests = requests_for(repetitive, max_new_tokens=limit, eos=())
    assert run(target, requests, *method_of(heads, method, plan)) == plain(target, requests)


@pytest.mark.parametrize(("method", "plan"), [("ngram", "chain:6"), ("eagle3", "tree:2x3x7")])
def test_every_stop_position_is_exact(
    target: TargetModel, heads: dict[str, DraftNetwork], repetitive: list[list[int]], method: str, plan: str
) -> None:
    """Each token of a plain run is made the end-of-sequence token in turn: the output ends where it first occurs."""
    (full,) = run(target, requests_for(repetitive[:1], eos=()))
    ends = dict.fromkeys(full)
    requests = [requests_for(repetitive[:1], eos=(end,))[0] for end in ends]
    for end, tokens in zip(ends, run(target, requests, *method_of(heads, method, plan)), strict=True):
        assert tokens == full[: full.index(end) + 1]


# Sabotaged twins: each breaks one thing that merging must keep, and the comparison above must notice.


def break_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Appends all of a continuation below the root, tokens that the draft has there too included."""

    def follow_nothing(candidates: Candidates, chain: torch.Tensor, num_levels: int) -> Overlap:
        nowhere = torch.zeros_like(chain, dtype=torch.bool)
        return Overlap(torch.full_like(chain, candidates.tokens.shape[1]), nowhere, nowhere)

    monkeypatch.setattr(ngram_module, "follow", follow_nothing)


def break_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the tree for a chain whose accepted nodes already lie together."""
    monkeypatch.setattr(TreePlan, "is_chain", True)


@pytest.mark.parametrize("sabotage", [break_siblings, break_commit])
def test_sabotage_is_noticed(
    target: TargetModel,
    heads: dict[str, DraftNetwork],
    repetitive: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    sabotage: Callable[[pytest.MonkeyPatch], None],
) -> None:
    requests = requests_for(repetitive, max_new_tokens=60, eos=())
    expected = plain(target, requests)
    sabotage(monkeypatch)
    assert run(target, requests, *method_of(heads, "eagle3", "chain:3")) != expected
