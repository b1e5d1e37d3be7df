"""An EAGLE network's layers in few operations: the arithmetic of layers.py and network.py (see target/fused.py)."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from draftwing.drafts.eagle.network import Eagle3Layer
from draftwing.layers import Attend, DecoderLayer, RMSNorm
from draftwing.rotary import Rotation
from draftwing.target.fused import Elementwise, Nodes, elementwise, is_packed, read_layer, read_norm
from draftwing.target.packed import pack_linears


def pack_head(head: nn.Module, compiles: bool | None = None) -> None:
    """Pack a draft head's products, and fuse its layers whose products are all packed, with the output norm; in place.

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


def _is_known(layer: Eagle3Layer | DecoderLayer) -> bool:
    return is_packed(layer) and layer.mlp.activation is functional.silu


class FusedNorm(nn.Module):
    """In the place of an RMSNorm of layers.py."""

    def __init__(self, module: RMSNorm, steps: Elementwise) -> None:
        super().__init__()
        self._norm, self._steps = read_norm(module), steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)  # as elsewhere, so that one compiled kernel serves all
        return self._steps.normalise(rows, self._norm.weight, self._norm.eps).view(x.shape)


class FusedDecoderLayer(nn.Module):
    """In the place of a DecoderLayer of layers.py."""

    def __init__(self, module: DecoderLayer, steps: Elementwise) -> None:
        super().__init__()
        self._layer, self._steps = read_layer(module, module.self_attn.layer), steps

    def forward(self, x: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        nodes = _nodes(x, rotation, attend, self._steps)
        return nodes.spread(self._layer.run(x.flatten(0, 1), nodes))


class FusedEagle3Layer(nn.Module):
    """In the place of an Eagle3Layer."""

    def __init__(self, module: Eagle3Layer, steps: Elementwise) -> None:
        super().__init__()
        hidden_norm = read_norm(module.hidden_norm)
        self._norm_before_residual = hidden_norm if module.norm_before_residual else None
        input_norm = None if module.norm_before_residual else hidden_norm
        layer = read_layer(module, module.self_attn.layer)
        self._layer = replace(layer, embedding_norm=layer.input_norm, input_norm=input_norm)
        self._steps = steps

    def forward(
        self, embedding: torch.Tensor, hidden: torch.Tensor, rotation: Rotation, attend: Attend
    ) -> torch.Tensor:
        nodes = _nodes(hidden, rotation, attend, self._steps)
        embedding, x = embedding.flatten(0, 1), hidden.flatten(0, 1)
        if self._norm_before_residual is not None:
            x = nodes.normalise(x, self._norm_before_residual)
        return nodes.spread(self._layer.run(x, nodes, embedding=embedding))


def _nodes(hidden: torch.Tensor, rotation: Rotation, attend: Attend, steps: Elementwise) -> Nodes:
    """The nodes of a draft network's pass over `hidden [B, N, D]`."""
    batch_size, num_nodes, _ = hidden.shape
    cos, sin = (table.transpose(1, 2).flatten(0, 1) for table in (rotation.cos, rotation.sin))
    return Nodes((batch_size, num_nodes), cos, sin, hidden.dtype, attend, steps)
