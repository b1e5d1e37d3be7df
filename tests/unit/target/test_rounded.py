"""Draft heads in 8 bits: how weights are rounded, the product that reads them, and who may ask for it."""

import copy
from importlib.util import find_spec

import pytest
import torch
from conftest import eagle, generate, plain, requests_for
from torch import nn
from torch.nn import functional

import draftwing
from draftwing import native
from draftwing.drafts.eagle.fused_layers import pack_head
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.target import packed
from draftwing.target.model import TargetModel
from draftwing.target.packed import Int8Product, PackedLinear, pack_linears
from draftwing.target.rounded import LARGEST, RoundedLinear, round_linears, to_int8
from draftwing.target.row_layout import RowProduct, Tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rounded_weight_is_rounded_to_itself(dtype: torch.dtype) -> None:
    layer = nn.Linear(300, 40).to(dtype)
    layer.weight.data[3] = 0
    numbers, scale = to_int8(layer.weight.detach())
    rounded = RoundedLinear(layer)
    again, _ = to_int8(rounded.weight.detach())
    assert torch.equal(again, numbers) and rounded.weight.dtype == dtype and rounded.bias is layer.bias
    assert numbers.abs().amax(1).tolist() == [LARGEST] * 3 + [0] + [LARGEST] * 36
    apart = (rounded.weight - layer.weight).abs().detach().float()
    assert (apart <= 0.8 * scale[:, None]).all()  # half a step, and what 16 bits round


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is missing")
@pytest.mark.parametrize(("splits", "tiles"), [(1, 32), (2, 16)])
def test_the_kernels_multiply_int8(splits: int, tiles: int) -> None:
    """Beside the formula in float64; without the scale it would be another one."""
    from draftwing.target.row_products import multiply, multiply_gated, multiply_split

    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers, scale = to_int8(random(48, 80) * torch.arange(1, 49)[:, None] / 200)
    x, bias = random(5, 80, seed=1).half().to(device), random(48, seed=2).half().to(device)
    product = RowProduct(numbers.to(device), bias, Tiles(tiles, 32, splits, 4, 2), scale.to(device))
    expected = functional.linear(x.double(), product.weight.double() * product.scale.double()[:, None], bias.double())
    close = {"atol": 2e-3, "rtol": 1e-3}
    sums = multiply_split(x, product).double().sum(0) + bias.double()
    torch.testing.assert_close(sums, expected, atol=1e-4, rtol=1e-4)
    if splits == 1:
        torch.testing.assert_close(multiply(x, product).double(), expected, **close)
        gate, up = expected.chunk(2, dim=-1)
        torch.testing.assert_close(
            multiply_gated(x, product).double(), functional.silu(gate) * up, atol=1e-2, rtol=1e-2
        )


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is missing")
def test_a_packed_head_reads_int8_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_multiplies_int8", lambda weight: not torch.cuda.is_available())
    block = nn.Module()
    block.q_proj, block.k_proj, block.v_proj = nn.Linear(32, 16), nn.Linear(32, 8), nn.Linear(32, 8, bias=False)
    round_linears(block)
    layers, x = [block.q_proj, block.k_proj, block.v_proj], random(2, 3, 32)
    expected = [layer(x) for layer in layers]
    pack_linears(block)
    assert isinstance(block.q_proj, PackedLinear) and isinstance(block.q_proj.product, Int8Product)
    outputs = [getattr(block, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    residual = random(6, 32, seed=3)
    added = block.q_proj.product.add_to(residual.clone(), x.flatten(0, 1))
    torch.testing.assert_close(added, torch.cat(expected, -1).flatten(0, 1) + residual, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("method", ["eagle1", "eagle3"])
def test_rounded_heads_change_no_token(
    target: TargetModel, heads: dict[str, DraftNetwork], prompts: list[list[int]], method: str, temperature: float
) -> None:
    head = copy.deepcopy(heads[method])
    round_linears(head)
    own = dict(heads[method].named_parameters())
    changed = [name for name, weight in head.named_parameters() if not torch.equal(weight, own[name])]
    assert "fc.weight" in changed and not any("norm" in name or "embed" in name for name in changed)
    pack_head(head)
    requests = requests_for(prompts, temperature=temperature)
    generation = generate(target, requests, eagle(head), "tree:4x4x16")
    assert [output.tokens for output in generation.outputs] == plain(target, requests)
    assert generation.statistics.acceptance_length > 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_head_is_in_8_bits_by_itself_where_c_reads_them(dtype: str, machine: str) -> None:
    head = draftwing.load("tiny", draft="tiny", dtype=dtype).draft
    product = head.lm_head.product
    is_native = isinstance(product, packed.NativeProduct)
    assert is_native == (dtype == "float32" and machine == "as it is" and native.library() is not None)
    assert not is_native or product.panels.kept_in == torch.int8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "tiny", "draft_dtype": "int3"}, "draft_dtype: expected int8 or target, got 'int3'"),
        ({"draft_dtype": "int8"}, "draft_dtype: for a draft head, and no draft is loaded"),
        ({"draft": "tiny", "method": "ngram", "draft_dtype": "int8"}, "draft_dtype: .* no draft is loaded"),
    ],
)
def test_a_wrong_draft_dtype_is_one_error(options: dict[str, str], message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        draftwing.load("tiny", **options)


def test_the_embedded_head_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = draftwing.load("tiny", draft="tiny", draft_dtype="int8", dtype="float32")
    own = draftwing.load("tiny", draft="tiny", draft_dtype="target", dtype="float32")
    options = {"max_new_tokens": 8, "plan": "chain:3"}
    tokens = [one.generate([[5, 6, 7]], **options).tolist() for one in (model, own)]
    assert tokens[0] == tokens[1]
    weights = [one.draft.lm_head(torch.eye(one.draft.config.hidden_size)).T for one in (model, own)]
    numbers, scale = to_int8(weights[1])
    torch.testing.assert_close(weights[0], numbers * scale[:, None], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(weights[0], weights[1], atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("draftwing.api.load_packed", None)  # a wrong one is known before the draft is loaded
    with pytest.raises(ValueError, match="draft_dtype: expected int8 or target, got 'int3'"):
        model.with_draft("tiny", draft_dtype="int3")
