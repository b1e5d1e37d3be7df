"""Rotary positions of the draft networks: frequencies of the RoPE types, and the tables of cosines and sines."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

FIRST_POSITIONS = 2048
"""Rows that a table begins with; more are filled in when they are asked for."""
BLOCK = 1 << 15
"""Rows that are computed at once: in float64, so that many would take a multiple of the table's memory."""
COMMON_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor")
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
NEEDED_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The RoPE types that are known, each with the settings that it cannot do without."""


@dataclass(frozen=True)
class Rotation:
    """Cosines and signed sines `[B, 1, N, R]` of one forward pass's positions."""

    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate `x [B, H, N, dim]`."""
        return rotate(x, self.cos, self.sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R of the last dimension of `x [..., dim]`, R as wide as the cosines; the others stay.

    Pairs are (i, i + R / 2), the first half's sines carry the minus sign.
    """
    width = cos.shape[-1]
    turned, kept = (x, None) if width == x.shape[-1] else x.split((width, x.shape[-1] - width), dim=-1)
    half = width // 2
    swapped = torch.cat((turned[..., half:], turned[..., :half]), dim=-1)
    rotated = torch.addcmul(turned * cos, swapped, signed_sin)
    return rotated if kept is None else torch.cat((rotated, kept), dim=-1)


class Rotary(nn.Module):
    """Rotary position embedding: a table of cosines and sines that grows with the positions asked for."""

    def __init__(self, head_dim: int, settings: dict[str, Any], num_positions: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.settings = settings
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self._outgrown: list[torch.Tensor] = []  # captured cycles go on reading them
        self._fill(min(num_positions, FIRST_POSITIONS), torch.get_default_dtype(), None)

    def reserve(self, num_positions: int) -> None:
        """Make room for positions below `num_positions`.

        A table at least doubles, so that those outgrown take no more memory than it does.
        """
        num_rows = self.cos.shape[0]
        if num_positions > num_rows:
            self._outgrown += [self.cos, self.sin]
            self._fill(max(num_positions, 2 * num_rows), self.cos.dtype, self.cos.device)

    def forward(self, positions: torch.Tensor) -> Rotation:
        """The rotation of `positions [B, N]`."""
        return Rotation(self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1))

    def _fill(self, num_positions: int, dtype: torch.dtype, device: torch.device | None) -> None:
        frequencies, scale = rope_frequencies(self.head_dim, self.settings), rope_scale(self.settings)
        # Buffers, so that they follow the module's device and dtype; not parameters, so that files don't hold them.
        for name in ("cos", "sin"):
            table = torch.empty(num_positions, 2 * len(frequencies), dtype=dtype, device=device)
            self.register_buffer(name, table, persistent=False)
        for start in range(0, num_positions, BLOCK):
            rows = slice(start, min(start + BLOCK, num_positions))
            angles = torch.outer(torch.arange(rows.start, rows.stop, dtype=torch.float64), frequencies)
            cos, sin = angles.cos() * scale, angles.sin() * scale
            # First the dtype: not every device has float64.
            self.cos[rows] = cos.repeat(1, 2).to(dtype).to(device)
            self.sin[rows] = torch.cat((-sin, sin), dim=1).to(dtype).to(device)


def rope_problem(parameters: dict[str, Any]) -> str | None:
    """Why RoPE settings (under the names of `rope_parameters`) cannot be computed exactly, None if they can."""
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in NEEDED_KEYS:
        return f"rope_type: expected one of {', '.join(NEEDED_KEYS)}, got {rope_type!r}"
    for name in NEEDED_KEYS[rope_type]:
        if not isinstance(parameters.get(name), int | float):
            return f"rope_parameters.{name}: {rope_type} needs a number, got {parameters.get(name)!r}"
    share = parameters.get("partial_rotary_factor", 1.0)
    if not 0 < share <= 1:
        return f"partial_rotary_factor: expected more than 0 and at most 1, got {share!r}"
    return None


def rope_frequencies(head_dim: int, parameters: dict[str, Any]) -> torch.Tensor:
    """Rotation per position of each pair of dimensions that is rotated, `[R / 2]` (float64).

    Raises:
        ValueError: a type that is not known, or settings that it lacks.
    """
    if problem := rope_problem(parameters):
        raise ValueError(problem)
    theta: float = parameters.get("rope_theta", 10000.0)
    width = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    frequencies: torch.Tensor = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        return frequencies
    factor = float(parameters["factor"])
    if rope_type == "linear":
        return frequencies / factor
    stretched = _stretched_llama3 if rope_type == "llama3" else _stretched_yarn
    share = stretched(frequencies, theta, parameters)
    return frequencies * (1 - share + share / factor)


def _stretched_llama3(frequencies: torch.Tensor, theta: float, parameters: dict[str, Any]) -> torch.Tensor:
    """How much of each frequency is divided by `factor`: all of long wavelengths, nothing of short ones."""
    low, high, original_length = (
        float(parameters[name]) for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    return 1 - ((original_length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)


def _stretched_yarn(frequencies: torch.Tensor, theta: float, parameters: dict[str, Any]) -> torch.Tensor:
    """The same by YaRN (arXiv 2309.00071, section 3.2): a ramp over the pairs' numbers.

    It rises from the pair that turns `beta_fast` times within the original length to the one that turns `beta_slow`.
    """
    width = 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        length = float(parameters["original_max_position_embeddings"])
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(parameters.get("beta_fast") or 32)
    last = pair_that_turns(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pairs = torch.arange(len(frequencies), dtype=torch.float64)
    return ((pairs - first) / (last - first or 0.001)).clamp(0, 1)


def rope_scale(parameters: dict[str, Any]) -> float:
    """What cosines and sines are multiplied by: 1 but for YaRN, which sharpens attention."""
    if parameters.get("rope_type") != "yarn":
        return 1.0
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor = float(parameters["factor"])

    def sharpening(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, weight_of_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return sharpening(weight) / sharpening(weight_of_all) if weight and weight_of_all else sharpening(1.0)
