"""Linear layers of a frozen model for products of few rows; those that read the same tensor become one product.

On a CPU weights take a layout of layers.c or a library's, for two things that torch's product with a plain weight
lacks. A row's result has the same bits however many rows pass with it, from a few on, so that a tree's nodes and plain
decoding's token agree to the last bit. And few rows are fast: nothing is laid out anew at each call, and all threads
work. A pass of few rows is bound by reading weights, so float32 ones that 16 bits hold are kept in 16 bits in C.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from draftwing import native
from draftwing.target import native_layers
from draftwing.target.attention import kernels_take, on_device, serves_row_kernels
from draftwing.target.rounded import RoundedLinear, does_more, round_children, to_int8
from draftwing.target.row_layout import RowProduct, Tiles

PACKED_DTYPES = (torch.float32, torch.bfloat16)
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Sibling layers that read the same tensor in the models that have them: one product computes them all."""
LINEAR = (nn.Linear, RoundedLinear)
"""Layers that do no more than their product; others' classes may."""


def pack_linears(model: nn.Module, rounded_in: torch.dtype | None = None) -> None:
    """Replace the model's linear layers by packed ones, in place, where the device has products for them.

    With `rounded_in` they are rounded to 8 bits first, for inputs of this dtype. The model can be run as before but not
    trained, saved or moved to another device.
    """
    # Without the layers themselves, so that each one's weights go when they have been packed.
    for parent in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        if rounded_in is not None:
            round_children(parent, rounded_in)
        layers = {
            name: child
            for name, child in parent.named_children()
            if isinstance(child, nn.Linear) and type(child) in LINEAR and _can_pack(child)
        }
        groups: list[tuple[str, ...]] = [
            group
            for group in SAME_INPUT
            if all(name in layers for name in group) and len({layers[name].in_features for name in group}) == 1
        ]
        groups += [(name,) for name in layers if not any(name in group for group in groups)]
        for group in groups:
            product = _product([layers[name] for name in group])
            for index, name in enumerate(group):
                setattr(parent, name, PackedLinear(product, index))


def multiplies_bfloat16() -> bool:
    """Whether this CPU has bf16 products of its own (AVX512-BF16 or AMX); others are faster in float32."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def multiplies_in_c(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype run in layers.c on this device; it reads weights of 8 and 16 bits as they are."""
    return device.type == "cpu" and native.serves(torch.empty(0, dtype=dtype))


