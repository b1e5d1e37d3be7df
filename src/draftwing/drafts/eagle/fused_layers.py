"""An EAGLE network's layers in few operations: the arithmetic of layers.py and network.py (see target/fused.py)."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from draftwing import native
from draftwing.drafts.eagle.network import DraftNetwork, Eagle3Layer, Eagle3Model, EagleModel
from draftwing.layers import Attend, DecoderLayer, RMSNorm
from draftwing.rotary import Rotation
from draftwing.target.fused import Elementwise, Nodes, elementwise, is_packed, read_layer, read_norm
from draftwing.target.native_layers import NativeDraft, NativeLayers, Panels
from draftwing.target.packed import NativeProduct, PackedLinear, pack_linears
from draftwing.target.rounded import does_more


def pack_head(head: DraftNetwork, compiles: bool | None = None) -> None:
    """Pack a draft head's products, and fuse its layers whose products are all packed, with the output norm; in place.

    On a CPU the whole of it becomes one call in C, if that has each part (`DraftNetwork.native`).

    `compiles`: as for targets.
    """
    weight = next(head.parameters())
    steps = elementwise(weight.device, compiles, weight.dtype)
    pack_linears(head)
    for name, module in list(head.named_modules()):
        if isinstance(module, Eagle3Layer) and _is_known(module):
            head.set_submodule(name, FusedEagle3Layer(module, steps))
        elif isinstance(module, DecoderLayer) and _is_known(module):
            head.set_submodule(name, FusedDecoderLayer(module, steps))
        elif isinstance(module, RMSNorm) and name == "norm":
            head.set_submodule(name, FusedNorm(module, steps))
    head.native = _native(head)


def _native(head: DraftNetwork) -> NativeDraft | None:
    """The whole network for layers.c, if that has each of its parts."""
    fused = [module for module in head.modules() if isinstance(module, FusedDecoderLayer | FusedEagle3Layer)]
    layers = [module.layer.native for module in fused if module.layer.native is not None]
    fc = _panels(head.fc) if isinstance(head, EagleModel) else None
    is_whole = len(layers) == head.config.num_hidden_layers and (fc is None) != isinstance(head, EagleModel)
    embedding = head.embedding
    if not is_whole or not isinstance(embedding, nn.Embedding) or type(embedding) is not nn.Embedding:
        return None
    if does_more(embedding) or not native.serves(embedding.weight):  # than to read rows that layers.c can read
        return None
    first, read_out = fused[0], None
    hidden_norm = first.residual_norm if isinstance(first, FusedEagle3Layer) else None
    if isinstance(head, Eagle3Model) and isinstance(head.norm, FusedNorm) and (panels := _panels(head.output_head)):
        read_out = head.norm.norm.numbers, panels
    numbers = None if hidden_norm is None else hidden_norm.numbers
    weight = embedding.weight.detach().contiguous()
    return NativeDraft(weight, fc, numbers, NativeLayers.joined(layers), read_out)


def _panels(linear: object) -> Panels | None:
    """Of a layer that has a product for itself."""
    product = linear.product if isinstance(linear, PackedLinear) else None
    return product.panels if isinstance(product, NativeProduct) and len(product.sizes) == 1 else None


def _is_known(layer: Eagle3Layer | DecoderLayer) -> bool:
    return is_packed(layer) and layer.mlp.activation is functional.silu


class FusedNorm(nn.Module):
    """In the place of an RMSNorm of layers.py."""

    def __init__(self, module: RMSNorm, steps: Elementwise) -> None:
        super().__init__()
        self.norm, self._steps = read_norm(module), steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)  # as elsewhere, so that one compiled kernel serves all
        return self._steps.normalise(rows, self.norm.weight, self.norm.eps).view(x.shape)


class FusedDecoderLayer(nn.Module):
    """In the place of a DecoderLayer of layers.py."""

    def __init__(self, module: DecoderLayer, steps: Elementwise) -> None:
        super().__init__()
        self.layer, self._steps = read_layer(module, module.self_attn.layer), steps

    def forward(self, x: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        nodes = _nodes(x, rotation, attend, self._steps)
        return nodes.spread(self.layer.run(x.flatten(0, 1), nodes))


class FusedEagle3Layer(nn.Module):
    """In the place of an Eagle3Layer."""

    def __init__(self, module: Eagle3Layer, steps: Elementwise) -> None:
        super().__init__()
        hidden_norm = read_norm(module.hidden_norm)
        self.residual_norm = hidden_norm if module.norm_before_residual else None
        input_norm = None if module.norm_before_residual else hidden_norm
        layer = read_layer(module, module.self_attn.layer)
        self.layer = replace(layer, embedding_norm=layer.input_norm, input_norm=input_norm)
        self._steps = steps

    def forward(
        self, embedding: torch.Tensor, hidden: torch.Tensor, rotation: Rotation, attend: Attend
    ) -> torch.Tensor:
        nodes = _nodes(hidden, rotation, attend, self._steps)
        embedding, x = embedding.flatten(0, 1), hidden.flatten(0, 1)
        if self.residual_norm is not None:
            x = nodes.normalise(x, self.residual_norm)
        return nodes.spread(self.layer.run(x, nodes, embedding=embedding))


def _nodes(hidden: torch.Tensor, rotation: Rotation, attend: Attend, steps: Elementwise) -> Nodes:
    """The nodes of a draft network's pass over `hidden [B, N, D]`."""
    batch_size, num_nodes, _ = hidden.shape
    cos, sin = (table.transpose(1, 2).flatten(0, 1) for table in (rotation.cos, rotation.sin))
    return Nodes((batch_size, num_nodes), cos, sin, hidden.dtype, attend, steps)
