"""What Medusa's heads learn from one batch (Medusa-1, arXiv 2401.10774, section 2.2.1: the target is frozen).

Head k at slot t predicts x_{t+2+k}, as an EAGLE head does at step k. Its teacher is the target's own distribution
there, of which the paper's token is one draw; heads that look further ahead weigh less (`ttt_decay`).
"""

import torch
from torch import nn

from draftwing.checkpoint.load import load_draft
from draftwing.config import TrainConfig
from draftwing.models.medusa import MedusaConfig, MedusaModel
from draftwing.models.target import TargetModel
from draftwing.training.fused import OutputHead, StepSums, Teacher, fused_loss
from draftwing.training.objectives import HeadTraining
from draftwing.training.slots import SupervisedSlots


def new_medusa(config: TrainConfig, target: TargetModel) -> MedusaModel:
    """Heads for a target that all start from its output matrix, or those of `config.init_from`.

    Raises:
        ValueError: `init_from` holds something else.
    """
    if config.init_from:
        heads = load_draft(config.init_from, target, torch.float32)
        if not isinstance(heads, MedusaModel):
            raise ValueError(f"init_from: {config.init_from} holds no Medusa heads")
        return heads.train()
    heads = MedusaModel(MedusaConfig(target.hidden_size, target.vocab_size, config.medusa_heads))
    heads.start_from(next(target.output_head.parameters()))
    return heads


class MedusaTraining(HeadTraining):
    """HeadTraining for heads that read the target's feature alone and have an output matrix each."""

    def __init__(self, heads: MedusaModel, target: TargetModel, config: TrainConfig) -> None:
        super().__init__(heads, target, config)
        self._heads = (heads,)  # in a tuple, so that the module is not registered twice

    def _run_steps(
        self,
        features: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        document_ids: torch.Tensor | None,
        slots: SupervisedSlots,
    ) -> torch.Tensor:
        flat, (heads,) = features.flatten(0, 1), self._heads
        read = [flat.index_select(0, slots.student(step)) for step in range(len(heads))]
        return torch.stack([blocks_of(head)(x) for head, x in zip(heads, read, strict=True)], dim=1)

    def _token_loss(
        self, outputs: torch.Tensor, teacher: Teacher, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> tuple[torch.Tensor, StepSums]:
        (heads,), config = self._heads, self._config
        losses, sums = [], []
        for step, head in enumerate(heads):
            only = slice(step, step + 1)
            output_head = OutputHead(output_of(head).weight)
            kind = config.loss, config.lk_decay
            of_step = fused_loss(outputs[:, only], output_head, teacher, valid[:, only], step_weights[only], kind)
            losses.append(of_step[0])
            sums.append(of_step[1])
        return torch.stack(losses).sum(), StepSums(
            loss=torch.cat([part.loss for part in sums]),
            acceptance=torch.cat([part.acceptance for part in sums]),
            hits=torch.cat([part.hits for part in sums]),
        )


def blocks_of(head: nn.Module) -> nn.Sequential:
    """A head without its output matrix."""
    assert isinstance(head, nn.Sequential)
    return nn.Sequential(*list(head)[:-1])


def output_of(head: nn.Module) -> nn.Linear:
    assert isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear)
    return head[-1]
