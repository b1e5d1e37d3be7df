"""What GPUs run, on a CPU: joined products, and torch.compile between them. The stock modules are the reference."""

import dataclasses
import shutil
from collections.abc import Callable

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from draftwing.decoding.tree import root_tree
from draftwing.models import packed
from draftwing.models.fused import FusedTarget, pack_target
from draftwing.models.packed import JoinedProduct
from draftwing.models.target import ATTENTION, TargetModel, TargetOutput

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": ATTENTION,
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are packed as a GPU's are, whatever their dtype."""
    monkeypatch.setattr(packed, "PackedProduct", JoinedProduct)
    monkeypatch.setattr(packed, "_can_pack", lambda layer: True)


def llama() -> PreTrainedModel:
    return tiny_llama().float()


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    for layer in model.model.layers:  # its biases begin as zeros
        nn.init.normal_(layer.self_attn.q_proj.bias)
    return model


def qwen3() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)).eval()


@torch.inference_mode()
def tree_pass(target: TargetModel) -> TargetOutput:
    """Seven nodes on two branches behind a prompt of nine tokens, in two rows."""
    cache = target.new_cache(2, 32)
    target.prefill(torch.arange(18).view(2, 9), torch.tensor([9, 5]), cache)
    parents = torch.tensor([[0, 0, 1, 2, 0, 4, 5]]).expand(2, -1)
    tree = dataclasses.replace(root_tree(torch.tensor([3, 4]), 7), parents=parents, max_depth=3)
    depths = torch.tensor([[0, 1, 2, 3, 1, 2, 3]]).expand(2, -1)
    return target.forward_tree(torch.arange(14).view(2, 7), depths, tree.ancestors, cache, (0, 1, 2))


@pytest.mark.parametrize("new_model", [llama, qwen2, qwen3])
def test_joined_products_are_the_stock_modules(new_model: Callable[[], PreTrainedModel]) -> None:
    joined = pack_target(TargetModel(new_model()))
    assert type(joined) is FusedTarget
    expected, output = tree_pass(TargetModel(new_model())), tree_pass(joined)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.features, expected.features, atol=1e-4, rtol=1e-4)


def test_single_layers_share_their_weights() -> None:
    """Nothing is held twice, whatever the size of the output head."""
    model = llama()
    weight = model.lm_head.weight
    packed.pack_linears(model)
    assert model.lm_head.product._weight.data_ptr() == weight.data_ptr()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_steps_are_the_same() -> None:
    expected, output = tree_pass(TargetModel(qwen3())), tree_pass(pack_target(TargetModel(qwen3()), compiles=True))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
