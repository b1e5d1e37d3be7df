"""Gumbel noise for sampling: a function of (seed, position, token id) alone, so no draft can change it."""

from dataclasses import dataclass

import numpy as np
import torch

from draftwing import native
from draftwing.by_seat import BySeat
from draftwing.engine import native_cycle

MASK32 = 0xFFFFFFFF
NOISE_WINDOW = 32
"""Positions whose noise is computed at once, or a cycle's if those are more; each is computed once."""


@dataclass(frozen=True)
class KeptNoise:
    """Noise where it lies, for kernels: that of position p in row p % P of `kept [B, P, V]`, at `positions [B, N]`.

    Rows of a `temperature [B]` of 0 have none.
    """

    kept: torch.Tensor
    positions: torch.Tensor
    temperature: torch.Tensor


class Noise(BySeat):
    """Gumbel noise rows by seat, kept for some positions around each row's end."""

    by_seat = ("_seeds", "_kept", "_filled_to")

    def __init__(self, num_seats: int, vocab_size: int, device: torch.device, most_positions: int = 1) -> None:
        self._tokens = torch.arange(vocab_size, device=device)
        self._seeds = torch.zeros(num_seats, dtype=torch.int64, device=device)
        self._num_ahead = max(NOISE_WINDOW, most_positions)
        self._kept: torch.Tensor | None = None  # made when a row draws
        self._filled_to = np.zeros(num_seats, dtype=np.int64)

    def admit(self, seat: int, seed: int) -> None:
        """Give a seat the noise of this seed from now on."""
        if self._kept is None:
            shape = len(self._seeds), 2 * self._num_ahead, len(self._tokens)
            self._kept = torch.empty(shape, dtype=torch.float32, device=self._tokens.device)
        self._seeds[seat] = seed
        self._filled_to[seat] = 0

    def copy_seat(self, source: int, goal: int, num_tokens: int) -> None:
        if self._filled_to[source]:
            super().copy_seat(source, goal, num_tokens)
        else:
            self._seeds[goal], self._filled_to[goal] = self._seeds[source], 0

    def clear(self, seat: int, num_tokens: int) -> None:
        self._filled_to[seat] = 0

    def reserve(self, seat: int, start: int, num_positions: int) -> None:
        """Make positions `start .. start + num_positions - 1` of a seat readable. Starts never fall."""
        assert num_positions <= self._num_ahead
        filled_to = int(self._filled_to[seat])
        if start + num_positions > filled_to:
            positions = torch.arange(max(start, filled_to), start + self._num_ahead, device=self._tokens.device)
            rows = gumbel(self._seeds[seat], positions, self._tokens)
            self.kept[seat, positions % self.kept.shape[1]] = rows
            self._filled_to[seat] = start + self._num_ahead

    @property
    def kept(self) -> torch.Tensor:
        """`[B, P, V]`: position p's in row p % P."""
        assert self._kept is not None, "no row draws"
        return self._kept

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Noise rows `[B, P, V]` of `positions [B, P]`, which must have been reserved."""
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        kept = self.kept
        return kept[rows, positions % kept.shape[1]]


def gumbel(seed: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise `[P, V]` (float32) for one seed, from a 32-bit counter hash; no state.

    `tokens [V]` are 0 .. V - 1, in this order.

    Exponentials come from 32 bits: uniforms of 24 bits saturate at large vocabularies and bias the tail.
    """
    key = _hash32(_hash32(seed & MASK32) ^ (seed >> 32))
    # Two keys a row: with one, the rows of two positions could be permutations of each other.
    first = _hash32(_hash32(positions ^ key) + positions)[:, None]
    second = _hash32(_hash32(positions + key) ^ 0x9E3779B9)[:, None]
    # float32 keeps all bits of small uniforms, which make the large noise; those that would round to 1 are held below.
    return _uniform(first, second, tokens).clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()


def _uniform(first: torch.Tensor, second: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Numbers between 0 and 1 `[P, V]` for the tokens 0 .. V - 1, by two keys `[P, 1]` for each position."""
    if native.reads(first):
        return native_cycle.draw(first, second, len(tokens))
    bits = _hash32(_hash32(tokens ^ first) + second)
    return (bits.float() + 0.5) * 2.0**-32


def _hash32(x: torch.Tensor) -> torch.Tensor:
    """A bijective mixer of 32-bit integers (two rounds of multiply and xor-shift), carried in int64."""
    x = x & MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)
