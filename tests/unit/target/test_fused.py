"""What GPUs run, on a CPU: joined products, and torch.compile between them. The stock modules are the reference."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from draftwing.drafts.eagle.fused_layers import pack_head
from draftwing.drafts.eagle.network import DraftNetwork, Eagle3Model, EagleModel
from draftwing.engine.tree import root_tree
from draftwing.layers import DraftConfig, DraftVocab
from draftwing.target import attention, packed
from draftwing.target.attention import grouped_attention
from draftwing.target.fused import Elementwise, FusedTarget, pack_target
from draftwing.target.interface import ATTENTION
from draftwing.target.model import TargetModel, TargetOutput
from draftwing.target.packed import JoinedProduct

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": ATTENTION,
}
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, needs_a_compiler])


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, without_native: None) -> None:
    """Layers are packed as a GPU's are, whatever their dtype."""
    monkeypatch.setattr(packed, "PackedProduct", JoinedProduct)
    monkeypatch.setattr(packed, "_can_pack", lambda layer: True)


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Compile as far as graphs, or all the way, which takes a minute."""

    def choose(backend: str) -> None:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        monkeypatch.setattr(Elementwise, "compiled", staticmethod(Elementwise.compiled.__wrapped__))  # not the kept one
        torch.compiler.reset()
        counters.clear()

    return choose


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


BIASES = ("attention_bias", "output_bias", "mlp_bias")


def random_head(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> DraftNetwork:
    """A head of two layers with every option that a layer can have."""
    torch.manual_seed(0)
    names = ("qk_norm", "norm_before_residual", "fc_norm", "norm_before_fc", "norm_output", *BIASES)
    options = dict.fromkeys(names, True) | {"aux_layers": (0, 1)} if kind == "eagle3" else {}
    rope = {"rope_type": "default", "rope_theta": 1e4} | ({"partial_rotary_factor": 0.5} if kind == "eagle3" else {})
    config = DraftConfig(32, 48, 4, 2, 8, 50, 40, 32, num_hidden_layers=2, rope_parameters=rope, **(options | changes))
    embed, output = nn.Embedding(50, 32).to(dtype), nn.Linear(32, 50).to(dtype)
    is_eagle3 = kind == "eagle3"
    vocab = DraftVocab(torch.arange(40), 50)
    head = Eagle3Model(config, vocab, embed, output) if is_eagle3 else EagleModel(config, embed, output)
    for weight in head.parameters():  # norms begin as ones, biases as zeros
        nn.init.uniform_(weight, -0.5, 0.5)
    return head.to(dtype)


@torch.inference_mode()
def head_pass(head: DraftNetwork) -> tuple[torch.Tensor, ...]:
    """Outputs and logits of two rows of three slots."""
    torch.manual_seed(1)
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()

    def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return grouped_attention(queries, keys, values, causal).transpose(1, 2)

    features = torch.randn(2, 3, 32 * len(head.config.feature_layers)).to(head.dtype)
    output = head(head.project(features), torch.arange(6).view(2, 3), torch.arange(6).view(2, 3), attend)
    return output, head.feed_back(output), head.logits(output)


@pytest.mark.parametrize("backend", ["", "eager", INDUCTOR])
@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_fused_heads_are_the_heads(kind: str, backend: str, compile_with: Callable[[str], None]) -> None:
    expected = head_pass(random_head(kind))
    head = random_head(kind)
    if backend:
        compile_with(backend)
    pack_head(head, compiles=bool(backend))
    fused = [type(module).__name__ for module in head.modules() if type(module).__module__ == pack_head.__module__]
    assert len(fused) == (3 if kind == "eagle3" else 2), "two layers, and EAGLE-3's norm"
    torch.testing.assert_close(head_pass(head), expected, atol=1e-4, rtol=1e-4)
    assert not backend or counters["stats"]["unique_graphs"] > 2


@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_layers_of_another_activation_are_packed_but_not_fused(kind: str) -> None:
    expected, head = head_pass(random_head(kind, hidden_act="gelu")), random_head(kind, hidden_act="gelu")
    pack_head(head)
    assert not any("Layer" in type(module).__name__ and "Fused" in type(module).__name__ for module in head.modules())
    torch.testing.assert_close(head_pass(head), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_fused_heads_keep_float64(kind: str) -> None:
    expected, head = head_pass(random_head(kind, torch.float64)), random_head(kind, torch.float64)
    pack_head(head)
    torch.testing.assert_close(head_pass(head), expected, atol=1e-12, rtol=1e-12)


def test_single_layers_share_their_weights() -> None:
    """Nothing is held twice, whatever the size of the output head."""
    model = llama()
    weight = model.lm_head.weight
    packed.pack_linears(model)
    assert model.lm_head.product.weight.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
def test_compiled_steps_are_the_same(backend: str, compile_with: Callable[[str], None]) -> None:
    compile_with(backend)
    expected, output = tree_pass(TargetModel(qwen3())), tree_pass(pack_target(TargetModel(qwen3()), compiles=True))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] > 2


def test_more_versions_are_compiled_than_torch_does_by_itself(compile_with: Callable[[str], None]) -> None:
    """A target, heads and draft models in one process: past torch's limit the steps would stay as written."""
    compile_with("eager")
    with torch._dynamo.config.patch(recompile_limit=8):  # and as it was behind
        steps = Elementwise.compiled()
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for shape in ((1, 16), (2, 16), (3, 32), (1, 2, 8), (3, 2, 8)):
                weight = torch.ones(shape[-1], dtype=dtype)
                steps.normalise(torch.ones(shape, dtype=dtype), weight, torch.tensor(1e-6))
    assert counters["stats"]["unique_graphs"] > 8


@pytest.mark.parametrize("has_headers", [False, True])
def test_kernels_are_compiled_where_pythons_headers_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_headers: bool
) -> None:
    """Triton builds its launchers against them; many machines have a C compiler and lack them."""
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    monkeypatch.setattr(attention, "which", lambda name: name)
    monkeypatch.setattr(attention, "get_path", lambda name: tmp_path)
    if has_headers:
        (tmp_path / "Python.h").touch()
    assert attention.has_triton.__wrapped__() is has_headers
