"""What a head learns from one batch, whatever its kind: the token that comes one, two, ... steps later."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from draftwing.config import HeadStage
from draftwing.losses.fused_head import OutputHead, StepSums, Teacher, fused_loss, summarize
from draftwing.losses.slot_losses import slot_loss, widen
from draftwing.losses.slots import SupervisedSlots, document_positions
from draftwing.target.model import TargetModel

SumOver = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over the processes that train together."""


class TaughtBatch(NamedTuple):
    """A batch with what its target knows of it.

    Attributes:
        input_ids: `[B, S]`.
        document_ids: `[B, S]` of packed rows, else None.
        positions: `[B, S]`, of tokens in their documents.
        features: `[B, S, F]`, which the head reads.
        last_hidden: `[B, S, D]`, which the target's output head reads.
        slots: those that are supervised.
    """

    input_ids: torch.Tensor
    document_ids: torch.Tensor | None
    positions: torch.Tensor
    features: torch.Tensor
    last_hidden: torch.Tensor
    slots: SupervisedSlots


class HeadLoss(nn.Module):
    """A head with its frozen target: `forward(batch)` gives the loss; metrics of each step are summed on the side.

    A step's loss is a mean over the slots that it supervises. Their number follows from the loss mask alone, so it can
    be summed over processes and accumulated batches before the first of them runs (`count_slots`). All parameters are
    used in `forward`, so this is the module to wrap for DDP or FSDP.

    A kind of head says how many steps it has (`num_steps`), what its output matrix reads at each (`_run_steps`),
    and what becomes of that (`_token_loss`).
    """

    head: Any
    """The network. It has a `vocab`, and in `config.feature_layers` what it reads of the target."""
    compiled_layers: tuple[type[nn.Module], ...] = ()
    """The parts of the head that `compile_parts` compiles."""

    def __init__(self, head: Any, target: TargetModel, stage: HeadStage) -> None:
        super().__init__()
        self.head = head
        self.target = target  # a TargetModel is no module, so its weights are not saved
        target.model.requires_grad_(False)  # nor trained, though the head shares its embedding or output head
        self.stage = stage
        self._slot_loss = slot_loss(stage.loss, stage.lk_decay)
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
        # The target's head over the draft vocabulary, and where that is not all of it, each target token's draft id, -1
        # if it has none.
        self._teacher_head, self._draft_ids = self._target_head, None
        if ids is not None:
            ids = ids.to(weight.device)
            self._teacher_head = self._target_head.rows(ids)
            self._draft_ids = torch.full((target.vocab_size,), -1, device=weight.device)
            self._draft_ids[ids] = torch.arange(len(ids), device=weight.device)

    def compile_parts(self) -> None:
        """Compile the head's layers, in place, for rows of any length, and the loss.

        One graph before attention and one behind it serve all training-time-test steps; products of the output head
        stay as they are.
        """
        for module in self.head.modules():
            if isinstance(module, self.compiled_layers):
                module.compile(dynamic=True)
        self._slot_loss = slot_loss(self.stage.loss, self.stage.lk_decay, compiles=True)

    def forward(
        self, *batch: torch.Tensor, num_items_in_batch: torch.Tensor | None = None, **more: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`{"loss": a scalar}` of a batch; its tensors and their shapes are the arguments of `read`.

        `num_items_in_batch [J]` (the Trainer's name): the slots of all batches whose gradients are summed, by step.
        Default: of this batch alone.
        """
        taught = self.read(*batch, **more)
        outputs = self._run_steps(taught)
        valid = taught.slots.valid(self.num_steps)
        num_slots = valid.sum(0) if num_items_in_batch is None else num_items_in_batch
        step_weights = (self._decay(outputs.device) / num_slots.clamp(min=1)).to(widen(outputs[:0]).dtype)
        last_hidden = taught.last_hidden.flatten(0, 1)[taught.slots.teacher]
        return {"loss": self._loss(outputs, last_hidden, valid, step_weights)}

    def read(
        self,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        last_hidden: torch.Tensor | None = None,
    ) -> TaughtBatch:
        """A batch with its stored features or those of a pass of the target.

        Args:
            input_ids: `[B, S]`, right-padded or packed.
            loss_mask: `[B, S]`, True for the tokens that are the model's to say.
            document_ids: `[B, S]`, ascending from 0, -1 for padding, of packed rows; no step crosses a document.
            last_hidden: `[B, S, D]`, the output of the target's final norm, where the target need not be run;
                `features [B, S, F]` with it, unless they are the same (EAGLE-1).
        """
        positions = document_positions(input_ids, document_ids)
        slots = SupervisedSlots.of(loss_mask, positions)  # waits for the device, so before there is much to wait for
        if last_hidden is None:
            layers = self.head.config.feature_layers
            states = self.target.read_rows(input_ids, layers, positions, document_ids)
            features, last_hidden = states.features, states.last_hidden
        features = last_hidden if features is None else features
        # The target may be in bf16, the head's weights are not.
        features = features.to(next(self.head.parameters()).dtype)
        return TaughtBatch(input_ids, document_ids, positions, features, last_hidden, slots)

    @property
    def tokens_to_start(self) -> int:
        """How many tokens `start` would best read; 0: a new head of this kind starts as it is."""
        return 0

    def start(self, batches: Iterable[dict[str, torch.Tensor]], sum_over: SumOver) -> None:
        """Fit in a new head what needs no steps; the batches are those of `forward`."""

    def count_slots(self, loss_mask: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The number of slots that each training-time-test step supervises, `[J]`."""
        slots = SupervisedSlots.of(loss_mask, document_positions(loss_mask, document_ids))
        return slots.valid(self.num_steps).sum(0)

    def pop_metrics(self, training: bool, sum_over: SumOver = lambda sums: sums) -> dict[str, float]:
        """Means over the training or evaluation slots since the last call: loss, each step's figures, tau_sim."""
        sums, self._sums[training] = self._sums[training], {}
        if not sums:
            return {}
        totals = sum_over(torch.stack(list(sums.values()))).tolist()
        metrics = {name: total / max(count, 1) for name, (total, count) in zip(sums, totals, strict=True)}
        loss, product, tau = 0.0, 1.0, 1.0
        for step, weight in enumerate(self._decay(torch.device("cpu")).tolist()):
            of_tokens, of_features = metrics.get(f"loss_{step}", 0.0), metrics.get(f"regression_{step}", 0.0)
            loss += weight * (self.token_weight * of_tokens + of_features)
            product *= metrics[f"accuracy_{step}"]
            tau += product
        return metrics | {"loss": loss, "tau_sim": tau}

    def _run_steps(self, batch: TaughtBatch) -> torch.Tensor:
        """What the output head reads at each step, at the slots that predict the teacher's: `[U, J, D]`."""
        raise NotImplementedError

    def _loss(
        self, outputs: torch.Tensor, last_hidden: torch.Tensor, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of the losses of `outputs [U, J, D]`, taught by the target's `last_hidden [U, D]`."""
        teacher = Teacher(last_hidden, self._teacher_head.ready())
        if self._draft_ids is not None:
            best, log_total = summarize(last_hidden, self._target_head)
            teacher = replace(teacher, log_total=log_total, best=self._draft_ids[best])
        loss, sums = self._token_loss(outputs, teacher, valid, step_weights)
        figures = {"loss": sums.loss, "accuracy": sums.hits, "acceptance_rate": sums.acceptance}
        self._add(figures, valid.sum(0))
        return self.token_weight * loss

    def _token_loss(
        self, outputs: torch.Tensor, teacher: Teacher, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> tuple[torch.Tensor, StepSums]:
        """As `fused_loss` gives it; by default all steps have one output head."""
        return fused_loss(outputs, self.output_head, teacher, valid, step_weights, self._slot_loss)

    @property
    def output_head(self) -> OutputHead:
        """What makes logits of the head's outputs."""
        return self._target_head

    @property
    def output_matrices(self) -> list[torch.Tensor]:
        """The head's own matrices that make logits; none where it has its target's."""
        return []

    @property
    def num_steps(self) -> int:
        """J, how many tokens the head predicts from one slot."""
        raise NotImplementedError

    @property
    def token_weight(self) -> float:
        """The weight of the token losses beside a kind's other losses."""
        return 1.0

    def _decay(self, device: torch.device) -> torch.Tensor:
        """`decay^j` of each step, `[J]` (float64)."""
        return self.stage.ttt_decay ** torch.arange(self.num_steps, dtype=torch.float64, device=device)

    def _add(self, figures: dict[str, torch.Tensor], num_slots: torch.Tensor) -> None:
        """Add each step's sums `[J]` over its slots; they stay on the device, so that no step waits for them."""
        sums = self._sums[self.training]
        for name, totals in figures.items():
            for step, new in enumerate(torch.stack((totals.detach().double(), num_slots.double()), dim=1)):
                key = f"{name}_{step}"
                sums[key] = sums[key] + new if key in sums else new
