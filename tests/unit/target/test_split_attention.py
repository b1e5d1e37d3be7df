"""The GPU's attention kernel against the explicit formula; on a CPU in Triton's interpreter, if that is installed."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
from conftest import eagle, requests_for, run, tiny_llama

from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.target import attention
from draftwing.target import model as target_module
from draftwing.target.model import TargetModel
from draftwing.target.split_attention import split_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and triton.__version__ < "3.7" and np.__version__ >= "2.4",
    reason="Triton's interpreter of before 3.7 cannot loop with numpy 2.4",
)


def explicit(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.double().repeat_interleave(groups, 1), values.double().repeat_interleave(groups, 1)
    scores = queries.double() @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0) @ values


@pytest.mark.parametrize(
    ("batch_size", "heads", "key_heads", "nodes", "slots", "dim", "value_dim"),
    [
        (1, 8, 2, 60, 700, 64, 64),  # many parts
        (3, 4, 4, 1, 130, 16, 16),  # plain decoding
        (2, 6, 2, 13, 257, 24, 40),  # no power of two anywhere
        (1, 2, 1, 5, 40, 128, 128),  # less than a block of keys
    ],
)
def test_equals_the_explicit_formula(
    batch_size: int, heads: int, key_heads: int, nodes: int, slots: int, dim: int, value_dim: int
) -> None:
    torch.manual_seed(0)
    queries = torch.randn(batch_size, heads, nodes, dim, device=DEVICE)
    keys, values = (  # as the cache gives them: slots before heads, and more of them than are read
        torch.randn(batch_size, slots + 9, key_heads, width, device=DEVICE)[:, :slots].transpose(1, 2)
        for width in (dim, value_dim)
    )
    mask = torch.rand(batch_size, 1, nodes, slots, device=DEVICE) < 0.5
    mask[:, :, :, slots // 2 :] &= torch.rand(batch_size, 1, nodes, 1, device=DEVICE) < 0.5  # whole parts unseen
    output = split_attention(queries, keys, values, mask)
    torch.testing.assert_close(output.double(), explicit(queries, keys, values, mask), atol=2e-5, rtol=1e-4)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    queries, keys = torch.randn(1, 2, 3, 16, device=DEVICE), torch.randn(1, 1, 50, 16, device=DEVICE)
    mask = torch.ones(1, 1, 3, 50, dtype=torch.bool, device=DEVICE)
    mask[:, :, 1] = False
    output = split_attention(queries, keys, keys, mask)
    assert (output[:, :, 1] == 0).all()
    assert output.isfinite().all() and (output[:, :, 0] != 0).any()


def test_half_precision_and_a_scale_of_its_own() -> None:
    torch.manual_seed(1)
    queries, keys = torch.randn(1, 4, 7, 32, device=DEVICE), torch.randn(1, 2, 300, 32, device=DEVICE)
    mask = torch.rand(1, 1, 7, 300, device=DEVICE) < 0.7
    expected = explicit(queries * 0.5 * 32**0.5, keys, keys, mask)
    output = split_attention(queries.half(), keys.half(), keys.half(), mask, scale=0.5)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.double(), expected, atol=5e-3, rtol=2e-2)


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels do not read a CPU's memory; see test_cuda.py")
def test_a_generation_uses_it_for_trees(
    heads: dict[str, DraftNetwork], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In target and draft, with plain decoding's tokens; prompts are left to the library's kernels."""
    target = TargetModel(tiny_llama().float())
    plain = run(target, requests_for(prompts[:2], max_new_tokens=6))
    seen: set[int] = set()

    def count(queries: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen.add(queries.shape[2])
        return split_attention(queries, *arguments)

    for module in (attention, target_module):
        monkeypatch.setattr(module, "has_kernel", lambda *arguments: True)
    monkeypatch.setattr("draftwing.target.split_attention.split_attention", count)
    head = copy.deepcopy(heads["eagle3"]).float()
    assert run(target, requests_for(prompts[:2], max_new_tokens=6), eagle(head), "tree:2x2x5") == plain
    assert seen >= {2, 5}  # a level of the draft, and the tree
