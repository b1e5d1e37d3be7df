"""Bootstrap intervals over prompts: how much a figure depends on which prompts were measured."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    return _bootstrap([(numerators, denominators)], level, num_resamples, seed)


def gain_interval(
    ratio: tuple[Sequence[float], Sequence[float]],
    base: tuple[Sequence[float], Sequence[float]],
    level: float = 0.95,
    num_resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """The interval of one ratio of sums over another, both (numerators, denominators) of the same prompts.

    A tau over another tau is one. Prompts are drawn as in `ratio_interval`.

    Raises:
        ValueError: no prompts, or a different number of them.
    """
    return _bootstrap([ratio, base], level, num_resamples, seed)


def _bootstrap(
    ratios: Sequence[tuple[Sequence[float], Sequence[float]]], level: float, num_resamples: int, seed: int
) -> Interval:
    """The first ratio of sums, divided by the second if there is one."""
    sums = [column for ratio in ratios for column in ratio]
    num_prompts = len(sums[0])
    for column in sums[1:]:
        if not num_prompts or len(column) != num_prompts:
            raise ValueError(f"denominators: expected one per numerator, got {len(column)} for {num_prompts}")
    columns = np.asarray(sums, dtype=float)
    picks = np.random.default_rng(seed).integers(num_prompts, size=(num_resamples, num_prompts))
    values, resampled = columns.sum(-1), columns[:, picks].sum(-1)  # [2 or 4], [2 or 4, num_resamples]
    values, resampled = values[0::2] / values[1::2], resampled[0::2] / resampled[1::2]
    value, draws = (each[0] / each[1] if len(each) > 1 else each[0] for each in (values, resampled))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))
