"""The losses on numbers that can be checked by hand, and their gradients against autograd."""

import math
from typing import get_args

import pytest
import torch

from draftwing.config import Loss
from draftwing.losses.slot_losses import TeacherProbs, feature_regression, slot_losses

ETA = 3.0


def teacher_of(target_probs: list[list[float]], best: list[int]) -> TeacherProbs:
    probs = torch.tensor(target_probs, dtype=torch.float64)
    return TeacherProbs(probs, probs / probs.sum(-1, keepdim=True), torch.tensor(best))


def naive_losses(loss: Loss, logits: torch.Tensor, teacher: TeacherProbs) -> torch.Tensor:
    """The formulas of losses/slot_losses.py, to be differentiated by autograd: `[C, J]`."""
    log_q = logits.log_softmax(-1)
    p, total = teacher.draft_probs[:, None], teacher.target_probs[:, None]
    if loss == "cross_entropy":
        return -torch.stack([log_q[slot, :, max(best, 0)] for slot, best in enumerate(teacher.best.tolist())])
    if loss == "kl":
        return -(p * log_q).sum(-1)
    divergence = (p * (p.log() - log_q)).sum(-1)
    acceptance = torch.minimum(total, log_q.exp()).sum(-1)
    weight = torch.exp(-ETA * acceptance.detach())
    return weight * divergence + (1 - weight) * (1 - acceptance)


def test_kl_of_a_certain_teacher_is_minus_the_log_probability() -> None:
    logits = torch.tensor([[[math.log(0.2), math.log(0.3), math.log(0.5)]]], dtype=torch.float64)
    assert slot_losses("kl", ETA, logits, teacher_of([[0, 1, 0]], [1])).losses.item() == pytest.approx(-math.log(0.3))


def test_kl_of_the_teacher_with_itself_is_its_entropy() -> None:
    probs = [0.2, 0.3, 0.5]
    teacher, entropy = teacher_of([probs], [2]), -sum(p * math.log(p) for p in probs)
    same = slot_losses("kl", ETA, teacher.draft_probs.log()[:, None] + 7, teacher)
    assert same.losses.item() == pytest.approx(entropy)
    assert same.gradient.abs().max() < 1e-9
    flat = slot_losses("kl", ETA, torch.zeros(1, 1, 3, dtype=torch.float64), teacher)
    assert flat.losses.item() == pytest.approx(math.log(3))


def test_cross_entropy_is_of_the_targets_likeliest_token() -> None:
    logits = torch.tensor([[[math.log(0.2), math.log(0.3), math.log(0.5)]]], dtype=torch.float64)
    slots = slot_losses("cross_entropy", ETA, logits, teacher_of([[0.5, 0.3, 0.2]], [0]))
    assert slots.losses.item() == pytest.approx(-math.log(0.2))


def test_lk_goes_from_kl_to_the_acceptance_rate() -> None:
    logits = torch.tensor([[[math.log(0.2), math.log(0.3), math.log(0.5)]]], dtype=torch.float64)
    teacher = teacher_of([[0.5, 0.3, 0.2]], [0])
    divergence = 0.5 * math.log(0.5 / 0.2) + 0.2 * math.log(0.2 / 0.5)
    acceptance = 0.2 + 0.3 + 0.2
    weight = math.exp(-ETA * acceptance)
    expected = weight * divergence + (1 - weight) * (1 - acceptance)
    assert slot_losses("lk", ETA, logits, teacher).losses.item() == pytest.approx(expected)
    assert slot_losses("lk", 0.0, logits, teacher).losses.item() == pytest.approx(divergence)
    assert slot_losses("lk", 1e9, logits, teacher).losses.item() == pytest.approx(1 - acceptance)


def test_acceptance_counts_what_the_draft_vocabulary_lacks_as_lost() -> None:
    """A draft equal to the renormalised target is accepted as often as the target says a token that it has."""
    teacher = teacher_of([[0.3, 0.3]], [-1])
    slots = slot_losses("kl", ETA, teacher.draft_probs.log()[:, None], teacher)
    assert slots.acceptance.item() == pytest.approx(0.6)
    assert not slots.hits.any()


@pytest.mark.parametrize("loss", get_args(Loss))
def test_gradients_equal_autograd(loss: Loss) -> None:
    torch.manual_seed(0)
    total = torch.randn(5, 9, dtype=torch.float64).softmax(-1)
    teacher = TeacherProbs(
        total[:, :7], total[:, :7] / total[:, :7].sum(-1, keepdim=True), torch.tensor([6, 0, 3, 2, 6])
    )
    logits = (2 * torch.randn(5, 3, 7, dtype=torch.float64)).requires_grad_()
    slots = slot_losses(loss, ETA, logits.detach(), teacher)
    expected = naive_losses(loss, logits, teacher)
    torch.testing.assert_close(slots.losses, expected.detach())
    torch.testing.assert_close(slots.gradient, torch.autograd.grad(expected.sum(), logits)[0])


def test_feature_regression_is_float32_for_bf16_inputs() -> None:
    inputs = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert feature_regression(inputs, inputs).dtype == torch.float32


def test_feature_regression_is_quadratic_up_to_1_and_linear_beyond() -> None:
    features = torch.zeros(1, 1, 2)
    predicted = torch.tensor([[[0.5, -1.0], [3.0, 0.0]]])
    # (0.125 + 0.5) / 2 and (2.5 + 0) / 2
    assert feature_regression(predicted, features).tolist() == [[0.3125, 1.25]]
