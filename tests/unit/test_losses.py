"""The losses on numbers that can be checked by hand."""

import math

import pytest
import torch

from draftwing.training.losses import feature_regression, masked_mean, soft_cross_entropy


def test_masked_mean_is_over_supervised_slots_only() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert masked_mean(values, mask).item() == 3.0  # (1 + 2 + 6) / 3: a mean over slots, not over rows


def test_masked_mean_of_nothing_is_0() -> None:
    assert masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).item() == 0.0


def test_soft_cross_entropy_of_a_certain_teacher_is_minus_the_log_probability() -> None:
    logits = torch.tensor([[[math.log(0.2), math.log(0.3), math.log(0.5)]]])
    teacher = torch.tensor([[[0.0, 1.0, 0.0]]])
    assert soft_cross_entropy(logits, teacher).item() == pytest.approx(-math.log(0.3))


def test_soft_cross_entropy_of_the_teacher_with_itself_is_its_entropy() -> None:
    probs = [0.2, 0.3, 0.5]
    teacher = torch.tensor([[probs]])
    entropy = -sum(p * math.log(p) for p in probs)
    assert soft_cross_entropy(teacher.log() + 7, teacher).item() == pytest.approx(entropy, rel=1e-5)
    assert soft_cross_entropy(torch.zeros(1, 1, 3), teacher).item() == pytest.approx(math.log(3), rel=1e-5)


def test_losses_are_float32_for_bf16_inputs() -> None:
    inputs = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert soft_cross_entropy(inputs, inputs.float().softmax(-1)).dtype == torch.float32
    assert feature_regression(inputs, inputs).dtype == torch.float32


def test_feature_regression_is_quadratic_up_to_1_and_linear_beyond() -> None:
    features = torch.zeros(1, 2, 2)
    predicted = torch.tensor([[[0.5, -1.0], [3.0, 0.0]]])
    # (0.125 + 0.5) / 2 and (2.5 + 0) / 2
    assert feature_regression(predicted, features).tolist() == [[0.3125, 1.25]]
