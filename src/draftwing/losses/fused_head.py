"""Output head and loss in one function over chunks of slots: the logits of a batch never exist, forward or backward.

The gradients of the head's outputs and of its output head are taken in the forward pass, chunk by chunk (as in Liger
Kernel, arXiv 2410.10989); all training-time-test steps of a chunk share its teacher.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from draftwing.losses.slot_losses import SlotLoss, TeacherProbs, widen
from draftwing.target.logits import LogitTransform

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
"""How many logits exist at a time. About five tensors of this size live together; a CPU is faster where its cache holds
them, a GPU with fewer and larger products."""
LEAST_ROWS = 256
"""But so many rows of logits at least: with fewer, a product takes as long as reading the output head does."""
NO_TRANSFORM = LogitTransform()


@dataclass(frozen=True)
class OutputHead:
    """`weight [V, D]`, `bias [V]` or None, and what is done to their product."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    transform: LogitTransform = NO_TRANSFORM

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., D]` -> `[..., V]`, float32 or wider."""
        weight = _in_autocast(self.weight)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return widen(self.transform.apply(functional.linear(hidden.to(weight.dtype), weight, bias)))

    def rows(self, ids: torch.Tensor | slice) -> "OutputHead":
        """The head of some of the tokens only."""
        return OutputHead(self.weight[ids], None if self.bias is None else self.bias[ids], self.transform)

    def ready(self) -> "OutputHead":
        """The head in autocast's dtype, cast once for many products."""
        return OutputHead(_in_autocast(self.weight), self.bias, self.transform)


@dataclass(frozen=True)
class Teacher:
    """The target at U slots: `hidden [U, D]` into its `head` over the draft vocabulary, `log_total [U]` (logsumexp of
    its logits over all of the vocabulary) and `best [U]` (draft id of its argmax over all, -1 if there is none); both
    are None where the draft vocabulary is all of it, for there they follow from the head's logits."""

    hidden: torch.Tensor
    head: OutputHead
    log_total: torch.Tensor | None = None
    best: torch.Tensor | None = None

    def probs(self, chunk: slice) -> TeacherProbs:
        """The target's probabilities at some of the slots."""
        logits = self.head.logits(self.hidden[chunk])
        draft_probs = logits.softmax(-1)
        if self.log_total is None or self.best is None:
            return TeacherProbs(draft_probs, draft_probs, logits.argmax(-1))
        return TeacherProbs((logits - self.log_total[chunk, None]).exp(), draft_probs, self.best[chunk])


@torch.no_grad()
def summarize(hidden: torch.Tensor, head: OutputHead) -> tuple[torch.Tensor, torch.Tensor]:
    """The argmax (ties to the lowest id) and logsumexp `[U]` of a head's logits, a part of the vocabulary at a time."""
    size = _chunk_size(hidden, len(hidden))
    best = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    highest = log_total = torch.full_like(best, -torch.inf, dtype=widen(hidden[:0]).dtype)
    for start in range(0, len(head.weight), size):
        logits = head.rows(slice(start, start + size)).logits(hidden)
        values, ids = logits.max(-1)
        part = logits.logsumexp(-1)
        best = torch.where(values > highest, ids + start, best)
        highest = torch.maximum(values, highest)
        log_total = torch.logaddexp(log_total, part)
    return best, log_total


@dataclass(frozen=True)
class StepSums:
    """Sums over slots of each of J steps, `[J]`: losses of those with a loss; acceptance, hits of all valid ones."""

    loss: torch.Tensor
    acceptance: torch.Tensor
    hits: torch.Tensor


def fused_loss(
    outputs: torch.Tensor,
    head: OutputHead,
    teacher: Teacher,
    valid: torch.Tensor,
    step_weights: torch.Tensor,
    loss: SlotLoss,
) -> tuple[torch.Tensor, StepSums]:
    """The weighted sum of the losses of all slots and steps, differentiable in outputs, head weight and bias.

    Args:
        outputs: `[U, J, D]`, what the output head reads at the slot that predicts teacher slot u at step j.
        valid: `[U, J]`; others count for nothing. Those whose `teacher.best` is no draft token have no loss.
        step_weights: `[J]`, the factor of a step's losses.
    """
    settings = _Settings(head.transform, teacher, valid, step_weights, loss)
    total, sums = _FusedLoss.apply(outputs, head.weight, head.bias, settings)  # type: ignore[no-untyped-call]
    return total, StepSums(*sums)


@dataclass(frozen=True)
class _Settings:
    transform: LogitTransform
    teacher: Teacher
    valid: torch.Tensor
    step_weights: torch.Tensor
    loss: SlotLoss


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, outputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: _Settings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = OutputHead(weight, bias, settings.transform).ready()
        inputs = (outputs, weight, bias)
        gradients = [
            None if x is None or not needed else torch.zeros_like(x, dtype=widen(x[:0]).dtype)
            for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        sums = torch.zeros(3, outputs.shape[1], dtype=settings.step_weights.dtype, device=outputs.device)
        total = sums.new_zeros(())
        num_steps = outputs.shape[1]
        size = max(_chunk_size(outputs, num_steps * len(weight)), LEAST_ROWS // max(1, num_steps))
        with torch.autocast(outputs.device.type, enabled=False):  # what is to be cast is; the rest stays wide
            for start in range(0, len(outputs), size):
                total += _run_chunk(slice(start, start + size), outputs, head, settings, gradients, sums)
        ctx.gradients = [
            None if x is None or g is None else g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)
        ]
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx: Any, total: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: they are as large as the weights
        return *(None if gradient is None else gradient.mul_(total) for gradient in gradients), None


def _run_chunk(
    chunk: slice,
    outputs: torch.Tensor,
    head: OutputHead,
    settings: _Settings,
    gradients: list[torch.Tensor | None],
    sums: torch.Tensor,
) -> torch.Tensor:
    """A chunk's weighted loss; adds its figures to `sums [3, J]`, its shares to outputs', weight's, bias' gradients."""
    teacher, valid = settings.teacher.probs(chunk), settings.valid[chunk]
    logits = head.logits(outputs[chunk])
    slots = settings.loss(logits, teacher)
    has_loss = valid & (teacher.best >= 0)[:, None]
    losses = slots.losses * has_loss
    sums += torch.stack([losses.sum(0), (slots.acceptance * valid).sum(0), (slots.hits & valid).sum(0)])
    of_outputs, of_weight, of_bias = gradients
    gradient = slots.gradient.mul_((has_loss * settings.step_weights)[..., None])
    gradient = head.transform.gradient(logits, gradient)
    if of_bias is not None:
        of_bias += gradient.sum((0, 1))
    gradient = gradient.to(head.weight.dtype)
    if of_outputs is not None:
        of_outputs[chunk] = gradient @ head.weight
    if of_weight is not None:
        of_weight += gradient.flatten(0, 1).T @ outputs[chunk].flatten(0, 1).to(head.weight.dtype)
    return (losses * settings.step_weights).sum()


def _chunk_size(x: torch.Tensor, num_elements: int) -> int:
    """How many slots, or tokens, of `num_elements` each make a chunk on the device of `x`."""
    return max(1, CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cuda"]) // max(1, num_elements))


def _in_autocast(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype that autocast would multiply it in."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x
