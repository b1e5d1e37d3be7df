"""A Llama-like target's pass in few operations: the stock modules' arithmetic without their overhead.

On a CPU a small model's pass is bound by the number of operations and by Python, not by arithmetic. This is a second
implementation of `TargetModel.forward_tree` for targets whose products are packed (packed.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from draftwing.models.layers import grouped_attention
from draftwing.models.packed import PackedLinear, PackedProduct, pack_linears
from draftwing.models.target import ATTENTION, Role, TargetModel, TargetOutput, TreePass, attention_windows

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class Norm:
    """An RMS norm: `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, the mean in float32."""

    weight: torch.Tensor
    eps: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).to(x.dtype).mul_(self.weight)


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; `heads_norm` is Qwen3's, over each query and key head."""

    input_norm: Norm
    queries_keys_values: PackedProduct
    heads_norm: Norm | None
    attention_output: PackedProduct
    mlp_norm: Norm
    gate_up: PackedProduct
    down: PackedProduct


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


def pack_target(target: TargetModel) -> TargetModel:
    """Pack a model's products in place and, where its pass is known, write that out too."""
    pack_linears(target.model)
    return FusedTarget(target.model, target.role) if can_fuse(target.model) else target


class FusedTarget(TargetModel):
    """A TargetModel whose pass is written out here. Made from a model for which `can_fuse` holds."""

    def __init__(self, model: PreTrainedModel, role: Role = "target") -> None:
        super().__init__(model, role)
        decoder: Any = model.model
        self._rotary = decoder.rotary_emb
        self._num_heads, self._num_key_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self._decoder_layers = [_read_layer(layer, self._num_heads, self._num_key_heads) for layer in decoder.layers]
        self._norm = _read_norm(decoder.norm)

    def _run(self, tree: TreePass, feature_layers: tuple[int, ...], last_logits_only: bool) -> TargetOutput:
        x: torch.Tensor = self.embedding(tree.tokens)
        cos, sin = (table.unsqueeze(2) for table in self._rotary(x, tree.positions))  # [B, N, 1, dim]
        half = cos.shape[-1] // 2
        signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        num_rotated = self._num_heads + self._num_key_heads
        hidden = [x]
        for index, layer in enumerate(self._decoder_layers):
            heads = layer.queries_keys_values(layer.input_norm(x)).unflatten(-1, (-1, cos.shape[-1]))
            rotated = heads[..., :num_rotated, :]
            if layer.heads_norm is not None:
                rotated = layer.heads_norm(rotated)
            swapped = torch.cat((rotated[..., half:], rotated[..., :half]), dim=-1)
            rotated = torch.addcmul(rotated * cos, swapped, signed_sin).transpose(1, 2).to(tree.cache.dtype)
            queries, keys = rotated.split((self._num_heads, self._num_key_heads), dim=1)
            values = heads[..., num_rotated:, :].transpose(1, 2)
            keys, values = tree.cache.write(index, keys, values, tree.slots, tree.num_read)
            attended = grouped_attention(queries, keys, values, tree.masks).transpose(1, 2)
            x = layer.attention_output.add_to(x, attended.to(x.dtype, memory_format=torch.contiguous_format).flatten(2))
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, dim=-1)
            x = layer.down.add_to(x, functional.silu(gate).mul_(up))
            hidden.append(x)
        hidden[-1] = self._norm(x)
        logits = self.output_head(hidden[-1][:, -1:] if last_logits_only else hidden[-1])
        features = torch.cat([hidden[index] for index in feature_layers], dim=-1) if feature_layers else None
        return TargetOutput(logits, features)


def _read_layer(layer: Any, num_heads: int, num_key_heads: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    heads_norm = None
    if hasattr(attention, "q_norm"):
        weights = [attention.q_norm.weight.expand(num_heads, -1), attention.k_norm.weight.expand(num_key_heads, -1)]
        heads_norm = Norm(torch.cat(weights).detach(), torch.tensor(attention.q_norm.variance_epsilon))
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
    return Norm(weight.detach(), torch.tensor(norm.variance_epsilon))
