"""The fused output head and loss against one that materialises the logits, and that it does not."""

from typing import Any, get_args

import pytest
import torch
from test_slot_losses import ETA, naive_losses
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draftwing.config import Loss
from draftwing.losses import fused_head
from draftwing.losses.fused_head import OutputHead, Teacher, fused_loss, summarize
from draftwing.losses.slot_losses import TeacherProbs, slot_loss
from draftwing.target.logits import LogitTransform

SLOTS, STEPS, WIDTH, VOCAB, DRAFT_VOCAB = 11, 3, 6, 20, 13
STEP_WEIGHTS = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.25, cap=2.0)]


class LargestTensor(TorchDispatchMode):
    """Notes the largest result of all operations, by number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots at a time; seven rows of the vocabulary."""
    monkeypatch.setitem(fused_head.CHUNK_ELEMENTS, "cpu", 2 * STEPS * DRAFT_VOCAB)
    monkeypatch.setattr(fused_head, "LEAST_ROWS", 1)


def random_teacher(transform: LogitTransform, ids: torch.Tensor) -> tuple[Teacher, TeacherProbs]:
    """A teacher, and its probabilities from materialised logits."""
    torch.manual_seed(1)
    hidden = torch.randn(SLOTS, WIDTH, dtype=torch.float64)
    head = OutputHead(torch.randn(VOCAB, WIDTH).double(), torch.randn(VOCAB).double(), transform)
    logits = transform.apply(hidden @ head.weight.T + head.bias)
    draft_ids = torch.full((VOCAB,), -1)
    draft_ids[ids] = torch.arange(len(ids))
    best, log_total = summarize(hidden, head)
    probs = logits.softmax(-1)[:, ids]
    naive = TeacherProbs(probs, probs / probs.sum(-1, keepdim=True), draft_ids[logits.argmax(-1)])
    return Teacher(hidden, head.rows(ids), log_total, draft_ids[best]), naive


def random_student() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs, weight and bias with gradients, and which slots are valid."""
    torch.manual_seed(2)
    sizes = [(SLOTS, STEPS, WIDTH), (DRAFT_VOCAB, WIDTH), (DRAFT_VOCAB,)]
    outputs, weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    return outputs, weight, bias, torch.rand(SLOTS, STEPS) < 0.8


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", get_args(Loss))
def test_equals_materialised_logits(loss: Loss, transform: LogitTransform) -> None:
    outputs, weight, bias, valid = random_student()
    teacher, naive = random_teacher(transform, torch.arange(0, VOCAB)[-DRAFT_VOCAB:])
    assert 0 < (teacher.best < 0).sum() < SLOTS, "the draft vocabulary should lack some of the target's choices"
    total, sums = fused_loss(
        outputs, OutputHead(weight, bias, transform), teacher, valid, STEP_WEIGHTS, slot_loss(loss, ETA)
    )

    logits = transform.apply(outputs @ weight.T + bias)
    has_loss = valid & (naive.best >= 0)[:, None]
    losses = naive_losses(loss, logits, naive) * has_loss
    expected = (losses * STEP_WEIGHTS).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(sums.loss, losses.sum(0).detach())
    acceptance = torch.minimum(logits.softmax(-1), naive.target_probs[:, None]).sum(-1)
    torch.testing.assert_close(sums.acceptance, (acceptance * valid).sum(0).detach())
    hits = (logits.argmax(-1) == naive.best[:, None]) & valid
    assert sums.hits.tolist() == hits.sum(0).tolist()
    inputs = (outputs, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(3 * total, inputs), torch.autograd.grad(3 * expected, inputs))


@pytest.mark.parametrize("loss", get_args(Loss))
def test_a_teacher_of_the_whole_vocabulary_needs_no_summary(loss: Loss) -> None:
    torch.manual_seed(5)
    head = OutputHead(torch.randn(VOCAB, WIDTH).double(), torch.randn(VOCAB).double())
    hidden, (outputs, _, _, valid) = torch.randn(SLOTS, WIDTH).double(), random_student()
    best, log_total = summarize(hidden, head)
    results = []
    for teacher in (Teacher(hidden, head), Teacher(hidden, head, log_total, best)):
        total, sums = fused_loss(outputs, head, teacher, valid, STEP_WEIGHTS, slot_loss(loss, ETA))
        results.append((total, *vars(sums).values(), *torch.autograd.grad(total, outputs)))
    torch.testing.assert_close(results[0], results[1])


def test_chunks_have_rows_enough_for_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary a few rows are as slow as many: reading the output head takes the time."""
    sizes = []
    chunk = fused_head._run_chunk
    monkeypatch.setattr(
        fused_head, "_run_chunk", lambda rows, *rest: (sizes.append(rows.stop - rows.start), chunk(rows, *rest))[1]
    )
    outputs, weight, _, valid = random_student()
    teacher, _ = random_teacher(LogitTransform(), torch.arange(DRAFT_VOCAB))
    for least in (1, 5 * STEPS):
        monkeypatch.setattr(fused_head, "LEAST_ROWS", least)
        fused_loss(outputs, OutputHead(weight), teacher, valid, STEP_WEIGHTS, slot_loss("kl", ETA))
    assert sizes == [2] * 6 + [5] * 3


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_summary_over_parts_of_the_vocabulary(transform: LogitTransform) -> None:
    torch.manual_seed(3)
    hidden, weight = torch.randn(SLOTS, WIDTH).double(), torch.randn(VOCAB, WIDTH).double()
    weight[17] = weight[4]  # ties go to the lowest id, across parts too
    hidden[0] = 100 * weight[4]
    logits = transform.apply(hidden @ weight.T)
    best, log_total = summarize(hidden, OutputHead(weight, None, transform))
    assert best.tolist() == logits.argmax(-1).tolist()
    assert best[0] == 4
    torch.testing.assert_close(log_total, logits.logsumexp(-1))


