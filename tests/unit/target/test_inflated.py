"""benchmarks/inflate.py: a larger target and head that compute what small ones do."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama

from draftwing.drafts.eagle.build_head import build_network
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.layers import DraftConfig
from draftwing.target.attention import grouped_attention
from draftwing.target.model import TargetModel

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
from inflate import inflate_head, inflate_target

CPU = torch.device("cpu")
SHAPE = (8, 128, 120, 8, 2, 16, 100, 0)
"""Layers, width, MLP width, heads, key/value heads, head width, vocabulary; the small one: 6, 32, 48, 4, 2, 8, 64."""


@pytest.fixture(scope="module")
def large() -> TargetModel:
    return TargetModel(inflate_target(tiny_llama(), SHAPE, CPU))


@torch.inference_mode()
def test_logits_are_the_small_models(target: TargetModel, large: TargetModel) -> None:
    tokens = torch.arange(40).view(2, 20)
    small, inflated = (each.model(input_ids=tokens).logits for each in (target, large))
    torch.testing.assert_close(inflated[..., :64], small, atol=1e-10, rtol=1e-10)
    assert (inflated[..., 64:] < small.min() - 50).all()


def test_its_weights_are_random_where_that_changes_nothing(large: TargetModel) -> None:
    for name, weight in large.model.named_parameters():
        if "norm" not in name and "embed" not in name:
            least = 0.05 if name.endswith("7.mlp.down_proj.weight") else 0.4  # the last reads what is summed there
            assert (weight != 0).float().mean() > least, name


@torch.inference_mode()
def test_a_head_drafts_what_the_small_one_does(target: TargetModel, large: TargetModel) -> None:
    """Two levels, the second from what the first gave; tokens that the small one lacks come last."""
    torch.manual_seed(1)
    config = DraftConfig(32, 48, 4, 2, 8, 64, 40, 32, aux_layers=(1, 3, 5))
    small = build_network(config, target, torch.arange(3, 43)).double()
    for weight in small.parameters():
        torch.nn.init.normal_(weight, 0, 0.3)
    inflated = inflate_head(small, large, draft_vocab=70)
    assert inflated.vocab.target_ids.tolist() == [*range(3, 43), *range(64, 94)]
    features = torch.randn(2, 5, 3, 32, dtype=torch.float64)
    widened = torch.nn.functional.pad(features, (0, 128 - 32)).flatten(2)
    for ours, theirs in zip(levels(inflated, widened), levels(small, features.flatten(2)), strict=True):
        torch.testing.assert_close(ours[..., :40], theirs, atol=1e-9, rtol=1e-9)
        assert (ours[..., 40:] < theirs.min() - 50).all()


def levels(head: DraftNetwork, features: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a level, and of one that reads its output."""
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()

    def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return grouped_attention(queries, keys, values, causal).transpose(1, 2)

    state, logits = head.project(features), []
    for _ in range(2):
        output = head(state, torch.arange(10).view(2, 5), torch.arange(5).expand(2, 5), attend)
        logits.append(head.logits(output))
        state = head.feed_back(output)
    return logits


def test_what_does_not_fit_is_refused() -> None:
    for index, size in ((1, 32), (2, 100), (4, 1), (5, 12), (6, 50)):
        shape = (*SHAPE[:index], size, *SHAPE[index + 1 :])
        with pytest.raises(ValueError, match="shape: "):
            inflate_target(tiny_llama(), shape, CPU)