def _can_pack(layer: nn.Linear) -> bool:
    # Weights that are quantised or spread over processes are tensors of their own kinds.
    if type(layer.weight) is not nn.Parameter or type(layer.weight.data) is not torch.Tensor:
        return False
    if does_more(layer):
        return False
    dtype, device = layer.weight.dtype, layer.weight.device
    if device.type == "cuda" or (device.type == "cpu" and dtype == torch.float64) or native.serves(layer.weight):
        return True
    if device.type != "cpu" or dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Product(ABC):
    """One product for one or more layers that read the same tensor.

    Attributes:
        least_rows: from how many rows on each of them has the same bits whatever passes with it, if they ever do.
        bits_depend_on_threads: whether another number of threads sums in another order.
    """

    least_rows = 1
    bits_depend_on_threads = False

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.dtype, self.device = layers[0].weight.dtype, layers[0].weight.device
        self._last: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None

    def __str__(self) -> str:
        """What its speed depends on."""
        return type(self).__name__

    def output(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The output of layer `index`; the others' are kept for the calls that follow with the same tensor."""
        if len(self.sizes) == 1:
            return self(x)
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] is not x:
            last = x, self(x).split(self.sizes, dim=-1)
        self._last = last if index < len(self.sizes) - 1 else None
        return last[1][index]

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """All layers' outputs side by side."""

    @abstractmethod
    def add_to(self, residual: torch.Tensor, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """The residual `[R, out]` plus the product of `x [R, in]`; it may `overwrite` the residual."""


class PackedProduct(Product):
    """oneDNN's, with a weight in its own layout."""

    least_rows = 2

    def __init__(self, layers: Sequence[nn.Linear], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(layers)
        self._bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        total: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        return total


class NativeProduct(Product):
    """layers.c's. Rounded weights are kept in 8 bits, others in 16 if these hold them exactly, else in float32."""

    def __init__(self, layers: Sequence[nn.Linear], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(layers)
        numbers, scale = to_int8(weight) if isinstance(layers[0], RoundedLinear) else (weight, None)
        self.panels = native_layers.Panels(numbers, bias, scale)

    def __str__(self) -> str:
        return f"{super().__str__()} of {self.panels.kept_in}"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.panels.multiply(x)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        return self.panels.multiply(x, residual, overwrite)


def _product(layers: Sequence[nn.Linear]) -> Product:
    """The fastest product; on a CPU, but in float64, one whose bits do not depend on what passes with a row."""
    weight, bias = _joined(layers)
    if isinstance(layers[0], RoundedLinear) and _multiplies_int8(weight):
        return Int8Product(layers, weight, bias)
    if weight.device.type != "cpu" or weight.dtype == torch.float64:
        return JoinedProduct(layers, weight, bias)
    if native.serves(weight):
        return NativeProduct(layers, weight, bias)
    return PackedProduct(layers, weight, bias)


def _multiplies_int8(weight: torch.Tensor) -> bool:
    """Whether row_products.py's kernels run where this weight lies, and in its dtype."""
    return (
        kernels_take(weight) and weight.dtype in (torch.bfloat16, torch.float16) and serves_row_kernels(weight.device)
    )


class Int8Product(Product):
    """Our kernel's, of rounded weights: 8 bits of each are read."""

    def __init__(self, layers: Sequence[nn.Linear], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(layers)
        numbers, scale = to_int8(weight)
        self._product = RowProduct(numbers, bias, Tiles.of(len(weight), weight.shape[1], most_splits=1), scale)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from draftwing.target.row_products import multiply  # needs Triton

        with on_device(x.device):
            return multiply(x.flatten(0, -2).contiguous(), self._product).view(*x.shape[:-1], -1)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        return torch.add(residual, self(x), out=residual if overwrite else None)


class JoinedProduct(Product):
    """The device's own, with the layers' weights one below the other."""

    def __init__(self, layers: Sequence[nn.Linear], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(layers)
        self.weight, self.bias = weight, bias
        self.bits_depend_on_threads = weight.device.type == "cpu"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        if self.bias is not None:
            residual, overwrite = residual + self.bias, True
        if overwrite:  # the product is added where the residual lies; else addmm copies it first
            return residual.addmm_(x, self.weight.T)
        return torch.addmm(residual, x, self.weight.T)


def _joined(layers: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layers' weights and biases, if any has one; a single layer's are shared, not copied."""
    if len(layers) == 1:
        bias = layers[0].bias
        return layers[0].weight.detach(), None if bias is None else bias.detach()
    weight = torch.cat([layer.weight.detach() for layer in layers])
    if all(layer.bias is None for layer in layers):
        return weight, None
    biases = [weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach() for layer in layers]
    return weight, torch.cat(biases)


class PackedLinear(nn.Module):
    """A linear layer's place in a model, once its weight is part of a product: `x @ W.T + b` in the weight's dtype."""

    def __init__(self, product: Product, index: int) -> None:
        super().__init__()
        self.product, self._index = product, index
        self.out_features = product.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product.output(x, self._index)


def bits_depend_on_threads(network: nn.Module) -> bool:
    """Whether some product rounds differently on another number of threads: torch's own do, those it laid out do not.

    What else has a weight of two or more dimensions multiplies too, but for embeddings: GPT-2's layers, experts.
    """

    def multiplies(module: nn.Module) -> bool:
        if isinstance(module, nn.Linear | nn.Embedding):
            return isinstance(module, nn.Linear)
        return any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))

    modules = list(network.modules())
    products = [module.product for module in modules if isinstance(module, PackedLinear)]
    is_fixed = products and not any(product.bits_depend_on_threads for product in products)
    return not is_fixed or any(map(multiplies, modules))


def places(network: nn.Module) -> set[tuple[torch.dtype, torch.device]]:
    """In which dtypes a network's numbers are, and where they lie, packed ones too."""
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()]
    products = [module.product for module in network.modules() if isinstance(module, PackedLinear)]
    of_products = {(product.dtype, product.device) for product in products}
    return of_products | {(tensor.dtype, tensor.device) for tensor in tensors}
