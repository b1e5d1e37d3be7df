"""What a head learns from one batch: the tokens (and for EAGLE-1 the features) of training-time-test steps."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from draftwing.config import TrainConfig
from draftwing.models.eagle import EagleModel
from draftwing.models.eagle3 import Eagle3Model
from draftwing.models.target import TargetModel
from draftwing.training.fused import OutputHead, Teacher, fused_loss, summarize
from draftwing.training.losses import feature_regression, widen
from draftwing.training.slots import SupervisedSlots, document_positions
from draftwing.training.ttt import TttAttention, shift_left


class HeadTraining(nn.Module):
    """A head with its frozen target: `forward(batch)` gives the loss; metrics of each step are summed on the side."""

    def __init__(self, head: EagleModel | Eagle3Model, target: TargetModel, config: TrainConfig) -> None:
        super().__init__()
        self.head = head
        self._target = target  # a TargetModel is no module, so its weights are not saved
        target.model.requires_grad_(False)  # nor trained, though the head shares its embedding or output head
        self._config = config
        self._is_checked = False
        # Sums over the batches since they were last read, apart for training and evaluation.
        self._sums: dict[bool, dict[str, Any]] = {True: defaultdict(float), False: defaultdict(float)}
        assert isinstance(target.output_head, nn.Linear), "a packed target cannot be trained with"
        weight = target.output_head.weight
        self._target_head = OutputHead(weight, target.output_head.bias, target.logit_transform)
        ids = head.vocab.target_ids
        # The target's head over the draft vocabulary, and each target token's draft id, -1 if it has none.
        self._teacher_head, self._draft_ids = self._target_head, torch.arange(target.vocab_size, device=weight.device)
        if ids is not None:
            ids = ids.to(weight.device)
            self._teacher_head = self._target_head.rows(ids)
            self._draft_ids = torch.full_like(self._draft_ids, -1)
            self._draft_ids[ids] = torch.arange(len(ids), device=weight.device)

    def forward(
        self,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        last_hidden: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """The batch's `loss`.

        Args:
            input_ids: `[B, S]`, right-padded or packed.
            loss_mask: `[B, S]`, True for the tokens that are the model's to say.
            document_ids: `[B, S]`, ascending from 0, -1 for padding, of packed rows; no step crosses a document.
            features: `[B, S, F]`, and `last_hidden [B, S, D]`, the output of the target's final norm, of a target
                that need not be run.
        """
        if document_ids is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        else:
            positions = document_positions(document_ids)
        if features is None or last_hidden is None:
            self._check_target()
            layers = self.head.config.feature_layers
            states = self._target.read_rows(input_ids, layers, positions, document_ids)
            features, last_hidden = states.features, states.last_hidden
        slots = SupervisedSlots.of(loss_mask, positions)
        # The target may be in bf16, the head's weights are not.
        outputs = self._run_steps(features.to(self.head.fc.weight.dtype), input_ids, positions, document_ids, slots)
        loss = self._loss(outputs, last_hidden.flatten(0, 1)[slots.teacher], slots)
        self._add("loss", loss)
        return {"loss": loss}

    def pop_metrics(self, training: bool) -> dict[str, float]:
        """Means over the training or evaluation batches since the last call: loss, each step's figures, tau_sim."""
        sums = self._sums[training]
        count = sums.pop("batches", 1)
        metrics = {name: float(total) / count for name, total in sums.items()}
        product, tau, step = 1.0, 1.0, 0
        while f"accuracy_{step}" in metrics:
            product *= metrics[f"accuracy_{step}"]
            step += 1
            tau += product
        sums.clear()
        return metrics | {"tau_sim": tau}

    def _run_steps(
        self,
        features: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        document_ids: torch.Tensor | None,
        slots: SupervisedSlots,
    ) -> torch.Tensor:
        """What the output head reads at each step, at the slots that predict the teacher's: `[U, J, D]`."""
        head = self.head
        head.rotary.reserve(input_ids.shape[1] + self._num_steps)
        if isinstance(head, EagleModel) and self.training:
            features = features + (torch.rand_like(features) * 2 - 1) * self._config.feature_noise
        hidden, attend, outputs = head.fuse(features), TttAttention(document_ids), []
        for step in range(self._num_steps):
            output = head(hidden, shift_left(input_ids, 1 + step), positions + step, attend)
            outputs.append(head.readout(output.flatten(0, 1).index_select(0, slots.student(step))))
            hidden = head.feed_back(output)
        return torch.stack(outputs, dim=1)

    def _loss(self, outputs: torch.Tensor, last_hidden: torch.Tensor, slots: SupervisedSlots) -> torch.Tensor:
        """The sum of decay^j times step j's mean loss; `outputs [U, J, D]`, `last_hidden [U, D]` at the teacher's."""
        config, head = self._config, self.head
        best, log_total = summarize(last_hidden, self._target_head)
        teacher = Teacher(last_hidden, self._teacher_head.cast(), log_total, self._draft_ids[best])
        valid = slots.valid(self._num_steps)
        has_loss = valid & (teacher.best >= 0)[:, None]
        num_losses, num_valid = _count(has_loss), _count(valid)
        step_weights = config.ttt_decay ** torch.arange(self._num_steps, device=outputs.device) / num_losses
        output_head = OutputHead(head.lm_head.weight) if isinstance(head, Eagle3Model) else self._target_head
        step_weights = step_weights.to(widen(outputs[:0]).dtype)
        loss, sums = fused_loss(outputs, output_head, teacher, valid, step_weights, (config.loss, config.lk_decay))
        for step in range(self._num_steps):
            self._add(f"loss_{step}", sums.loss[step] / num_losses[step])
            self._add(f"accuracy_{step}", sums.hits[step] / num_valid[step])
            self._add(f"acceptance_rate_{step}", sums.acceptance[step] / num_valid[step])
        if isinstance(head, Eagle3Model):
            return loss
        regressions = feature_regression(outputs, last_hidden[:, None]) * has_loss
        self._add("regression", regressions[:, 0].sum() / num_losses[0])
        return (regressions * step_weights).sum() + config.token_loss_weight * loss

    @property
    def _num_steps(self) -> int:
        return self._config.ttt_steps if isinstance(self.head, Eagle3Model) else 1

    def _check_target(self) -> None:
        if not self._is_checked:
            self._target.check_logits()
            self._is_checked = True

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[self.training][name] += value.detach()
        self._sums[self.training]["batches"] += name == "loss"


def _count(mask: torch.Tensor) -> torch.Tensor:
    """How many slots each step's mean is over, at least 1: `[U, J]` -> `[J]`."""
    return mask.sum(0).clamp(min=1)
