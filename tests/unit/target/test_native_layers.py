"""A CPU's products and layers in C: what torch computes, a row's bits whatever passes with it, and doing without."""

import logging
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch.nn import functional

from draftwing import native
from draftwing.drafts.eagle.build_head import build_network
from draftwing.drafts.eagle.fused_layers import pack_head
from draftwing.drafts.eagle.network import Eagle3Model, EagleModel
from draftwing.engine.noise import gumbel
from draftwing.layers import DraftConfig, DraftVocab
from draftwing.target import fused, native_layers
from draftwing.target.attention import CacheAttention
from draftwing.target.kv_cache import KVCache, LayerShape, visible_slots
from draftwing.target.model import TargetModel
from draftwing.target.packed import NativeProduct, pack_linears
from draftwing.target.rounded import round_linears, to_int8

needs_library = pytest.mark.skipif(native.library() is None, reason="this machine has no C compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (16, 8), (33, 100), (50, 7), (200, 576)]
"""Outputs and inputs: fewer than a panel is wide, whole panels, and a part of one more."""


@pytest.fixture(params=["this machine's flags", "any machine's flags"])
def flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compiled as usual, and as on a machine whose compiler knows no -march=native: without fused multiply-adds."""
    if request.param == "any machine's flags":
        monkeypatch.setattr(native, "TRIED", (("-fopenmp",),))
        native.library.cache_clear()
    yield request.param
    native.library.cache_clear()


def saved_weight(dtype: torch.dtype, outputs: int, inputs: int) -> torch.Tensor:
    """A float32 weight that was saved in a dtype, with the smallest numbers that it has."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs)
    weight[0, 0] = 3 * torch.finfo(dtype).smallest_normal
    if dtype == torch.float16:
        weight[-1, -1] = 3 * 2.0**-24
    return weight.to(dtype).float()


@needs_library
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_products_are_torchs(dtype: torch.dtype, shape: tuple[int, int], flags: str) -> None:
    weight, bias = saved_weight(dtype, *shape), torch.randn(shape[0])
    panels = native_layers.Panels(weight, bias)
    for num_rows in (0, 1, 2, 5, 6, 7, 8, 9, 13, 40):
        x, added = torch.randn(num_rows, shape[1]), torch.randn(num_rows, shape[0])
        right = functional.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(panels.multiply(x).double(), right, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(panels.multiply(x, added).double(), right + added, rtol=1e-5, atol=1e-4)
        copy = added.clone()
        assert panels.multiply(x, copy, overwrite=True).data_ptr() == copy.data_ptr()
        assert copy.equal(panels.multiply(x, added))


def whole_products(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """A rounded layer's outputs: rows in 16 bits, exact sums over 512 inputs, and their total in float32."""
    numbers, scale = to_int8(layer.weight.detach())
    largest, most = x.abs().amax(1, keepdim=True), torch.tensor(32767.0)
    rounded = (x * (most / largest)).round().where(largest > 0, 0)
    parts = zip(rounded.double().split(512, 1), numbers.double().split(512, 1), strict=True)
    sums = sum(((row @ column.T).float() for row, column in parts), torch.zeros(1))
    return sums * (scale * (largest / most)) + layer.bias


@needs_library
@pytest.mark.parametrize("shape", [*SHAPES, (40, 513), (17, 1600)])
@torch.inference_mode()
def test_weights_in_8_bits_are_multiplied_as_whole_numbers(shape: tuple[int, int], flags: str) -> None:
    """So a row's bits are the same on every machine, whatever passes with it."""
    layer = nn.Linear(shape[1], shape[0])
    block = nn.Sequential(layer)
    round_linears(block)
    x = torch.randn(20, shape[1])
    x[3], x[4] = 0, 1e-30
    right, in_floats = whole_products(x, block[0]), block(x)
    pack_linears(block)
    assert block[0].product.panels.kept_in == torch.int8
    for num_rows in range(1, 21):
        assert block(x[-num_rows:]).equal(right[-num_rows:]), f"{num_rows} rows"
    torch.testing.assert_close(block(x), in_floats, rtol=1e-3, atol=1e-3)


@needs_library
@torch.inference_mode()
def test_no_sum_of_whole_numbers_overflows(flags: str) -> None:
    layer = nn.Linear(2048, 1, bias=False)
    layer.weight.data.fill_(127.0)
    block = nn.Sequential(layer)
    round_linears(block)
    pack_linears(block)
    for sign in (1, -1):
        assert block(torch.full((1, 2048), sign * 32767.0)).item() == sign * 127.0 * 32767 * 2048


@needs_library
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@torch.inference_mode()
def test_a_row_with_a_number_that_is_none_has_no_others(number: float, flags: str) -> None:
    block = nn.Sequential(nn.Linear(19, 5))
    round_linears(block)
    pack_linears(block)
    x = torch.randn(3, 19)
    right = block(x)
    x[1, 17] = number
    assert block(x)[1].isnan().all() and block(x)[[0, 2]].equal(right[[0, 2]])
    torch.testing.assert_close(
        block(torch.full((1, 19), 1e-42)), block(torch.zeros(1, 19))
    )  # 32767 / 1e-42 is infinite


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_numbers_are_refused(dtype: torch.dtype) -> None:
    panels = native_layers.Panels(saved_weight(torch.float32, 16, 8), None)
    with pytest.raises(TypeError, match="expected float32 on the CPU"):
        panels.multiply(torch.ones(2, 8, dtype=dtype))
    with pytest.raises(TypeError, match="expected float32 on the CPU"):
        panels.multiply(torch.ones(2, 8), torch.ones(2, 16, dtype=dtype))


@needs_library
@torch.inference_mode()
def test_what_is_added_may_have_gaps() -> None:
    panels = native_layers.Panels(saved_weight(torch.float32, 16, 8), None)
    x, added = torch.randn(3, 8), torch.randn(3, 32)[:, :16]
    expected = panels.multiply(x, added.contiguous())
    assert panels.multiply(x, added, overwrite=True).equal(expected)


@needs_library
def test_small_float16_numbers_are_read_exactly(flags: str) -> None:
    weight = torch.tensor([[2.0**-24, 65504.0, -(2.0**-15), -0.0, 1 / 3]]).half().float()
    panels = native_layers.Panels(weight, None)
    for column, number in enumerate(weight[0].tolist()):
        assert panels.multiply(torch.eye(5)[column : column + 1]).item() == number


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_kept_in_16_bits_where_these_hold_them(dtype: torch.dtype) -> None:
    assert native_layers.Panels(saved_weight(dtype, 16, 8), None).kept_in == dtype
    unusual = saved_weight(torch.bfloat16, 16, 8)
    for number in (1 + 2**-20, torch.nan):
        unusual[3, 3] = number
        assert native_layers.Panels(unusual, None).kept_in == torch.float32


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_any_number_of_rows_and_threads_has_the_bits_of_any_other(dtype: torch.dtype, threads: None) -> None:
    panels = native_layers.Panels(saved_weight(dtype, 200, 576), torch.randn(200))
    x, added = torch.randn(70, 576), torch.randn(70, 200)
    together = panels.multiply(x, added)
    for number in range(1, 70):
        torch.set_num_threads(1 + number % 3)
        assert panels.multiply(x[-number:], added[-number:]).equal(together[-number:]), f"{number} rows"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch, as_many_threads_afterwards: None) -> None:
    """The number may be set, and all of them get work."""
    monkeypatch.setattr(native, "LEAST_WORK", 1)


@needs_library
@torch.inference_mode()
def test_a_sum_that_depends_on_the_rows_is_noticed(sabotaged_native: Callable[[str, str], None]) -> None:
    sum_of_one = "sums[r][0] = multiply_add(low, factor, sums[r][0]);"
    sabotaged_native(sum_of_one, f"if (count == 1) sums[r][0] += low * (factor * 1.0000002f); else {sum_of_one}")
    panels = native_layers.Panels(saved_weight(torch.bfloat16, 200, 576), None)
    x = torch.randn(7, 576)
    assert not panels.multiply(x[:1]).equal(panels.multiply(x)[:1])


@needs_library
@pytest.mark.parametrize("shape", [(1, 576), (5, 64), (3, 7), (4, 3, 16), (2, 5, 9)])
@torch.inference_mode()
def test_norms_are_those_that_are_written_out(shape: tuple[int, ...], flags: str) -> None:
    x, eps = torch.randn(shape[0], *shape[1:-1], 2 * shape[-1])[..., : shape[-1]], torch.tensor(1e-5)
    for weight in (torch.rand(shape[-1]), torch.rand(shape[1:])):
        gapless = x.contiguous() if x.dim() == 3 else x  # a row of heads has no gaps
        torch.testing.assert_close(native_layers.normalise(gapless, weight, eps), fused.normalise(x, weight, eps))


@needs_library
def test_noise_has_the_bits_of_what_torch_hashes(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    of = torch.tensor(2**40 + 3), torch.arange(5, 8), torch.arange(1001)
    in_c = gumbel(*of)
    with monkeypatch.context() as without_c:
        without_c.setattr(native, "library", lambda: None)
        assert in_c.equal(gumbel(*of))


CONFIG = DraftConfig(
    hidden_size=32,
    intermediate_size=44,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    vocab_size=50,
    draft_vocab_size=50,
    target_hidden_size=32,
    max_position_embeddings=64,
)
OPTIONS = {
    "eagle1": {"num_hidden_layers": 2},
    "eagle3": {"aux_layers": (0, 1, 2)},
    "norms of heads": {"aux_layers": (0, 1, 2), "qk_norm": True, "num_hidden_layers": 2},
    "biases": {"aux_layers": (0, 1, 2), "attention_bias": True, "output_bias": True, "mlp_bias": True},
    "some of the numbers are rotated": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    },
    "one key head for each": {"num_key_value_heads": 4, "head_dim": 64},
    "the residual is normed": {"aux_layers": (0, 1, 2), "norm_before_residual": True},
}


def random_head(options: str) -> EagleModel | Eagle3Model:
    torch.manual_seed(0)
    config, embedding = DraftConfig(**{**vars(CONFIG), **OPTIONS[options]}), nn.Embedding(50, 32)
    target = nn.Sequential(nn.Linear(32, 50, bias=False))
    pack_linears(target)
    if config.aux_layers:
        return Eagle3Model(config, DraftVocab(None, 50), embedding, target[0]).eval()
    return EagleModel(config, embedding, target[0]).eval()


def passes(head: EagleModel | Eagle3Model, num_seats: int = 3, num_spare: int = 0) -> list[torch.Tensor]:
    """Outputs and logits of a pass over 9 tokens, and of one over a tree of 5 nodes behind 9, 4 and 7 of them."""
    config = head.config
    shape = LayerShape(config.num_key_value_heads, config.head_dim, config.head_dim)
    cache = KVCache([shape] * config.num_hidden_layers, num_seats + num_spare, 20, torch.float32, torch.device("cpu"))
    cache = cache.part(num_spare, num_seats + num_spare)
    generator, outputs = torch.Generator().manual_seed(1), []
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    tree = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 0, 0, 1]]).bool()
    for ancestors, depths, num_kept in ((causal, torch.arange(9), [9, 4, 7]), (tree, [0, 1, 1, 2, 2], [1, 1, 1])):
        number = len(ancestors)
        hidden = torch.randn(num_seats, number, 32, generator=generator)
        tokens = torch.randint(50, (num_seats, number), generator=generator)
        visible = visible_slots(cache.lengths, ancestors.expand(num_seats, -1, -1), cache.num_read(number))
        attend = CacheAttention(cache, cache.slots_behind(number), visible.unsqueeze(1))
        positions = cache.lengths[:, None] + torch.as_tensor(depths)
        outputs.append(head(hidden, tokens, positions, attend))
        outputs.append(head.logits(outputs[-1]))
        cache.commit(None, torch.tensor(num_kept[:num_seats]), max_kept=9)
    return outputs


