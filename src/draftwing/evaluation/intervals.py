"""Bootstrap intervals over prompts: how much a figure depends on which prompts were measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    level: float = 0.95,
    num_resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap interval of `sum(numerators) / sum(denominators)`, which have one entry per prompt.

    tau, tokens/s and speed-ups are such ratios. Prompts are drawn with replacement, the same ones for both sums; the
    draws are a function of `seed`.

    Raises:
        ValueError: no prompts, or a different number of numerators and denominators.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"denominators: expected one per numerator, got {len(denominators)} for {len(numerators)}")
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    picks = np.random.default_rng(seed).integers(len(above), size=(num_resamples, len(above)))
    ratios = above[picks].sum(1) / below[picks].sum(1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(above.sum() / below.sum()), float(low), float(high))
