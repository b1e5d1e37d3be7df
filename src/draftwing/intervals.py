"""Bootstrap intervals over prompts: how much a figure depends on which prompts were measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST_PROMPTS = 4
"""An interval over fewer prompts means nothing."""


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


Sums = tuple[Sequence[float], Sequence[float]]
"""Numerators and denominators, each with one entry per prompt."""


def ratio_interval(
    ratio: Sums, base: Sums | None = None, level: float = 0.95, num_resamples: int = 5000, seed: int = 0
) -> Interval:
    """The percentile bootstrap interval of the ratio of two sums; over that of `base`, if there is one.

    tau, tokens/s and speed-ups are such ratios. Prompts are drawn with replacement, the same ones for all sums; the
    draws are a function of `seed`.

    Raises:
        ValueError: no prompts, or a different number of them.
    """
    num_prompts = len(ratio[0])
    ones = [1.0] * num_prompts
    sums = (*ratio, *(base or (ones, ones)))
    for column in sums:
        if not num_prompts or len(column) != num_prompts:
            raise ValueError(f"denominators: expected one per numerator, got {len(column)} for {num_prompts}")
    columns = np.asarray(sums, dtype=float)
    picks = np.random.default_rng(seed).integers(num_prompts, size=(num_resamples, num_prompts))
    draws = _gain(columns[:, picks].sum(-1))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(_gain(columns.sum(-1))), float(low), float(high))


def _gain(sums: Any) -> Any:
    """The first ratio of sums `[4]` or `[4, num_resamples]` over the second."""
    numerator, denominator, base_numerator, base_denominator = sums
    return numerator / denominator / (base_numerator / base_denominator)
