"""Linear layers of a frozen model on a CPU, in oneDNN's own weight layout.

Two things that torch's product of a few rows with a plain weight lacks. A row's result has the same bits however many
rows pass with it, from two on, so that a tree's nodes and plain decoding's token agree to the last bit. And few rows
are fast: nothing is laid out anew at each call, and all threads work.
"""

from collections.abc import Sequence

import torch
from torch import nn

PACKED_DTYPES = (torch.float32, torch.bfloat16)
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling layers that read the same tensor in the models that have them: one product computes them all."""


def pack_linears(model: nn.Module) -> None:
    """Replace the model's linear layers by packed ones, in place, where this machine's oneDNN has the dtype.

    The model can be run as before but not trained, saved or moved to another device.
    """
    for parent in list(model.modules()):
        layers = {name: child for name, child in parent.named_children() if type(child) is nn.Linear}
        layers = {name: layer for name, layer in layers.items() if _can_pack(layer)}
        groups: list[tuple[str, ...]] = [
            group
            for group in SAME_INPUT
            if all(name in layers for name in group) and len({layers[name].in_features for name in group}) == 1
        ]
        groups += [(name,) for name in layers if not any(name in group for group in groups)]
        for group in groups:
            product = PackedProduct([layers[name] for name in group])
            for index, name in enumerate(group):
                setattr(parent, name, PackedLinear(product, index))


def multiplies_bfloat16() -> bool:
    """Whether this CPU has bf16 products of its own (AVX512-BF16 or AMX); others are faster in float32."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _can_pack(layer: nn.Linear) -> bool:
    if type(layer.weight) is not nn.Parameter:  # quantised weights are tensors of their own kinds
        return False
    if "forward" in vars(layer) or layer._forward_pre_hooks or layer._forward_hooks:  # it does more than its product
        return False
    dtype, device = layer.weight.dtype, layer.weight.device
    if device.type != "cpu" or dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedProduct:
    """One product for one or more layers that read the same tensor."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [
            torch.zeros(layer.out_features, dtype=weight.dtype) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
        self._bias = torch.cat(biases) if any(layer.bias is not None for layer in layers) else None
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._last: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The output of layer `index`; the others' are kept for the calls that follow with the same tensor."""
        if len(self.sizes) == 1:
            return self(x)
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] is not x:
            last = x, self(x).split(self.sizes, dim=-1)
        self._last = last if index < len(self.sizes) - 1 else None
        return last[1][index]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """All layers' outputs side by side."""
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The residual plus the product, which is rounded once."""
        total: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return total


class PackedLinear(nn.Module):
    """`x @ W.T + b` with a packed weight, in the weight's dtype; the same bits for a row whatever the other rows."""

    def __init__(self, product: PackedProduct, index: int) -> None:
        super().__init__()
        self.product, self._index = product, index
        self.out_features = product.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.output(x, self._index)
