"""On a CPU the speculative pass gives plain decoding's logits to the last bit, in float32 and in bfloat16."""

import pytest
import torch
from conftest import tiny_llama

from draftwing.decoding.tree import DraftTree
from draftwing.models.packed import PackedLinear, pack_linears
from draftwing.models.target import TargetModel

DTYPES = [torch.float32, torch.bfloat16]
CONTEXT = [1, 2, 3, 4, 5, 6, 7]
#          0 root
#        1     2
#      3   4     5
#      6
TOKENS, PARENTS, DEPTHS = [8, 9, 10, 11, 12, 13, 14], [0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 2, 3]


def packed_target(dtype: torch.dtype) -> TargetModel:
    model = tiny_llama(hidden_size=64, intermediate_size=96).to(dtype)
    pack_linears(model)
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        pytest.skip(f"no packed {dtype} products on this machine")
    return TargetModel(model)


def tree_logits(target: TargetModel) -> torch.Tensor:
    """Logits of every node, from one pass over the tree."""
    tokens, parents, depths = (torch.tensor([values]) for values in (TOKENS, PARENTS, DEPTHS))
    zeros = torch.zeros_like(tokens).float()
    tree = DraftTree(tokens, parents, depths, depths >= 0, zeros, zeros, max_depth=3)
    cache = prefilled(target)
    return target.forward_tree(tokens, depths, tree.ancestors, cache).logits[0]


def plain_logits(target: TargetModel, node: int) -> torch.Tensor:
    """The node's logits when its branch is decoded token by token, padded as plain decoding pads."""
    branch = [node]
    while branch[0] != 0:
        branch.insert(0, PARENTS[branch[0]])
    cache = prefilled(target)
    rows = target.best_single_row
    ancestors = torch.zeros(1, rows, rows, dtype=torch.bool)
    ancestors[:, :, 0] = True
    for step in branch:
        tokens = torch.full((1, rows), TOKENS[step])
        logits = target.forward_tree(tokens, torch.zeros_like(tokens), ancestors, cache).logits[0, 0]
        cache.commit(None, torch.tensor([1]), max_kept=1)
    return logits


def prefilled(target: TargetModel):
    cache = target.new_cache(1, 40)
    target.prefill(torch.tensor([CONTEXT]), torch.tensor([len(CONTEXT)]), cache)
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_each_node_of_a_tree_has_the_bits_of_plain_decoding(dtype: torch.dtype) -> None:
    target = packed_target(dtype)
    in_tree = tree_logits(target)
    for node in range(len(TOKENS)):
        assert torch.equal(in_tree[node], plain_logits(target, node)), f"node {node}"


@torch.inference_mode()
def test_bits_differ_when_attention_sums_in_the_models_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotaged twin: without float64 sums, the order of a branch's keys shows."""
    target = packed_target(torch.float32)
    monkeypatch.setattr(TargetModel, "attention_dtype", property(lambda self: self.dtype))
    in_tree = tree_logits(target)
    assert not all(torch.equal(in_tree[node], plain_logits(target, node)) for node in range(len(TOKENS)))
