"""Decoder layers in few operations: the arithmetic of the stock modules without their overhead.

A small model's pass on a CPU is bound by the number of operations and by Python, not by arithmetic, and so is a large
one's on a GPU between its products. This is a second implementation of the layers whose products are packed
(packed.py), for Llama-like targets: `FusedTarget`. drafts/eagle/fused_layers.py does the same for EAGLE networks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from draftwing import native
from draftwing.layers import Attend
from draftwing.rotary import rotate
from draftwing.target import native_layers
from draftwing.target.attention import CacheAttention, has_triton
from draftwing.target.hidden_states import NORMED
from draftwing.target.interface import ATTENTION, Role
from draftwing.target.model import TargetModel, TargetOutput, TreePass, attention_windows
from draftwing.target.native_layers import NativeLayers, NativePass, NormNumbers
from draftwing.target.packed import NativeProduct, PackedLinear, Product, multiplies_in_c, pack_linears

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MOST_COMPILED = 64
"""Versions of a step between products that may be compiled."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm's weight and epsilon."""

    weight: torch.Tensor
    eps: torch.Tensor

    @property
    def numbers(self) -> NormNumbers:
        """Weight and epsilon as layers.c takes them."""
        return self.weight.contiguous(), float(self.eps)


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, the mean in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
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
    """What a pass does between its products: as written, compiled into one kernel each, or in C.

    Compiling is worth it where kernels are replayed without Python in between (captured.py), not on a CPU
    (docs/LOG.md).
    """

    normalise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = normalise
    rotate_to: Callable[[torch.dtype, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = rotate_to
    gate: Callable[[torch.Tensor], torch.Tensor] = gate

    @staticmethod
    @cache
    def compiled() -> "Elementwise":
        """By torch.compile: once for each dtype and width, for a single row, and when the number of rows first changes.

        Some models in one process need more than torch's limit of 8, past which it would leave the steps as written.
        """
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_COMPILED)
        return Elementwise(torch.compile(normalise), torch.compile(rotate_to), torch.compile(gate))


AS_WRITTEN = Elementwise()
NATIVE = Elementwise(native_layers.normalise)


@dataclass(frozen=True)
class Nodes:
    """What a pass knows of its B x N nodes, which lie one below the other: R = B N rows.

    Attributes:
        shape: B and N.
        cos, signed_sin: `[R, 1, dim]` of their positions.
        dtype: of rotated queries and keys.
        attend: stores keys and values, and attends.
        steps: what is done between products.
    """

    shape: tuple[int, int]
    cos: torch.Tensor
    signed_sin: torch.Tensor
    dtype: torch.dtype
    attend: Attend
    steps: Elementwise

    @cached_property
    def native(self) -> NativePass | None:
        """The same for layers.c, if it takes these rotations and this cache."""
        return NativePass.of(self.cos, self.signed_sin, self.attend)

    def normalise(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """`x [R, D]`, or each head of `x [R, H, dim]`, by an RMS norm."""
        return self.steps.normalise(x, norm.weight, norm.eps)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """`[R, ...]` as `[B, N, ...]`."""
        return x.view(*self.shape, *x.shape[1:])


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; `heads_norm` is over each query and key head (Qwen3).

    One with an `embedding_norm` reads `[norm(embedding); norm(state)]`, as an EAGLE-3 draft's first does. Without an
    `input_norm` it reads the state as it is.
    """

    index: int
    num_heads: int
    num_key_heads: int
    input_norm: Norm | None
    queries_keys_values: Product
    heads_norm: Norm | None
    attention_output: Product
    mlp_norm: Norm
    gate_up: Product
    down: Product
    embedding_norm: Norm | None = None

    @cached_property
    def native(self) -> NativeLayers | None:
        """The same for layers.c, if that has its products and norms."""
        products = self.queries_keys_values, self.attention_output, self.gate_up, self.down
        norms = self.embedding_norm, self.input_norm, self.heads_norm, self.mlp_norm
        panels = [product.panels for product in products if isinstance(product, NativeProduct)]
        if len(panels) < len(products) or not all(native.serves(norm.weight) for norm in norms if norm is not None):
            return None
        numbers = [None if norm is None else norm.numbers for norm in norms]
        return NativeLayers.of(self.index, panels, numbers, self.num_heads, self.num_key_heads)

    def run(
        self, x: torch.Tensor, nodes: Nodes, overwrite: bool = False, embedding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The states `[R, D]` behind the layer from those before, which it may `overwrite`."""
        if self.native is not None and nodes.native is not None:
            return self.native.run(nodes.native, x, embedding, overwrite)
        inputs = x if self.input_norm is None else nodes.normalise(x, self.input_norm)
        if self.embedding_norm is not None:
            assert embedding is not None
            inputs = torch.cat((nodes.normalise(embedding, self.embedding_norm), inputs), dim=-1)
        num_rotated = self.num_heads + self.num_key_heads
        heads = self.queries_keys_values(inputs).unflatten(-1, (num_rotated + self.num_key_heads, -1))
        rotated = heads[:, :num_rotated]
        if self.heads_norm is not None:
            rotated = nodes.normalise(rotated, self.heads_norm)
        rotated = nodes.steps.rotate_to(nodes.dtype, rotated, nodes.cos, nodes.signed_sin)
        rotated, values = (nodes.spread(part).transpose(1, 2) for part in (rotated, heads[:, num_rotated:]))
        queries, keys = rotated.split((self.num_heads, self.num_key_heads), dim=1)
        attended = nodes.attend(self.index, queries, keys, values).to(inputs.dtype).reshape(len(inputs), -1)
        x = self.attention_output.add_to(x, attended, overwrite=overwrite)
        gated = nodes.steps.gate(self.gate_up(nodes.normalise(x, self.mlp_norm)))
        return self.down.add_to(x, gated, overwrite=True)


def can_fuse(model: PreTrainedModel) -> bool:
    """Whether this model's pass is one that FusedTarget knows, with packed products."""
    config = model.config
    return (
        type(model).__name__ in ARCHITECTURES
        and type(model).__module__.startswith("transformers.models.")  # not a hub repository's class of that name
        and config.hidden_act == "silu"
        and config._attn_implementation == ATTENTION
        and attention_windows(config) == {"full_attention": None}
        and all(map(is_packed, model.model.layers))
    )


def is_packed(layer: Any) -> bool:
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

    `compiles`: what lies between products, too; by default on a GPU that Triton compiles for.
    """
    if target.is_split:
        return target
    pack_linears(target.model)
    if not can_fuse(target.model):
        return target
    fused = FusedTarget(target.model, target.role, elementwise(target.device, compiles, target.dtype))
    if target.role == "draft" or target.device.type != "cuda":
        return fused
    from draftwing.target.row_pass import row_problem, row_target  # which are made of a FusedTarget

    return fused if row_problem(fused) else row_target(fused)


def elementwise(device: torch.device, compiles: bool | None, dtype: torch.dtype) -> Elementwise:
    """The steps for weights of a dtype on a device; `compiles` as in `pack_target`."""
    if compiles is None:
        compiles = device.type == "cuda" and has_triton()
    if compiles:
        return Elementwise.compiled()
    return NATIVE if multiplies_in_c(dtype, device) else AS_WRITTEN


class FusedTarget(TargetModel):
    """A TargetModel whose pass is written out here. Made from a model for which `can_fuse` holds."""

    row_failure: str | None = None
    """Why RowTarget's pass, which was tried for it, is not its own."""

    def __init__(self, model: PreTrainedModel, role: Role = "target", steps: Elementwise = AS_WRITTEN) -> None:
        super().__init__(model, role)
        self._steps = steps
        decoder: Any = model.model
        self._rotary = decoder.rotary_emb
        self._decoder_layers = [read_layer(layer, index) for index, layer in enumerate(decoder.layers)]
        self._norm = read_norm(decoder.norm)

    @property
    def attention_dtype(self) -> torch.dtype:
        """Of layers.c's it is float32: their sums over keys have one order."""
        return torch.float32 if self._native is not None else super().attention_dtype

    @cached_property
    def _native(self) -> NativeLayers | None:
        """All layers for layers.c, if that has each."""
        parts = [layer.native for layer in self._decoder_layers if layer.native is not None]
        return NativeLayers.joined(parts) if len(parts) == len(self._decoder_layers) else None

    def _masks(
        self, visible: torch.Tensor, positions: torch.Tensor, slot_positions: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        if self._native is not None:
            return visible.unsqueeze(1)
        return super()._masks(visible, positions, slot_positions, dtype)

    @property
    def head_dims(self) -> tuple[int, int]:
        """Numbers of a key, and how many of them are rotated."""
        one = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        return self._layers[0].key_dim, self._rotary(one.to(self.dtype), one)[0].shape[-1]

    def _check_tree(self) -> None:
        """Nothing: the model was checked as it came."""

    def _run(self, tree: TreePass, feature_layers: tuple[int, ...], last_logits_only: bool) -> TargetOutput:
        attend = CacheAttention(tree.cache, tree.slots, tree.masks)
        embedded = self.embedding(tree.tokens)
        cos, sin = (table.flatten(0, 1).unsqueeze(1) for table in self._rotary(embedded, tree.positions))
        half = cos.shape[-1] // 2
        signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        batch_size, num_nodes = tree.tokens.shape
        nodes = Nodes((batch_size, num_nodes), cos, signed_sin, tree.cache.dtype, attend, self._steps)
        x: torch.Tensor = embedded.flatten(0, 1)
        hidden = {0: x}
        num_layers = len(self._decoder_layers)  # the configuration may name more, which the stock pass leaves out, too
        for first, last in pairwise(sorted({0, *feature_layers, num_layers} & {*range(num_layers + 1)})):
            x = hidden[last] = self._run_between(x, first, last, nodes, overwrite=first not in feature_layers)
        normed = hidden[NORMED] = nodes.normalise(x, self._norm)
        normed, *parts = (nodes.spread(part) for part in (normed, *(hidden[index] for index in feature_layers)))
        logits = self.output_head(normed[:, -1:] if last_logits_only else normed)
        return TargetOutput(logits, torch.cat(parts, dim=-1) if parts else None)

    def _run_between(self, x: torch.Tensor, first: int, last: int, nodes: Nodes, overwrite: bool) -> torch.Tensor:
        """The states `[R, D]` behind layers `first .. last - 1`, from those before, which it may `overwrite`."""
        if self._native is not None and nodes.native is not None:
            return self._native.run(nodes.native, x, overwrite=overwrite, first=first, last=last)
        for layer in self._decoder_layers[first:last]:
            x = layer.run(x, nodes, overwrite)
            overwrite = True
        return x


def read_layer(layer: Any, index: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    num_heads, num_key_heads = (
        projection.out_features // attention.head_dim for projection in (attention.q_proj, attention.k_proj)
    )
    heads_norm = None
    if hasattr(attention, "q_norm"):
        weights = [attention.q_norm.weight.expand(num_heads, -1), attention.k_norm.weight.expand(num_key_heads, -1)]
        heads_norm = Norm(torch.cat(weights).detach(), _scalar_like(weights[0], epsilon(attention.q_norm)))
    return Layer(
        index,
        num_heads,
        num_key_heads,
        input_norm=None if isinstance(layer.input_layernorm, nn.Identity) else read_norm(layer.input_layernorm),
        queries_keys_values=attention.q_proj.product,
        heads_norm=heads_norm,
        attention_output=attention.o_proj.product,
        mlp_norm=read_norm(layer.post_attention_layernorm),
        gate_up=mlp.gate_proj.product,
        down=mlp.down_proj.product,
    )


def read_norm(norm: nn.Module) -> Norm:
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    return Norm(weight.detach(), _scalar_like(weight, epsilon(norm)))


def epsilon(norm: Any) -> float:
    """An RMS norm's epsilon: transformers' name or ours."""
    epsilon: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return epsilon


def _scalar_like(weight: torch.Tensor, value: Any) -> torch.Tensor:
    """A scalar on the weight's device, in float32 or wider."""
    return torch.tensor(value, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