def test_a_frozen_output_head_gets_no_gradient() -> None:
    outputs, weight, _, valid = random_student()
    teacher, _ = random_teacher(LogitTransform(), torch.arange(DRAFT_VOCAB))
    total, _ = fused_loss(outputs, OutputHead(weight.detach()), teacher, valid, STEP_WEIGHTS, slot_loss("kl", ETA))
    total.backward()
    assert outputs.grad is not None


def test_nothing_supervised_is_a_loss_of_0_with_gradients_of_0() -> None:
    outputs, weight, _, valid = random_student()
    teacher, _ = random_teacher(LogitTransform(), torch.arange(DRAFT_VOCAB))
    nothing = Teacher(teacher.hidden[:0], teacher.head, teacher.log_total[:0], teacher.best[:0])
    total, _ = fused_loss(outputs[:0], OutputHead(weight), nothing, valid[:0], STEP_WEIGHTS, slot_loss("kl", ETA))
    total.backward()
    assert total.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_no_tensor_is_larger_than_a_chunk_or_an_input() -> None:
    torch.manual_seed(4)
    slots, steps, width, vocab = 40, 3, 5, 100
    chunk = 2 * steps * vocab
    fused_head.CHUNK_ELEMENTS["cpu"] = chunk  # the fixture puts it back
    outputs = torch.randn(slots, steps, width, requires_grad=True)
    head, weight = OutputHead(torch.randn(vocab, width)), torch.randn(vocab, width, requires_grad=True)
    hidden, valid = torch.randn(slots, width), torch.ones(slots, steps, dtype=torch.bool)
    with LargestTensor() as largest:
        best, log_total = summarize(hidden, head)
        teacher = Teacher(hidden, head, log_total, best)
        total, _ = fused_loss(outputs, OutputHead(weight), teacher, valid, torch.ones(steps), slot_loss("lk", ETA))
        total.backward()
    assert largest.numel == max(chunk, outputs.numel(), weight.numel())
    with LargestTensor() as largest:
        naive_losses("kl", outputs @ weight.T, teacher.probs(slice(None)))
    assert largest.numel == slots * steps * vocab, "the check sees logits that exist"


def test_bf16_products_and_float32_losses_under_autocast() -> None:
    outputs, weight, _, valid = random_student()
    outputs, weight = outputs.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    teacher, _ = random_teacher(LogitTransform(), torch.arange(DRAFT_VOCAB))
    teacher = Teacher(
        teacher.hidden.float(), OutputHead(teacher.head.weight.float()), teacher.log_total.float(), teacher.best
    )
    exact, _ = fused_loss(outputs, OutputHead(weight), teacher, valid, STEP_WEIGHTS.float(), slot_loss("kl", ETA))
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = fused_loss(outputs, OutputHead(weight), teacher, valid, STEP_WEIGHTS.float(), slot_loss("kl", ETA))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=0.02)
    assert total.item() != exact.item()
    gradients = torch.autograd.grad(total, (outputs, weight))
    for gradient, expected in zip(gradients, torch.autograd.grad(exact, (outputs, weight)), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.03 * expected.norm()
