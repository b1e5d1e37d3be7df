"""Layers that read the same tensor are one product, in C and without a compiler."""

import pytest
import torch
from torch import nn

from draftwing.target.packed import PackedProduct, pack_linears


def linear(num_inputs: int = 48, num_outputs: int = 32, bias: bool = False, scale: float = 1.0) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(num_inputs, num_outputs, bias=bias)
    with torch.no_grad():
        for part in layer.parameters():
            part.copy_((part * scale).bfloat16())
    return layer


@pytest.mark.usefixtures("machine")
@torch.inference_mode()
def test_layers_that_read_the_same_tensor_are_one_product() -> None:
    block = nn.Module()
    block.q_proj, block.k_proj, block.v_proj = linear(), linear(scale=1e-3), linear(bias=True)
    x = torch.randn(1, 3, 48)
    expected = [layer(x) for layer in (block.q_proj, block.k_proj, block.v_proj)]
    pack_linears(block)
    assert block.q_proj.product is block.v_proj.product
    for layer, right in zip((block.q_proj, block.k_proj, block.v_proj), expected, strict=True):
        torch.testing.assert_close(layer(x), right)


@pytest.mark.parametrize("number", [0.0, torch.nan, torch.inf, 1e-30, 1e30, 1 + 2**-20])
@pytest.mark.usefixtures("machine")
@torch.inference_mode()
def test_weights_may_hold_any_numbers(number: float) -> None:
    block, x = nn.Sequential(linear()), torch.rand(3, 48)
    block[0].weight[5] = number
    expected = block(x)
    pack_linears(block)
    torch.testing.assert_close(block(x), expected, equal_nan=True)


def test_who_multiplies_without_a_compiler(without_native: None) -> None:
    block = nn.Sequential(linear())
    pack_linears(block)
    assert isinstance(block[0].product, PackedProduct)
