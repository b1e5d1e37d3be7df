"""The Llama building blocks of the draft networks. Parameter names equal those of the published checkpoints."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional


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
    attention_bias: bool = False
    fc_bias: bool = False
    qk_norm: bool = False
    aux_layers: tuple[int, ...] = ()
    """EAGLE-3's feature layers, as hidden_states indices (0 = embeddings)."""
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
        """The hidden_states indices that are read: `aux_layers`, or -1, the final norm's output (EAGLE-1/2)."""
        return self.aux_layers or (-1,)

    @property
    def window(self) -> int:
        """The last tokens that it reads by default: past the lengths that it was trained on a head gets worse."""
        return self.trained_length or self.max_position_embeddings


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


@dataclass(frozen=True)
class Rotation:
    """Cosines and signed sines `[B, 1, N, dim]` of one forward pass's positions."""

    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate `x [B, H, N, dim]`."""
        return rotate(x, self.cos, self.sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x [..., dim]`; pairs are (i, i + dim / 2), the first half's sines carry the minus sign."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return torch.addcmul(x * cos, swapped, signed_sin)


class Rotary(nn.Module):
    """Rotary position embedding: a table of cosines and sines that grows with the positions asked for."""

    def __init__(self, head_dim: int, settings: dict[str, Any], num_positions: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.settings = settings
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self._outgrown: list[torch.Tensor] = []  # captured cycles go on reading them
        self._fill(num_positions, torch.get_default_dtype(), None)

    def reserve(self, num_positions: int) -> None:
        """Make room for positions below `num_positions` (published configs say 2048 and are used far beyond)."""
        if num_positions > self.cos.shape[0]:
            self._outgrown += [self.cos, self.sin]
            self._fill(num_positions, self.cos.dtype, self.cos.device)

    def forward(self, positions: torch.Tensor) -> Rotation:
        """The rotation of `positions [B, N]`."""
        return Rotation(self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1))

    def _fill(self, num_positions: int, dtype: torch.dtype, device: torch.device | None) -> None:
        frequencies = rope_frequencies(self.head_dim, self.settings)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
        cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=1)
        # Buffers, so that they follow the module's device and dtype; not parameters, so that files don't hold them.
        # First the dtype: not every device has float64.
        self.register_buffer("cos", cos.to(dtype).to(device), persistent=False)
        self.register_buffer("sin", sin.to(dtype).to(device), persistent=False)


def rope_frequencies(head_dim: int, parameters: dict[str, Any]) -> torch.Tensor:
    """Rotation per position of each pair of dimensions, `[head_dim / 2]` (float64), for the common RoPE types.

    Raises:
        ValueError: the type is none of default, linear, llama3.
    """
    theta: float = parameters.get("rope_theta", 10000.0)
    frequencies: torch.Tensor = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type == "default":
        return frequencies
    if rope_type == "linear":
        return frequencies / float(parameters["factor"])
    if rope_type == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
        low, high, factor, original_length = (
            float(parameters[name])
            for name in ("low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings")
        )
        kept = ((original_length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor)
    raise ValueError(f"rope_type: expected default, linear or llama3, got {rope_type!r}")


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
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
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
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
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