@needs_library
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("in_one_call", [True, False])
@torch.inference_mode()
def test_networks_and_their_layers_are_those_of_the_modules(options: str, in_one_call: bool, flags: str) -> None:
    head = random_head(options)
    expected = passes(head)
    pack_head(head)
    assert any(isinstance(module, fused.Layer) for layer in head.modules() for module in vars(layer).values())
    assert head.native is not None
    if not in_one_call:
        head.native = None
    for ours, theirs in zip(passes(head), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@needs_library
@torch.inference_mode()
def test_a_residual_may_have_gaps() -> None:
    head = random_head("eagle3")
    hidden, tokens = torch.randn(3, 4, 32)[:, :1], torch.ones(3, 1, dtype=torch.int64)

    def output() -> torch.Tensor:
        shape = LayerShape(2, 12, 12)
        cache = KVCache([shape], 3, 20, torch.float32, torch.device("cpu"))
        visible = torch.ones(3, 1, 1, 1, dtype=torch.bool)
        return head(hidden, tokens, torch.zeros_like(tokens), CacheAttention(cache, cache.slots_behind(1), visible))

    expected = output()
    pack_head(head)
    torch.testing.assert_close(output(), expected, atol=1e-5, rtol=1e-4)


@needs_library
@torch.inference_mode()
def test_layers_may_differ_in_width() -> None:
    """A pruned model's do."""
    model = tiny_llama().float()
    wide = model.model.layers[1].mlp
    for name, sizes in (("gate_proj", (32, 256)), ("up_proj", (32, 256)), ("down_proj", (256, 32))):
        setattr(wide, name, nn.Linear(*sizes, bias=False))
    tokens = torch.arange(1, 11)[None]
    expected = model(tokens, use_cache=False).logits
    target = fused.pack_target(TargetModel(model))
    assert isinstance(target, fused.FusedTarget)
    output = target.prefill(tokens, torch.tensor([10]), target.new_cache(1, 20), all_logits=True)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)


