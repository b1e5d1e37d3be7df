"""The kernels that find a draft's best tokens and the target's own, beside torch's: in C, and Triton's."""

from types import ModuleType

import pytest
import torch
from conftest import DEVICE

from draftwing import native
from draftwing.engine import native_cycle, sampling
from draftwing.engine.noise import KeptNoise
from draftwing.engine.sampling import Sampler, SamplingParams, UnreadScores, uncoupled_rank
from draftwing.engine.tree import DraftTree, root_tree

BLOCK = 1024
"""Tokens of a program of Triton's, of which a vocabulary takes one or more."""
MANY = 20
"""More tokens than Triton's kernels look for."""


@pytest.mark.parametrize(("vocab_size", "width"), [(50, 3), (BLOCK, 1), (2 * BLOCK + 3, 10)])
def test_equals_log_softmax_and_topk(kernels: ModuleType, vocab_size: int, width: int) -> None:
    """Also where the last block has fewer tokens than are wanted."""
    torch.manual_seed(0)
    logits, kept = 4 * torch.randn(2, 3, vocab_size, device=DEVICE), torch.randn(2, 5, 2 * vocab_size, device=DEVICE)
    temperature, positions = torch.tensor([0.0, 0.5], device=DEVICE), torch.tensor([[3], [9]], device=DEVICE)
    target_ids = torch.randperm(2 * vocab_size, device=DEVICE)[:vocab_size]
    coupled = torch.stack((logits[0], (logits[1] + 0.5 * kept[1, 4, target_ids]) / 0.8))
    for noise, ranked in ((None, logits), (KeptNoise(kept, positions, temperature), coupled)):
        best, ids = kernels.top_tokens(logits, width, noise, target_ids, error=0.8)
        expected, expected_ids = ranked.log_softmax(-1).topk(width)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(best, expected)


