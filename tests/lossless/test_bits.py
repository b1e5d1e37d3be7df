"""On a CPU the speculative pass gives plain decoding's logits to the last bit: in float32, bfloat16 and 8 bits."""

from collections.abc import Callable

import pytest
import torch
from conftest import requests_for, run
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from draftwing import native
from draftwing.engine.tree import DraftTree
from draftwing.target.fused import FusedTarget, can_fuse
from draftwing.target.interface import ATTENTION
from draftwing.target.model import TargetModel
from draftwing.target.packed import PackedLinear, pack_linears
from draftwing.target.rounded import round_linears

DTYPES = [torch.float32, torch.bfloat16]
SAVED = "float32, saved in bfloat16"
"""Weights that 16 bits hold: they are multiplied by another library."""
ROUNDED = "float32, rounded to 8 bits"
KINDS: list[torch.dtype | str] = [*DTYPES, SAVED, ROUNDED]
CONTEXT = [1, 2, 3, 4, 5, 6, 7]
#          0 root
#        1     2
#      3   4     5
#      6
TOKENS, PARENTS, DEPTHS = [8, 9, 10, 11, 12, 13, 14], [0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 2, 2, 2, 3]


SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "attn_implementation": ATTENTION,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
PASSES = {"stock": TargetModel, "fused": FusedTarget, "without a compiler": FusedTarget}


@pytest.fixture(params=PASSES)
def passes(request: pytest.FixtureRequest) -> str:
    """The stock modules' pass, and the one that is written out: in C, and for torch."""
    name: str = request.param
    if name == "without a compiler":
        request.getfixturevalue("without_native")
    return name


def in_kind(model: torch.nn.Module, kind: torch.dtype | str) -> torch.nn.Module:
    """A model of one of KINDS."""
    if kind == ROUNDED:
        round_linears(model)
    return model.bfloat16().float() if kind == SAVED else model.to(kind if isinstance(kind, torch.dtype) else None)


def packed_target(dtype: torch.dtype | str, passes: str = "stock", family: str = "llama") -> TargetModel:
    """A small random target with packed products, its biases and norms not at their initial zeros and ones."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    pack_linears(model := in_kind(model, dtype))
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        pytest.skip(f"no packed {dtype} products on this machine")
    assert can_fuse(model)
    return PASSES[passes](model)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("passes")
@torch.inference_mode()
def test_wide_products_keep_a_rows_bits_from_some_rows_on(kind: torch.dtype | str) -> None:
    """A single row may round differently where there are many inputs, so plain decoding pads it."""
    torch.manual_seed(0)
    dtype = kind if isinstance(kind, torch.dtype) else torch.float32
    layer = in_kind(torch.nn.Sequential(torch.nn.Linear(4096, 1024, bias=False)), kind)
    pack_linears(layer)
    if not isinstance(layer[0], PackedLinear):
        pytest.skip(f"no packed {dtype} products on this machine")
    x, residual = torch.randn(1, 133, 4096).to(dtype), torch.randn(1, 133, 1024).to(dtype)
    together, added = layer(x), layer[0].product.add_to(residual, x)
    for first, last in ((0, 2), (3, 6), (5, 12), (5, 13), (20, 37), (70, 102), (0, 120), (1, 122)):
        assert torch.equal(layer(x[:, first:last]), together[:, first:last])
        assert torch.equal(layer[0].product.add_to(residual[:, first:last], x[:, first:last]), added[:, first:last])
        copy = residual[:, first:last].clone()
        assert layer[0].product.add_to(copy, x[:, first:last], overwrite=True).equal(added[:, first:last])
    assert packed_target(kind).best_single_row == layer[0].product.least_rows


@pytest.mark.parametrize("dtype", KINDS)
@torch.inference_mode()
def test_each_node_of_a_tree_has_the_bits_of_plain_decoding(dtype: torch.dtype | str, passes: str) -> None:
    target = packed_target(dtype, passes)
    in_tree = tree_logits(target)
    for node in range(len(TOKENS)):
        assert torch.equal(in_tree[node], plain_logits(target, node)), f"node {node}"


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.usefixtures("as_many_threads_afterwards")
@torch.inference_mode()
def test_bits_are_the_same_on_any_number_of_threads(
    dtype: torch.dtype | str, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number may change within a generation, so a product must not round by it; all parts are large enough to
    be shared."""
    for name, size in {"hidden_size": 512, "head_dim": 128, "intermediate_size": 1024, "vocab_size": 40_000}.items():
        monkeypatch.setitem(SIZES, name, size)
    target, logits = packed_target(dtype, passes), []
    assert not target.bits_depend_on_threads
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        logits.append(tree_logits(target))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.usefixtures("as_many_threads_afterwards")
@torch.inference_mode()
def test_torchs_own_products_are_known_to_round_by_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the number stays through a generation, whatever becomes free meanwhile."""
    monkeypatch.setattr("draftwing.engine.engine.num_threads", lambda: 2)
    monkeypatch.setattr("draftwing.threads.num_threads", lambda: 3)
    seen: dict[bool, set[int]] = {}
    for is_packed in (False, True):
        target = packed_target(torch.float32) if is_packed else TargetModel(FAMILIES["llama"]().eval())
        assert target.bits_depend_on_threads != is_packed
        numbers = seen.setdefault(is_packed, set())
        target.model.register_forward_hook(lambda *_, numbers=numbers: numbers.add(torch.get_num_threads()))
        run(target, requests_for([CONTEXT], max_new_tokens=3))
    assert seen == {False: {2}, True: {3}}
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("passes", ["stock", "without a compiler"], indirect=True)
@torch.inference_mode()
def test_bits_differ_when_attention_sums_in_the_models_own_dtype(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotaged twin: without float64 sums, the order of a branch's keys shows."""
    target = packed_target(torch.float32, passes)
    monkeypatch.setattr(TargetModel, "attention_dtype", property(lambda self: self.dtype))
    in_tree = tree_logits(target)
    assert not all(torch.equal(in_tree[node], plain_logits(target, node)) for node in range(len(TOKENS)))


