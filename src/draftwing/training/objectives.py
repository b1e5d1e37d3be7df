"""What a head learns from one batch: the tokens (and for EAGLE-1 the features) of training-time-test steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from draftwing.config import TrainConfig
from draftwing.drafts.eagle.eagle1 import EagleModel
from draftwing.drafts.eagle.eagle3 import Eagle3Layer, Eagle3Model
from draftwing.drafts.medusa.network import MedusaModel, ResBlock
from draftwing.layers import DecoderLayer
from draftwing.target.model import TargetModel
from draftwing.training.fused import OutputHead, StepSums, Teacher, fused_loss, summarize
from draftwing.training.losses import feature_regression, slot_loss, widen
from draftwing.training.slots import SupervisedSlots, document_positions
from draftwing.training.ttt import TttAttention, shift_left


class HeadTraining(nn.Module):
    """A head with its frozen target: `forward(batch)` gives the loss; metrics of each step are summed on the side.

    A step's loss is a mean over the slots that it supervises. Their number follows from the loss mask alone, so it can
    be summed over processes and accumulated batches before the first of them runs (`count_slots`). All parameters are
    used in `forward`, so this is the module to wrap for DDP or FSDP.
    """

    def __init__(self, head: EagleModel | Eagle3Model | MedusaModel, target: TargetModel, config: TrainConfig) -> None:
        super().__init__()
        self.head = head
        self.target = target  # a TargetModel is no module, so its weights are not saved
        target.model.requires_grad_(False)  # nor trained, though the head shares its embedding or output head
        self._config = config
        self._slot_loss = slot_loss(config.loss, config.lk_decay)
        # (Sum, count) of each figure since they were last read, apart for training and evaluation.
        self._sums: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
        target.check_logits()
        output_head = target.output_head
        if not isinstance(output_head, nn.Linear) or not output_head.weight.is_floating_point():
            raise ValueError(
                f"target: its output head is quantised ({type(output_head).__name__}); training reads its weight"
            )
        weight = output_head.weight
        self._target_head = OutputHead(weight, output_head.bias, target.logit_transform)
        ids = head.vocab.target_ids
        # The target's head over the draft vocabulary, and each target token's draft id, -1 if it has none.
        self._teacher_head, self._draft_ids = self._target_head, torch.arange(target.vocab_size, device=weight.device)
        if ids is not None:
            ids = ids.to(weight.device)
            self._teacher_head = self._target_head.rows(ids)
            self._draft_ids = torch.full_like(self._draft_ids, -1)
            self._draft_ids[ids] = torch.arange(len(ids), device=weight.device)

    def compile_parts(self) -> None:
        """Compile the head's layers, in place, for rows of any length, and the loss.

        One graph before attention and one behind it serve all training-time-test steps; products of the output head
        stay as they are.
        """
        for module in self.head.modules():
            if isinstance(module, Eagle3Layer | DecoderLayer | ResBlock):
                module.compile(dynamic=True)
        self._slot_loss = slot_loss(self._config.loss, self._config.lk_decay, compiles=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        last_hidden: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """The batch's `loss`.

        Args:
            input_ids: `[B, S]`, right-padded or packed.
            loss_mask: `[B, S]`, True for the tokens that are the model's to say.
            document_ids: `[B, S]`, ascending from 0, -1 for padding, of packed rows; no step crosses a document.
            last_hidden: `[B, S, D]`, the output of the target's final norm, where the target need not be run;
                `features [B, S, F]` with it, unless they are the same (EAGLE-1).
            num_items_in_batch: `[J]` (the Trainer's name), the slots of all batches whose gradients are summed, by
                step; default: of this batch alone.
        """
        positions = _positions(loss_mask, document_ids)
        slots = SupervisedSlots.of(loss_mask, positions)  # waits for the device, so before there is much to wait for
        if last_hidden is None:
            layers = self.head.config.feature_layers
            states = self.target.read_rows(input_ids, layers, positions, document_ids)
            features, last_hidden = states.features, states.last_hidden
        features = last_hidden if features is None else features
        # The target may be in bf16, the head's weights are not.
        outputs = self._run_steps(
            features.to(next(self.head.parameters()).dtype), input_ids, positions, document_ids, slots
        )
        valid = slots.valid(self._num_steps)
        num_slots = valid.sum(0) if num_items_in_batch is None else num_items_in_batch
        step_weights = self._decay(outputs.device) / num_slots.clamp(min=1)
        return {"loss": self._loss(outputs, last_hidden.flatten(0, 1)[slots.teacher], valid, step_weights)}

    def count_slots(self, loss_mask: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The number of slots that each training-time-test step supervises, `[J]`."""
        slots = SupervisedSlots.of(loss_mask, _positions(loss_mask, document_ids))
        return slots.valid(self._num_steps).sum(0)

    def pop_metrics(
        self, training: bool, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
    ) -> dict[str, float]:
        """Means over the training or evaluation slots since the last call: loss, each step's figures, tau_sim.

        `reduce` sums a tensor over the processes.
        """
        sums, self._sums[training] = self._sums[training], {}
        if not sums:
            return {}
        totals = reduce(torch.stack(list(sums.values()))).tolist()
        metrics = {name: total / max(count, 1) for name, (total, count) in zip(sums, totals, strict=True)}
        loss, product, tau = 0.0, 1.0, 1.0
        for step, weight in enumerate(self._decay(torch.device("cpu")).tolist()):
            of_tokens, of_features = metrics.get(f"loss_{step}", 0.0), metrics.get(f"regression_{step}", 0.0)
            loss += weight * (self._token_weight * of_tokens + of_features)
            product *= metrics[f"accuracy_{step}"]
            tau += product
        return metrics | {"loss": loss, "tau_sim": tau}

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
        assert not isinstance(head, MedusaModel)
        head.rotary.reserve(input_ids.shape[1] + self._num_steps)
        if isinstance(head, EagleModel) and self.training:
            features = features + (torch.rand_like(features) * 2 - 1) * self._config.feature_noise
        hidden, attend, outputs = head.fuse(features), TttAttention(document_ids), []
        for step in range(self._num_steps):
            output = head(hidden, shift_left(input_ids, 1 + step), positions + step, attend)
            outputs.append(head.readout(output.flatten(0, 1).index_select(0, slots.student(step))))
            hidden = head.feed_back(output)
        return torch.stack(outputs, dim=1)

    def _loss(
        self, outputs: torch.Tensor, last_hidden: torch.Tensor, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the losses of `outputs [U, J, D]`, taught by the target's `last_hidden [U, D]`."""
        step_weights = step_weights.to(widen(outputs[:0]).dtype)
        best, log_total = summarize(last_hidden, self._target_head)
        teacher = Teacher(last_hidden, self._teacher_head.ready(), log_total, self._draft_ids[best])
        loss, sums = self._token_loss(outputs, teacher, valid, step_weights)
        loss = self._token_weight * loss
        figures = {"loss": sums.loss, "accuracy": sums.hits, "acceptance_rate": sums.acceptance}
        if isinstance(self.head, EagleModel):
            regression = (feature_regression(outputs, last_hidden[:, None]) * valid).sum(0)
            loss = loss + (regression * step_weights).sum()
            figures["regression"] = regression
        self._add(figures, valid.sum(0))
        return loss

    def _token_loss(
        self, outputs: torch.Tensor, teacher: Teacher, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> tuple[torch.Tensor, StepSums]:
        head = self.head
        output_head = self._target_head
        if isinstance(head, Eagle3Model) and head.config.own_lm_head:
            output_head = OutputHead(head.lm_head.weight)
        return fused_loss(outputs, output_head, teacher, valid, step_weights, self._slot_loss)

    @property
    def _num_steps(self) -> int:
        if isinstance(self.head, MedusaModel):
            return len(self.head)
        return self._config.ttt_steps if isinstance(self.head, Eagle3Model) else self._config.feature_steps

    def _decay(self, device: torch.device) -> torch.Tensor:
        """`decay^j` of each step, `[J]` (float64)."""
        return self._config.ttt_decay ** torch.arange(self._num_steps, dtype=torch.float64, device=device)

    @property
    def _token_weight(self) -> float:
        return self._config.token_loss_weight if isinstance(self.head, EagleModel) else 1.0

    def _add(self, figures: dict[str, torch.Tensor], num_slots: torch.Tensor) -> None:
        """Add each step's sums `[J]` over its slots; they stay on the device, so that no step waits for them."""
        sums = self._sums[self.training]
        for name, totals in figures.items():
            for step, new in enumerate(torch.stack((totals.detach().double(), num_slots.double()), dim=1)):
                key = f"{name}_{step}"
                sums[key] = sums[key] + new if key in sums else new


def _positions(tokens: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """Positions `[B, S]` of a batch's tokens (any tensor of that shape)."""
    if document_ids is None:
        return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return document_positions(document_ids)