def test_ties_go_to_the_lowest_id(kernels: ModuleType) -> None:
    logits = torch.zeros(1, 1, BLOCK + 5, device=DEVICE)
    logits[..., [7, BLOCK + 1]] = 1.0
    assert kernels.top_tokens(logits, 4)[1].tolist() == [[[7, BLOCK + 1, 0, 1]]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of an interpreted log(0)
@pytest.mark.parametrize("coupled", [False, True])
def test_tokens_that_are_ruled_out_or_no_number_are_torchs(kernels: ModuleType, coupled: bool) -> None:
    """A block of -inf, all but a few tokens, every token, one NaN, only NaN: ids differ, and are the vocabulary's."""
    torch.manual_seed(0)
    logits = torch.randn(1, 5, 2 * BLOCK + 3, device=DEVICE)
    logits[0, 0, BLOCK : 2 * BLOCK], logits[0, 1, 2:] = -torch.inf, -torch.inf
    logits[0, 2], logits[0, 3, 5], logits[0, 4] = -torch.inf, torch.nan, torch.nan
    one, zeros = torch.ones(1, device=DEVICE), torch.zeros(1, 1, logits.shape[-1], device=DEVICE)
    noise = KeptNoise(zeros, one.long()[:, None], one) if coupled else None
    best, ids = kernels.top_tokens(logits, 4, noise, error=1.0)
    expected, expected_ids = logits.log_softmax(-1).topk(4)
    torch.testing.assert_close(best, expected, equal_nan=True)
    assert torch.equal(ids[0, 0], expected_ids[0, 0]) and torch.equal(ids[0, 1, :2], expected_ids[0, 1, :2])
    assert all(len(set(row) & {*range(logits.shape[-1])}) == 4 for row in ids[0].tolist())


def test_the_samplers_ranking_is_found_with_them(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled rows, over a draft vocabulary, and more tokens than the kernels look for."""
    params = [SamplingParams(), SamplingParams(temperature=0.7, seed=3)]
    sampler = Sampler.of(params, 60, torch.device(DEVICE))
    sampler.reserve([5, 9], 4)
    positions = torch.tensor([[7], [11]], device=DEVICE)
    logits, target_ids = 3 * torch.randn(2, 2, 40, device=DEVICE), torch.arange(3, 43, device=DEVICE)
    monkeypatch.setattr(sampling, "kernels_for", lambda logits: None)
    whole, plain = sampler.rank(logits, positions, target_ids), uncoupled_rank(logits, positions, target_ids)
    monkeypatch.setattr(sampling, "kernels_for", lambda logits: kernels)
    for width in (4, MANY):
        for ranking, expected in ((sampler.rank, whole), (uncoupled_rank, plain)):
            unread = ranking(logits, positions, target_ids)
            assert isinstance(unread, UnreadScores)
            for ours, theirs in zip(unread.topk(width), expected.topk(width), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    cut = Sampler.of([SamplingParams(temperature=0.7, top_p=0.5)] * 2, 60, torch.device(DEVICE))
    cut.reserve([5, 9], 4)
    assert isinstance(cut.rank(logits, positions, target_ids), torch.Tensor), "filters need all"


PARAMS = [SamplingParams(temperature=0.7, seed=3), SamplingParams(), SamplingParams(temperature=1.3, seed=2**40)]


def choices(kernels: ModuleType, sampler: Sampler, logits: torch.Tensor, tree: DraftTree) -> list[torch.Tensor]:
    """With kernels and without."""
    found, lengths = [], torch.full((len(logits),), 5, device=DEVICE)
    for used in (kernels, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "kernels_for", lambda logits, used=used: used)
            found.append(sampler.choose(logits, tree, lengths))
    return found


@pytest.mark.parametrize("params", [PARAMS, [SamplingParams()] * 3], ids=["drawn", "greedy"])
@pytest.mark.parametrize("vocab_size", [60, 2 * BLOCK, 4 * BLOCK + 3])
def test_the_targets_tokens_are_torchs(kernels: ModuleType, vocab_size: int, params: list[SamplingParams]) -> None:
    """Drawn, and greedy beside; whole numbers tie, within a block and across."""
    torch.manual_seed(0)
    sampler = Sampler.of(params, vocab_size, torch.device(DEVICE), depth=3)
    sampler.reserve([5, 5, 5], 3)
    logits = torch.randn(3, 4, vocab_size, device=DEVICE).round()
    tree = root_tree(torch.zeros(3, dtype=torch.int64, device=DEVICE), 4)
    tree.depths[:] = torch.tensor([0, 1, 1, 2], device=DEVICE)
    ours, theirs = choices(kernels, sampler, logits, tree)
    assert torch.equal(ours, theirs)
    assert len(set(ours.flatten().tolist())) > 2


@pytest.mark.parametrize("broken", [[3, 9], [9, 3]])
def test_what_is_no_number_is_chosen_before_infinity(broken: list[int]) -> None:
    """As torch does, in C, where a greedy row is chosen with it or without by what its neighbours ask for."""
    if native.library() is None:
        pytest.skip("this machine has no C compiler")
    logits = torch.zeros(1, 1, 20)
    logits[..., broken] = torch.tensor([torch.inf, torch.nan])
    assert native_cycle.choose_tokens(logits, None).item() == logits.argmax(-1).item() == broken[1]


def test_noise_of_another_position_is_found_out(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler.of(PARAMS, 60, torch.device(DEVICE), depth=3)
    sampler.reserve([5, 5, 5], 3)
    logits = torch.zeros(3, 2, 60, device=DEVICE)
    kept_noise = sampler._kept_noise
    monkeypatch.setattr(sampler, "_kept_noise", lambda positions: kept_noise(positions + 1))
    ours, theirs = choices(kernels, sampler, logits, root_tree(torch.zeros(3, dtype=torch.int64, device=DEVICE), 2))
    assert not torch.equal(ours, theirs)
    assert torch.equal(ours[1], theirs[1]), "a greedy row has none"


def test_what_is_changed_before_the_choice_is_left_to_torch(kernels: ModuleType) -> None:
    """Penalties, a bias, filters, and logits of float64."""
    for params in ({"top_k": 3}, {"repetition_penalty": 1.2}, {"logit_bias": {3: 50.0}}):
        sampler = Sampler.of([SamplingParams(temperature=1.0, **params)], 60, torch.device(DEVICE), depth=3)
        assert sampler.work.changes
        sampler.reserve([5], 3)
        tree = root_tree(torch.zeros(1, dtype=torch.int64, device=DEVICE), 2)
        ours, theirs = choices(kernels, sampler, torch.randn(1, 2, 60, device=DEVICE), tree)
        assert torch.equal(ours, theirs)