@needs_library
@torch.inference_mode()
def test_a_model_may_have_fewer_layers_than_its_configuration_says() -> None:
    """The stock pass runs those that there are."""
    model = tiny_llama().float()
    model.model.layers = model.model.layers[:2]
    tokens = torch.arange(1, 11)[None]
    expected = model(tokens, use_cache=False).logits
    target = fused.pack_target(TargetModel(model))
    output = target.prefill(tokens, torch.tensor([10]), target.new_cache(1, 20), all_logits=True)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("changes", [{}, {"aux_layers": (1, 2, 3)}, {"aux_layers": (1, 2, 3), "own_lm_head": False}])
@torch.inference_mode()
def test_heads_as_they_are_loaded_run_in_c(changes: dict[str, Any]) -> None:
    """Whoever has the output head: the target's is a function."""
    target = fused.pack_target(TargetModel(tiny_llama().float()))
    sizes = {"vocab_size": 64, "draft_vocab_size": 64, "target_hidden_size": 32}
    head = build_network(DraftConfig(**{**vars(CONFIG), **sizes, **changes}), target, None).eval()
    expected = passes(head)
    pack_head(head)
    assert head.native is not None
    for ours, theirs in zip(passes(head), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@needs_library
@torch.inference_mode()
def test_an_embedding_that_does_more_than_to_read_rows_is_called() -> None:
    head = random_head("eagle3")
    assert isinstance(head.embedding, nn.Embedding)
    head.embedding.register_forward_hook(lambda module, inputs, output: 2 * output)
    expected = passes(head)
    pack_head(head)
    for ours, theirs in zip(passes(head), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("options", ["eagle1", "norms of heads"])
@torch.inference_mode()
def test_a_layers_bits_are_the_same_with_other_seats_and_threads(options: str, threads: None) -> None:
    head = random_head(options)
    pack_head(head)
    together = passes(head)
    torch.set_num_threads(3)
    for ours, theirs in zip(passes(head, num_spare=2), together, strict=True):
        assert ours.equal(theirs)


@needs_library
def test_a_layer_that_another_library_multiplies_for_is_written_out(without_native: None) -> None:
    head = random_head("eagle3")
    pack_head(head)
    layer = vars(head.midlayer)["layer"]
    assert layer.native is None


# Doing without


@pytest.fixture
def compiled_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compile once more, and compute nothing."""
    monkeypatch.setattr(native, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS))


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert native.library.__wrapped__() is None
    assert "no C compiler" in caplog.text


def test_a_compiler_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert native.library.__wrapped__() is None
    assert "broken-cc" in caplog.text
    assert "out of order" in caplog.text
    assert not (tmp_path / "native").exists()


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTWING_NATIVE", "0")
    assert native.library.__wrapped__() is None


@needs_library
@pytest.mark.usefixtures("compiled_quickly")
def test_the_file_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path))
    assert native.library.__wrapped__() is not None
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))
    assert native.library.__wrapped__() is not None


@needs_library
@pytest.mark.usefixtures("compiled_quickly")
def test_a_file_that_does_not_load_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path))
    assert native.library.__wrapped__() is not None
    (kept,) = tmp_path.glob("native/*/native.so")
    kept.unlink()  # never written over: this process has it open
    kept.write_bytes(b"cut")
    assert native.library.__wrapped__() is not None
    assert kept.stat().st_size > 3


@needs_library
@pytest.mark.usefixtures("compiled_quickly")
def test_a_machine_without_a_home_folder_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native, "cache_folder", no_home)
    assert native.library.__wrapped__() is not None


@needs_library
@pytest.mark.usefixtures("compiled_quickly")
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "native").touch()
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path))
    assert native.library.__wrapped__() is not None


@needs_library
def test_products_with_it_are_its_own() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    pack_linears(block)
    assert isinstance(block[0].product, NativeProduct)
