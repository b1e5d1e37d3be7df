"""What Medusa's heads learn from one batch (Medusa-1, arXiv 2401.10774, section 2.2.1: the target is frozen).

Head k at slot t predicts x_{t+2+k}, as an EAGLE head does at step k. Its teacher is the target's own distribution
there, of which the paper's token is one draw; heads that look further ahead weigh less (`ttt_decay`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftwing.config import MedusaStage, TrainConfig
from draftwing.data.chat_template import Example
from draftwing.drafts.fit import Tensors
from draftwing.drafts.head_loss import HeadLoss, TaughtBatch
from draftwing.drafts.medusa.files import MedusaHeads, expected_medusa_shapes, save_medusa
from draftwing.drafts.medusa.network import MedusaConfig, MedusaModel, ResBlock
from draftwing.drafts.objective import SAVED_DTYPE, HeadCosts, HeadSizes, Objective, head_to_continue
from draftwing.losses.fused_head import OutputHead, StepSums, Teacher, fused_loss
from draftwing.target.model import TargetModel


class MedusaTraining(HeadLoss):
    """HeadLoss for heads that read the target's feature alone and have an output matrix each."""

    head: MedusaModel
    compiled_layers = (ResBlock,)

    @property
    def num_steps(self) -> int:
        return len(self.head)

    @property
    def output_matrices(self) -> list[torch.Tensor]:
        return self.head.output_matrices

    def _run_steps(self, batch: TaughtBatch) -> torch.Tensor:
        flat = batch.features.flatten(0, 1)
        outputs = []
        for step, head in enumerate(self.head):
            assert isinstance(head, nn.Sequential)
            outputs.append(head[:-1](flat.index_select(0, batch.slots.student(step))))
        return torch.stack(outputs, dim=1)

    def _token_loss(
        self, outputs: torch.Tensor, teacher: Teacher, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> tuple[torch.Tensor, StepSums]:
        losses, sums = [], []
        for step, matrix in enumerate(self.output_matrices):
            only = slice(step, step + 1)
            loss, figures = fused_loss(
                outputs[:, only], OutputHead(matrix), teacher, valid[:, only], step_weights[only], self._slot_loss
            )
            losses.append(loss)
            sums.append(vars(figures).values())
        return torch.stack(losses).sum(), StepSums(*map(torch.cat, zip(*sums, strict=True)))


class MedusaObjective(Objective):
    """`medusa` of a recipe."""

    def check(self, stage: TrainConfig, target_config: Any) -> None:
        if stage.architecture:
            raise ValueError("architecture: Medusa heads have none; medusa_heads says how many there are")

    trainer = MedusaTraining

    def make(self, stage: TrainConfig, target: TargetModel, train: Sequence[Example]) -> MedusaModel:
        return head_to_continue(stage, target) if stage.init_from else new_medusa(stage, target)

    def like(self, head: MedusaModel, target: TargetModel) -> MedusaModel:
        return MedusaModel(head.config)

    def save(self, head: MedusaModel, tensors: Tensors, folder: Path, target: TargetModel, target_name: str) -> None:
        save_medusa(MedusaHeads(head.config, tensors), folder, target_name, SAVED_DTYPE)

    def sizes(self, stage: TrainConfig, target_config: Any, made_before: Mapping[str, HeadSizes]) -> HeadSizes:
        self.check(stage, target_config)
        config = MedusaConfig(target_config.hidden_size, target_config.vocab_size, stage.medusa_heads)
        return HeadSizes({name: shape.numel() for name, shape in expected_medusa_shapes(config).items()}, config)

    def costs(self, stage: TrainConfig, target_config: Any, sizes: HeadSizes) -> HeadCosts:
        hidden_size, vocab_size = target_config.hidden_size, target_config.vocab_size
        return HeadCosts(
            frozen=0,
            kept=stage.medusa_heads * 4 * hidden_size,
            kept_wide=0,
            logits=vocab_size,  # of one head after the other
            output_gradient=vocab_size * hidden_size,
            teacher_rows=0,
            flops=6.0 * sizes.num_elements,
        )


def new_medusa(stage: MedusaStage, target: TargetModel) -> MedusaModel:
    """Heads for a target that all start from its output matrix."""
    heads = MedusaModel(MedusaConfig(target.hidden_size, target.vocab_size, stage.medusa_heads))
    heads.start_from(next(target.output_head.parameters()))
    return heads