@pytest.mark.skipif(native.library() is None, reason="this machine has no C compiler")
@torch.inference_mode()
def test_bits_differ_when_keys_are_read_in_an_order_that_depends_on_gaps(
    sabotaged_native: Callable[[str, str], None],
) -> None:
    heads = "for (int64_t head = h * groups; head"
    sabotaged_native(
        heads,
        "if (visible[count - 1] >= count) { int32_t s = visible[0]; visible[0] = visible[count / 2]; "
        f"visible[count / 2] = s; }} {heads}",
    )
    target = packed_target(torch.float32, "fused")
    in_tree = tree_logits(target)
    assert not all(torch.equal(in_tree[node], plain_logits(target, node)) for node in range(len(TOKENS)))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_fused_pass_computes_what_the_stock_modules_do(family: str, passes: str) -> None:
    stock, fused = (packed_target(torch.float32, name, family) for name in ("stock", passes))
    tokens, depths = torch.tensor([TOKENS]), torch.tensor([DEPTHS])
    ancestors = torch.ones(1, len(TOKENS), len(TOKENS), dtype=torch.bool).tril()
    layers = (0, 2, 4)
    theirs, ours = (
        target.forward_tree(tokens, depths, ancestors, prefilled(target), layers) for target in (stock, fused)
    )
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.features, theirs.features, atol=1e-4, rtol=1e-4)


def test_products_that_an_adapter_has_split_are_not_fused() -> None:
    """The fused pass multiplies queries, keys and values at once, and gate and up."""
    for part, name in (("self_attn", "v_proj"), ("mlp", "up_proj")):
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
        linear = getattr(getattr(model.model.layers[1], part), name)
        setattr(getattr(model.model.layers[1], part), name, torch.nn.Sequential(linear))
        pack_linears(model)
        assert not can_fuse(model)


def test_quantised_weights_are_not_packed() -> None:
    class Quantised(torch.Tensor):
        """Stands for the tensor classes of quantisation libraries."""

    linear = torch.nn.Linear(8, 8)
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    model = torch.nn.Sequential(linear)
    pack_linears(model)
    assert model[0] is linear


@pytest.mark.parametrize("lengths", [(2,), (6,), (1, 2), (9, 6)])
def test_no_pass_over_a_prompt_is_a_single_row(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 product of one row rounds differently, so a prompt's keys would depend on the batch it is read in."""
    monkeypatch.setattr("draftwing.engine.engine.PREFILL_CHUNK", 4)
    target, num_rows = packed_target(torch.float32), []
    original = target.prefill
    monkeypatch.setattr(
        target, "prefill", lambda tokens, *rest: num_rows.append(tokens.numel()) or original(tokens, *rest)
    )
    run(target, requests_for([CONTEXT[:1] * length for length in lengths], max_new_tokens=1))
    assert min(num_rows) >= 2


def test_what_the_fused_pass_does_not_know_is_left_to_the_stock_modules() -> None:
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    pack_linears(model)
    assert not can_fuse(model)
    assert not can_fuse(LlamaForCausalLM(LlamaConfig(**SIZES))), "its products are not packed"
    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    pack_linears(model)
    assert not can_fuse(model)
