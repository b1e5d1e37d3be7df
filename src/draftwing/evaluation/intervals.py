"""Bootstrap intervals over prompts: how much a figure depends on which prompts were measured."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Sums = npt.NDArray[np.float64]


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

    tau and tokens/s are such ratios. Prompts are drawn with replacement, the same ones for both sums; the draws are a
    function of `seed`.

    Raises:
        ValueError: no prompts, or a different number of numerators and denominators.
    """
    return product_interval([numerators], [denominators], level, num_resamples, seed)


def product_interval(
    numerators: Sequence[Sequence[float]],
    denominators: Sequence[Sequence[float]],
    level: float = 0.95,
    num_resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """As `ratio_interval`, of a product of sums over a product of sums.

    A speed-up is one where the outputs differ: (tokens / seconds) / (plain tokens / plain seconds).
    """
    columns = [*numerators, *denominators]
    for column in columns:
        if not column or len(column) != len(columns[0]):
            raise ValueError(f"denominators: expected one per numerator, got {len(column)} for {len(columns[0])}")
    figures = np.asarray(columns, dtype=float)
    picks = np.random.default_rng(seed).integers(figures.shape[1], size=(num_resamples, figures.shape[1]))

    def ratio(sums: Sums) -> Sums:
        """Of sums `[C, ...]`."""
        return np.asarray(sums[: len(numerators)].prod(0) / sums[len(numerators) :].prod(0))

    low, high = np.quantile(ratio(figures[:, picks].sum(-1)), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(ratio(figures.sum(1))), float(low), float(high))
