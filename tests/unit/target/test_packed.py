"""Products of few rows without native.c: weights that 16 bits hold are kept in 16 bits, with the sums of float32."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from draftwing.target import packed
from draftwing.target.packed import HalfProduct, PackedProduct, half_exponent, pack_linears, same_rows

pytestmark = [
    pytest.mark.skipif(not same_rows(), reason="this machine has no products with float16 weights"),
    pytest.mark.usefixtures("without_native"),
]


def linear(num_inputs: int = 48, num_outputs: int = 32, bias: bool = False, scale: float = 1.0) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(num_inputs, num_outputs, bias=bias)
    with torch.no_grad():
        for part in layer.parameters():
            part.copy_((part * scale).bfloat16())
    return layer


def product_of(layer: nn.Linear) -> packed.Product:
    return packed._product([layer])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@torch.inference_mode()
def test_weights_that_were_saved_in_16_bits_are_kept_so(scale: float, bias: bool) -> None:
    layer = linear(bias=bias, scale=scale)
    product = product_of(layer)
    assert isinstance(product, HalfProduct)
    x, residual = torch.randn(2, 5, 48), torch.randn(2, 5, 32) * scale
    expected = nn.functional.linear(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    torch.testing.assert_close(product(x).double() / scale, expected / scale, rtol=1e-5, atol=1e-6)
    total = product.add_to(residual.flatten(0, 1), x.flatten(0, 1)).double()
    torch.testing.assert_close(
        total / scale, (residual.double() + expected).flatten(0, 1) / scale, rtol=1e-5, atol=1e-6
    )


def test_the_largest_and_the_smallest_numbers_of_float16_saved_weights_are_exact() -> None:
    weight = torch.tensor([65504.0, 2.0**-24, -(2.0**-14), 1 / 3]).half().float()
    exponent = half_exponent(weight)
    assert exponent is not None
    scaled = weight * 2.0**exponent
    assert scaled.abs().max() < 65504
    assert (scaled.half().float() - scaled).abs().max() <= 2.0**-24


@pytest.mark.parametrize(
    "weight",
    [torch.randn(4, 4), torch.tensor([[1.0, 1 + 2**-12]]), torch.tensor([[torch.nan]]), torch.tensor([[torch.inf, 1]])],
    ids=["float32", "one number", "nan", "infinity"],
)
def test_other_weights_are_kept_as_they_are(weight: torch.Tensor) -> None:
    assert half_exponent(weight) is None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    assert isinstance(product_of(layer), PackedProduct)


def test_zeros_are_weights_too() -> None:
    layer = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(layer.weight)
    with torch.inference_mode():
        assert not product_of(layer)(torch.randn(3, 8)).any()


@pytest.mark.parametrize("num_inputs", [64, 1000])
@torch.inference_mode()
def test_any_number_of_rows_has_the_bits_of_any_other(num_inputs: int) -> None:
    product = product_of(linear(num_inputs))
    x = torch.randn(250, num_inputs)
    together = product(x)
    for number in (*range(1, 130), 239, 240, 241):
        assert product(x[-number:]).equal(together[-number:]), f"{number} rows"


@pytest.fixture
def _as_they_come(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sabotage: rows are multiplied in the numbers in which they come."""
    monkeypatch.setattr(packed, "same_rows", lambda: list(range(packed.MOST_ROWS + 1)))
    yield


@pytest.mark.usefixtures("_as_they_come")
@torch.inference_mode()
def test_sabotage_is_noticed() -> None:
    layer = linear(1000)
    product = HalfProduct([layer], layer.weight.detach(), None, 0)
    x = torch.randn(250, 1000)
    together = product(x)
    assert not all(product(x[:number]).equal(together[:number]) for number in range(1, 130))


def test_layers_that_read_the_same_tensor_have_one_power() -> None:
    block = nn.Module()
    block.q_proj, block.k_proj, block.v_proj = linear(), linear(scale=1e-3), linear(bias=True)
    x = torch.randn(1, 3, 48)
    with torch.inference_mode():
        expected = [layer(x) for layer in (block.q_proj, block.k_proj, block.v_proj)]
        pack_linears(block)
        assert isinstance(block.q_proj.product, HalfProduct)
        assert block.q_proj.product is block.v_proj.product
        for layer, right in zip((block.q_proj, block.k_proj, block.v_proj), expected, strict=True):
            torch.testing.assert_close(layer(x), right)


@pytest.mark.parametrize("engine", ["none of these", "qnnpack"])
def test_other_engines_have_none(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(torch.backends.quantized), "engine", property(lambda self: engine))
    assert packed.same_rows.__wrapped__() == ()
