"""benchmarks/inflate.py: a larger target and head that compute what small ones do."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import eagle, generate, requests_for, tiny_llama

from draftwing.drafts.eagle.load import DraftNetwork
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
def test_drafts_are_accepted_as_the_small_heads(
    target: TargetModel, large: TargetModel, heads: dict[str, DraftNetwork]
) -> None:
    head = inflate_head(heads["eagle3"], large, draft_vocab=70)
    requests = requests_for([[1, 2, 3], [9, 8, 7, 6]], max_new_tokens=16, temperature=0.8)
    small, inflated = (
        generate(each, requests, eagle(draft), "tree:3x3x8")
        for each, draft in ((target, heads["eagle3"]), (large, head))
    )
    assert small.statistics.acceptance_length > 1.2
    assert inflated.statistics.accepted_at == small.statistics.accepted_at
    assert [output.tokens for output in inflated.outputs] == [output.tokens for output in small.outputs]


def test_what_does_not_fit_is_refused() -> None:
    for index, size in ((1, 32), (2, 100), (4, 1), (5, 12), (6, 50)):
        shape = (*SHAPE[:index], size, *SHAPE[index + 1 :])
        with pytest.raises(ValueError, match="shape: "):
            inflate_target(tiny_llama(), shape, CPU)
