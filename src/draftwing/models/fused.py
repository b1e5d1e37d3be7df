"""A Llama-like target's pass in few operations: the stock modules' arithmetic without their overhead.

A small model's pass on a CPU is bound by the number of operations and by Python, not by arithmetic, and so is a large
one's on a GPU between its products. This is a second implementation of `TargetModel.forward_tree` for targets whose
products are packed (packed.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from draftwing.models.attention import grouped_attention, has_triton
from draftwing.models.layers import rotate
from draftwing.models.packed import PackedLinear, Product, pack_linears
from draftwing.models.target import ATTENTION, Role, TargetModel, TargetOutput, TreePass, attention_windows

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Norm:
    """An RMS norm's weight and epsilon."""

    weight: torch.Tensor
    eps: torch.Tensor


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, the mean in float32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).to(x.dtype).mul_(weight)


def rotate_to(dtype: torch.dtype, heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of query and key heads `[R, H, dim]`, cosines and sines `[R, 1, dim]`; in the cache's dtype."""
    return rotate(heads, cos, signed_sin).to(dtype)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """The MLP between its products: `silu(gate) * up`."""
    gated, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gated).mul_(up)


@dataclass(frozen=True)
class Elementwise:
    """What a pass does between its products: as written, or compiled into one kernel each."""

    normalise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = normalise
    rotate_to: Callable[[torch.dtype, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = rotate_to
    gate: Callable[[torch.Tensor], torch.Tensor] = gate

    @staticmethod
    @cache
    def compiled() -> "Elementwise":
        """By torch.compile: once for each dtype, and again when the number of rows first changes."""
        return Elementwise(torch.compile(normalise), torch.compile(rotate_to), torch.compile(gate))


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; `heads_norm` is Qwen3's, over each query and key head."""

    input_norm: Norm
    queries_keys_values: Product
    heads_norm: Norm | None
    attention_output: Product
    mlp_norm: Norm
    gate_up: Product
    down: Product


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether this model's pass is one that FusedTarget knows, with packed products."""
    config = model.config
    return (
        type(model).__name__ in ARCHITECTURES
        and type(model).__module__.startswith("transformers.models.")  # not a hub repository's class of that name
        and config.hidden_act == "silu"
        and config._attn_implementation == ATTENTION
        and attention_windows(config) == {"full_attention": None}
        and all(map(_is_packed, model.model.layers))
    )


def _is_packed(layer: Any) -> bool:
    """Whether a layer's products are packed, each with those that read the same tensor (adapters prevent it)."""
    attention, mlp = layer.self_attn, layer.mlp
    groups = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    return all(
        isinstance(linear, PackedLinear) and linear.product is group[0].product for group in groups for linear in group
    )


def pack_target(target: TargetModel, compiles: bool | None = None) -> TargetModel:
    """Pack a model's products in place and, where its pass is known, write that out too.

    `compiles`: see FusedTarget; by default on a GPU that Triton compiles for.
    """
    if target.is_split:
        return target
    pack_linears(target.model)
    if not can_fuse(target.model):
        return target
    if compiles is None:
        compiles = target.device.type == "cuda" and has_triton()
    return FusedTarget(target.model, target.role, compiles)


class FusedTarget(TargetModel):
    """A TargetModel whose pass is written out here. Made from a model for which `can_fuse` holds.

    With `compiles`, torch.compile makes one kernel of what lies between two products: worth it where kernels are
    replayed without Python in between (captured.py), not on a CPU (docs/LOG.md).
    """

    def __init__(self, model: PreTrainedModel, role: Role = "target", compiles: bool = False) -> None:
        super().__init__(model, role)
        self._steps = Elementwise.compiled() if compiles else Elementwise()
        decoder: Any = model.model
        self._rotary = decoder.rotary_emb
        self._num_heads, self._num_key_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self._decoder_layers = [_read_layer(layer, self._num_heads, self._num_key_heads) for layer in decoder.layers]
        self._norm = _read_norm(decoder.norm)

    def _run(self, tree: TreePass, feature_layers: tuple[int, ...], last_logits_only: bool) -> TargetOutput:
        batch_size, num_nodes = tree.tokens.shape
        embedded = self.embedding(tree.tokens)
        # From here on nodes of all rows lie one below the other, [R, ...].
        cos, sin = (table.flatten(0, 1).unsqueeze(1) for table in self._rotary(embedded, tree.positions))
        half = cos.shape[-1] // 2
        signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        num_rotated, steps = self._num_heads + self._num_key_heads, self._steps
        num_layers = len(self._decoder_layers)
        wanted = [index % (num_layers + 1) for index in feature_layers]
        x: torch.Tensor = embedded.flatten(0, 1)
        hidden = {0: x}
        for index, layer in enumerate(self._decoder_layers):
            heads = layer.queries_keys_values(self._normalise(x, layer.input_norm)).unflatten(-1, (-1, cos.shape[-1]))
            rotated = heads[:, :num_rotated]
            if layer.heads_norm is not None:
                rotated = self._normalise(rotated, layer.heads_norm)
            rotated = steps.rotate_to(tree.cache.dtype, rotated, cos, signed_sin)
            rotated, values = (
                part.unflatten(0, (batch_size, num_nodes)).transpose(1, 2) for part in (rotated, heads[:, num_rotated:])
            )
            queries, keys = rotated.split((self._num_heads, self._num_key_heads), dim=1)
            keys, values = tree.cache.write(index, keys, values, tree.slots, tree.num_read)
            attended = grouped_attention(queries, keys, values, tree.masks).transpose(1, 2)
            attended = attended.to(x.dtype, memory_format=torch.contiguous_format).reshape(len(x), -1)
            x = layer.attention_output.add_to(x, attended, overwrite=index not in wanted)
            gated = steps.gate(layer.gate_up(self._normalise(x, layer.mlp_norm)))
            x = layer.down.add_to(x, gated, overwrite=True)
            if index + 1 in wanted:
                hidden[index + 1] = x
        last = hidden[num_layers] = self._normalise(x, self._norm)
        last, *parts = (
            part.unflatten(0, (batch_size, num_nodes)) for part in (last, *(hidden[index] for index in wanted))
        )
        logits = self.output_head(last[:, -1:] if last_logits_only else last)
        return TargetOutput(logits, torch.cat(parts, dim=-1) if parts else None)

    def _normalise(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return self._steps.normalise(x, norm.weight, norm.eps)


def _read_layer(layer: Any, num_heads: int, num_key_heads: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    heads_norm = None
    if hasattr(attention, "q_norm"):
        weights = [attention.q_norm.weight.expand(num_heads, -1), attention.k_norm.weight.expand(num_key_heads, -1)]
        heads_norm = Norm(torch.cat(weights).detach(), _scalar_like(weights[0], attention.q_norm.variance_epsilon))
    return Layer(
        input_norm=_read_norm(layer.input_layernorm),
        queries_keys_values=attention.q_proj.product,
        heads_norm=heads_norm,
        attention_output=attention.o_proj.product,
        mlp_norm=_read_norm(layer.post_attention_layernorm),
        gate_up=mlp.gate_proj.product,
        down=mlp.down_proj.product,
    )


def _read_norm(norm: nn.Module) -> Norm:
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    return Norm(weight.detach(), _scalar_like(weight, norm.variance_epsilon))


def _scalar_like(weight: torch.Tensor, value: Any) -> torch.Tensor:
    """A float32 scalar on the weight's device."""
    return torch.tensor(value, dtype=torch.float32, device=weight.device)
