"""Trees that kernels grow are those of the steps written out: in C, and by Triton's kernels in its interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from types import ModuleType

import pytest
import torch
from conftest import DEVICE

from draftwing.drafts import growth
from draftwing.drafts.eagle import drafter
from draftwing.drafts.eagle.drafter import _DraftedSlots
from draftwing.drafts.growth import FusedLevels, RootedDraft, grow_tree
from draftwing.drafts.ngram import NgramDrafter
from draftwing.engine import sampling
from draftwing.engine import tree as tree_module
from draftwing.engine.drafter import Ranking
from draftwing.engine.sampling import Sampler, SamplingParams, UnreadScores, log_probabilities
from draftwing.engine.tree import Candidates, DraftTree, Frontier, best_subtree
from draftwing.engine.tree_plan import IN_FULL, Sizing, TreePlan
from draftwing.layers import DraftVocab
from draftwing.plans.acceptance import CalibratedSize
from draftwing.target.kv_cache import KVCache, LayerShape

BLOCK = 1024
"""Slots of a program of Triton's."""
VOCAB_SIZE, NUM_DRAFT_IDS = 60, 40


@contextmanager
def using(kernels: ModuleType | None) -> Iterator[None]:
    """These kernels; None: torch's steps."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (growth, tree_module, drafter, sampling):
            patch.setattr(module, "kernels_for", lambda tensor: kernels)
        yield


def rank_plainly(logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> torch.Tensor:
    return log_probabilities(logits)


def random_draft(num_rows: int, has_all_ids: bool = True, rank: Ranking = rank_plainly) -> RootedDraft:
    """Its logits are few whole numbers, so that nodes tie; they follow from the tokens."""
    ids = None if has_all_ids else torch.randperm(VOCAB_SIZE, device=DEVICE)[:NUM_DRAFT_IDS]
    vocab = DraftVocab(ids, VOCAB_SIZE)
    table = torch.randint(0, 9, (7, len(vocab)), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)

    def step(parent: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return table[(tokens + parent) % 7]

    positions = torch.arange(5, 5 + num_rows, device=DEVICE)[:, None]
    return RootedDraft(table[:num_rows, None], step, positions, vocab, rank)


def grow(plan: TreePlan, draft: RootedDraft, kernels: ModuleType | None) -> DraftTree:
    with using(kernels):
        return grow_tree(torch.arange(len(draft.positions), device=DEVICE), plan, draft)


def learnt() -> Sizing:
    """Corrections that change the order of nodes."""
    sizing = CalibratedSize(DEVICE)
    sizing._correction.copy_(torch.randn(sizing._correction.shape, generator=torch.Generator().manual_seed(0)))
    return sizing


def are_equal(ours: DraftTree, theirs: DraftTree) -> bool:
    assert ours.max_depth == theirs.max_depth
    pairs = [(getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(DraftTree)[:-2]]
    return all(torch.allclose(*pair, rtol=0, atol=0, equal_nan=True) and is_same_type(*pair) for pair in pairs)


def is_same_type(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape


@pytest.mark.parametrize(
    ("plan", "num_rows", "sizing"),
    [
        ("chain:3", 1, "neutral"),
        ("chain:1", 2, "learnt"),
        ("tree:2x4x9", 3, "neutral"),
        ("tree:5x1x5", 2, "learnt"),
        ("tree:3x4x20", 2, "learnt"),
        ("tree:10x3x60", 1, "neutral"),
        ("tree:16x2x64", 2, "learnt"),
        ("tree:20x2x80", 1, "neutral"),
    ],
)
@pytest.mark.parametrize("has_all_ids", [True, False])
def test_trees_are_equal(kernels: ModuleType, plan: str, num_rows: int, sizing: str, has_all_ids: bool) -> None:
    torch.manual_seed(1)
    shape = TreePlan.parse(plan)
    shape = TreePlan(shape.width, shape.depth, shape.num_nodes, sizing=learnt() if sizing == "learnt" else IN_FULL)
    draft = random_draft(num_rows, has_all_ids)
    assert are_equal(grow(shape, draft, kernels), grow(shape, draft, None))


def test_trees_ranked_with_the_targets_noise_are_equal(kernels: ModuleType) -> None:
    """A greedy row beside a sampled one, and one whose filters rule most tokens out: those are -inf."""
    params = [SamplingParams(), SamplingParams(temperature=0.8, seed=3), SamplingParams(temperature=1.0, top_k=2)]
    sampler = Sampler.of(params, VOCAB_SIZE, DEVICE, depth=3)
    sampler.reserve([5, 6, 7], 3)
    draft = random_draft(3, has_all_ids=False, rank=sampler.rank)
    trees = [grow(TreePlan(4, 3, 30), draft, used) for used in (kernels, None)]
    assert are_equal(*trees)
    assert not trees[0].valid.all()


@pytest.mark.parametrize("sizing", [IN_FULL, "learnt"], ids=["in full", "learnt"])
@pytest.mark.parametrize("broken", [torch.nan, -torch.inf], ids=str)
@pytest.mark.parametrize("is_root", [True, False])
def test_trees_of_what_is_no_number_are_equal(
    kernels: ModuleType, sizing: Sizing | str, broken: float, is_root: bool
) -> None:
    """All of a row's children at the root, or those of some nodes: nothing is left unwritten, nothing is believed."""
    plan = TreePlan(4, 3, 30, sizing=learnt() if isinstance(sizing, str) else sizing)
    whole = random_draft(3)

    def rank(logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> torch.Tensor:
        is_broken = positions[:, :, None] == 6 if is_root else logits[..., :1] + positions[0] > 12  # of the first row
        return torch.where(is_broken, broken, rank_plainly(logits, positions, target_ids))

    draft = RootedDraft(whole.root_logits, whole.step, whole.positions, whole.vocab, rank)
    trees = [grow(plan, draft, used) for used in (kernels, None)]
    assert are_equal(*trees)
    assert not trees[0].valid.all() and trees[0].valid[:, 1].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is no number
def test_siblings_differ_where_a_lookup_meets_what_is_ruled_out(kernels: ModuleType) -> None:
    """Two of four tokens are left; the text goes on with one of them."""
    lookup, vocab = NgramDrafter(1, 16, DEVICE), DraftVocab(None, VOCAB_SIZE)
    lookup.observe(torch.tensor([[0, 1] * 4], device=DEVICE), None, torch.tensor([8], device=DEVICE))
    logits = torch.full((1, 1, VOCAB_SIZE), -torch.inf, device=DEVICE)
    logits[..., :2] = torch.tensor([0.1, 0.0])

    def rank(logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> UnreadScores:
        return UnreadScores(kernels, logits, partial(log_probabilities, logits))

    def step(parent: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return logits.expand(1, tokens.shape[1], VOCAB_SIZE)

    draft = RootedDraft(logits, step, torch.tensor([[8]], device=DEVICE), vocab, rank)
    plan, merge = TreePlan(4, 2, 9).with_lookup(), partial(lookup.extend, longest=8)
    with using(kernels):
        tree = grow_tree(torch.tensor([1], device=DEVICE), plan, draft, merge)
    nodes = zip(*(part[0, 1:].tolist() for part in (tree.parents, tree.tokens, tree.valid)), strict=True)
    valid = [(parent, token) for parent, token, is_valid in nodes if is_valid]
    assert len(set(valid)) == len(valid) > 2


class _Forgetful(FusedLevels):
    """A twin that leaves out what the parents have."""

    def add(self, log_probs: torch.Tensor, draft_ids: torch.Tensor) -> Frontier | None:
        best = super().add(log_probs, draft_ids)
        return best and Frontier(best.tokens, torch.zeros_like(best.scores), best.numbers, best.parents)


def test_a_twin_that_forgets_the_parents_scores_is_found_out(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, draft = TreePlan(3, 4, 20), random_draft(2)
    expected = grow(plan, draft, None)

    def levels_of(plan: TreePlan, draft: RootedDraft) -> FusedLevels:
        return _Forgetful(kernels, plan, draft.vocab.target_ids, draft.positions)

    monkeypatch.setattr(growth, "_levels_of", levels_of)
    assert not are_equal(grow(plan, draft, kernels), expected)


def test_a_sizing_that_looks_at_scores_is_asked(kernels: ModuleType) -> None:
    class Narrow(Sizing):
        def num_parents(self, scores: torch.Tensor, depth: int) -> int:
            return 1 if depth == 1 else 0

    plan, draft = TreePlan(3, 4, 4, sizing=Narrow()), random_draft(1)
    assert grow(plan, draft, kernels).max_depth == 2


def candidates(num_rows: int, count: int) -> Candidates:
    """With ties, no numbers, nodes above their parents, and nodes that cannot be accepted."""
    scores = -torch.randint(0, 9, (num_rows, count)).float()
    scores[:, 3], scores[:, 4:6] = torch.nan, -torch.inf
    parents = (torch.rand(num_rows, count) * torch.arange(count)).long() - 1
    return Candidates(
        torch.randint(0, 50, (num_rows, count)), scores, torch.rand(num_rows, count), parents, parents + 2
    )


@pytest.mark.parametrize(("count", "num_nodes"), [(7, 8), (64, 2), (65, 40), (130, 1), (200, 150)])
def test_the_best_nodes_are_equal(kernels: ModuleType, count: int, num_nodes: int) -> None:
    torch.manual_seed(0)
    drafted, trees = Candidates(*(part.to(DEVICE) for part in vars(candidates(2, count)).values())), []
    for used in (kernels, None):
        with using(used):
            trees.append(best_subtree(torch.tensor([7, 8], device=DEVICE), drafted, num_nodes, 3))
    assert are_equal(*trees)


@pytest.mark.parametrize("window", [5, 10**6])
def test_drafted_nodes_see_the_same_slots(kernels: ModuleType, window: int) -> None:
    cache = KVCache([LayerShape(1, 2, 2)], 2, BLOCK + 20, torch.float32, DEVICE)
    cache.lengths.copy_(torch.tensor([3, BLOCK + 4]))
    cache.bound = BLOCK + 4
    parents = [torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 0, 2], [1, 2, 0]]), torch.tensor([[2], [1]])]

    def enter_all() -> list[torch.Tensor]:
        levels, found = _DraftedSlots(cache, 7, window), []
        for parent in parents:
            found += [levels.enter(parent.to(DEVICE)), levels.positions, levels.visible]
        return found

    def run(used: ModuleType | None) -> list[torch.Tensor]:
        with using(used):
            return enter_all()

    assert all(map(torch.equal, run(kernels), run(None)))
