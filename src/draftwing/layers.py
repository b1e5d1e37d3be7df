"""The Llama building blocks of the draft networks. Parameter names equal those of the published checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from draftwing.rotary import Rotation

Activation = Callable[[torch.Tensor], torch.Tensor]
_TANH_GELU = partial(functional.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
"""The MLP's functions, by Hugging Face's names of `hidden_act`."""


@dataclass(frozen=True)
class DraftConfig:
    """Sizes and options of a draft network (Hugging Face's names where it has one)."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    num_hidden_layers: int = 1
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    trained_length: int | None = None
    """Tokens of the longest rows that it was trained on, where its file tells."""
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    hidden_act: str = "silu"
    sliding_window: int | None = None
    """Tokens that its attention reads, where that is part of its architecture."""
    attention_bias: bool = False
    """Of queries, keys and values."""
    output_bias: bool = False
    """Of the attention's output."""
    mlp_bias: bool = False
    fc_bias: bool = False
    qk_norm: bool = False
    has_fc: bool = True
    """EAGLE-3: without it the features are the state."""
    own_lm_head: bool = True
    """EAGLE-3: without it the target's output head is used, as EAGLE-1 does."""
    aux_layers: tuple[int, ...] = ()
    """EAGLE-3's feature layers, as numbers of hidden states (target/hidden_states.py)."""
    fc_norm: bool = False
    """EAGLE-3.1: one norm per feature layer before `fc`."""
    norm_output: bool = False
    """EAGLE-3.1: the normed output is fed back instead of the raw one."""
    norm_before_residual: bool = False
    """speculators: the residual branch starts from the normed features."""
    norm_before_fc: bool = False
    """speculators: one norm over the concatenated features before `fc`."""

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The hidden states that are read: `aux_layers`, or -1, the final norm's output (EAGLE-1/2)."""
        return self.aux_layers or (-1,)

    @property
    def window(self) -> int:
        """The last tokens that it reads by default: past the lengths that it was trained on a head gets worse."""
        longest = self.trained_length or self.max_position_embeddings
        return min(longest, self.sliding_window or longest)


class Attend(Protocol):
    """How a layer's queries meet keys: stores the new ones, returns the attention output.

    `queries [B, Hq, N, dim]`, `keys, values [B, Hk, N, dim]` -> `[B, N, Hq, dim]`.
    """

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor: ...


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The fused kernel wants one dtype; under autocast the weight has another.
        normed: torch.Tensor = functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return normed


class Attention(nn.Module):
    """Self-attention whose input may be wider than the hidden size (EAGLE-3 reads embedding and features)."""

    def __init__(self, config: DraftConfig, input_size: int, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(input_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = rotation.apply(queries.transpose(1, 2))
        keys = rotation.apply(keys.transpose(1, 2))
        attended = attend(self.layer, queries, keys, values.transpose(1, 2))
        output: torch.Tensor = self.o_proj(attended.flatten(2))
        return output


class MLP(nn.Module):
    """Raises: ValueError: `hidden_act` names no known function."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {config.hidden_act!r}")
        self.activation = ACTIVATIONS[config.hidden_act]
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*sizes[::-1], bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return output


class DecoderLayer(nn.Module):
    """A Llama decoder layer; EAGLE-1's only one has no input norm."""

    def __init__(self, config: DraftConfig, layer: int, input_norm: bool = True) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if input_norm else nn.Identity()
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, rotation: Rotation, attend: Attend) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, attend)
        output: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class DraftVocab:
    """Maps draft ids to target ids: `target_ids [Vd]` (int64, absolute ids), or the identity when it is None.

    The files' offsets (`d2t`) and mask (`t2d`) are translated in drafts/eagle/formats.py and nowhere else.
    """

    def __init__(self, target_ids: torch.Tensor | None, target_vocab_size: int) -> None:
        self.target_ids = None if target_ids is None else target_ids.contiguous()  # kernels read it
        self.target_vocab_size = target_vocab_size

    def __len__(self) -> int:
        return self.target_vocab_size if self.target_ids is None else self.target_ids.numel()

    def to_target(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Target ids of draft ids, any shape."""
        return draft_ids if self.target_ids is None else self.target_ids[draft_ids]

    def to(self, device: torch.device) -> "DraftVocab":
        """The same map on another device."""
        moved = None if self.target_ids is None else self.target_ids.to(device)
        return DraftVocab(moved, self.target_vocab_size)
