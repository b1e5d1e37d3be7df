"""The kernels that find a draft's best tokens, beside torch's; on a CPU in Triton's interpreter."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton

from draftwing.engine.sampling import Sampler, SamplingParams, UnreadScores, uncoupled_rank
from draftwing.engine.top_tokens import BLOCK, MOST_WIDTH, top_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and triton.__version__ < "3.7" and np.__version__ >= "2.4",
    reason="Triton's interpreter of before 3.7 cannot loop with numpy 2.4",
)


@pytest.mark.parametrize(("vocab_size", "width"), [(50, 3), (BLOCK, 1), (2 * BLOCK + 3, 10)])
def test_equals_log_softmax_and_topk(vocab_size: int, width: int) -> None:
    """Also where the last block has fewer tokens than are wanted."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(2, 3, vocab_size, device=DEVICE)
    scale, shift = torch.tensor([1.0, 1.25], device=DEVICE).view(2, 1, 1), torch.randn(2, 1, vocab_size, device=DEVICE)
    for line, ranked in (((None, None), logits), ((scale, shift), logits * scale + shift)):
        best, ids = top_tokens(logits, *line, width)
        expected, expected_ids = ranked.log_softmax(-1).topk(width)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(best, expected)


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 1, BLOCK + 5, dtype=torch.float16, device=DEVICE)
    logits[..., [7, BLOCK + 1]] = 1.0
    assert top_tokens(logits, None, None, 4)[1].tolist() == [[[7, BLOCK + 1, 0, 1]]]


def test_the_samplers_ranking_is_found_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled rows, over a draft vocabulary, and more tokens than the kernels look for."""
    params = [SamplingParams(), SamplingParams(temperature=0.7, seed=3)]
    sampler = Sampler.of(params, 60, torch.device(DEVICE))
    sampler.reserve([5, 9], 4)
    positions = torch.tensor([[7], [11]], device=DEVICE)
    logits, target_ids = 3 * torch.randn(2, 2, 40, device=DEVICE), torch.arange(3, 43, device=DEVICE)
    monkeypatch.setattr(UnreadScores, "serves", lambda logits: False)
    whole, plain = sampler.rank(logits, positions, target_ids), uncoupled_rank(logits, positions, target_ids)
    monkeypatch.setattr(UnreadScores, "serves", lambda logits: True)
    for width in (4, MOST_WIDTH + 4):
        for ranking, expected in ((sampler.rank, whole), (uncoupled_rank, plain)):
            unread = ranking(logits, positions, target_ids)
            assert isinstance(unread, UnreadScores)
            for ours, theirs in zip(unread.topk(width), expected.topk(width), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    cut = Sampler.of([SamplingParams(temperature=0.7, top_p=0.5)] * 2, 60, torch.device(DEVICE))
    cut.reserve([5, 9], 4)
    assert isinstance(cut.rank(logits, positions, target_ids), torch.Tensor), "filters need all"
