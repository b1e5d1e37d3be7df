"""Bootstrap intervals over prompts."""

import numpy as np
import pytest

from draftwing.intervals import ratio_interval


def test_the_value_is_the_ratio_of_the_sums() -> None:
    interval = ratio_interval(([30, 10], [10, 10]))
    assert interval.value == 2.0
    assert (interval.low, interval.high) == (1.0, 3.0)


def test_prompts_that_agree_leave_no_interval() -> None:
    interval = ratio_interval(([20, 40, 60], [10, 20, 30]))
    assert (interval.value, interval.low, interval.high) == (2.0, 2.0, 2.0)
    assert str(interval) == "2.00 [2.00, 2.00]"


def test_a_seed_decides_the_draws() -> None:
    numerators, denominators = np.random.default_rng(1).uniform(1, 2, (2, 9)).tolist()
    first = ratio_interval((numerators, denominators), seed=3)
    assert first == ratio_interval((numerators, denominators), seed=3)
    assert first != ratio_interval((numerators, denominators), seed=4)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        interval = ratio_interval(((2 + rng.normal(size=40)).tolist(), [1.0] * 40), num_resamples=400)
        held.append(interval.low <= 2 <= interval.high)
    assert 0.90 < np.mean(held) < 0.98


@pytest.mark.parametrize("denominators", [[], [1.0]])
def test_sums_of_different_prompts_are_refused(denominators: list[float]) -> None:
    with pytest.raises(ValueError, match="denominators"):
        ratio_interval(([1.0, 2.0], denominators))


def test_a_gain_is_a_ratio_of_ratios_over_the_same_prompts() -> None:
    gain = ratio_interval(([30, 10], [10, 10]), ([15, 5], [10, 10]))
    assert (gain.value, gain.low, gain.high) == (2.0, 2.0, 2.0)  # twice as much for every prompt
    with pytest.raises(ValueError, match="denominators"):
        ratio_interval(([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0]))
