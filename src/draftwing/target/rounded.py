"""Weights in 8 bits: int8 numbers and a float32 scale for each output.

Rounding a draft cannot change what is decoded, only how much of it is accepted. Rounding a target makes another model.
Kernels that multiply the 8 bits themselves read half the bytes of 16 (packed.py). Elsewhere a weight holds the rounded
numbers in its own dtype, and nothing is saved.
"""

import torch
from torch import nn

LARGEST = 127


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers `[out, in]` (int8) and the scales `[out]` (float32) that stand for a weight.

    A row's largest number stays as it is, so that a weight that has been rounded, in 16 bits or more, gives the same
    numbers again.
    """
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / LARGEST
    numbers = (wide / torch.where(scale == 0, 1, scale)[:, None]).round().clamp(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scale


class RoundedLinear(nn.Linear):
    """In the place of a linear layer: its weight is what `to_int8` makes of the layer's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        numbers, scale = to_int8(layer.weight.detach())
        self.weight = nn.Parameter((numbers * scale[:, None]).to(layer.weight.dtype))
        self.bias = layer.bias


def round_linears(network: nn.Module) -> None:
    """Replace a network's linear layers by rounded ones, in place; those that do more than their product stay."""
    for parent in [module for module in network.modules() if not isinstance(module, nn.Linear)]:
        round_children(parent)


def round_children(parent: nn.Module, dtype: torch.dtype | None = None) -> None:
    """As `round_linears`, of a module's own linear layers, which may become of another dtype."""
    for name, child in list(parent.named_children()):
        if type(child) is nn.Linear and not does_more(child):
            setattr(parent, name, RoundedLinear(child.to(dtype)))


def does_more(module: nn.Module) -> bool:
    """Whether a module does more than its class says: hooks, or a `forward` of its own."""
    return bool("forward" in vars(module) or module._forward_pre_hooks or module._forward_hooks)
