"""What Medusa's heads learn from one batch (Medusa-1, arXiv 2401.10774, section 2.2.1: the target is frozen).

Head k at slot t predicts x_{t+2+k}, as an EAGLE head does at step k. Its teacher is the target's own distribution
there, of which the paper's token is one draw; heads that look further ahead weigh less (`ttt_decay`).
"""

import torch
from torch import nn

from draftwing.config import TrainConfig
from draftwing.drafts.load import load_draft
from draftwing.drafts.medusa.network import MedusaConfig, MedusaModel
from draftwing.target.model import TargetModel
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

    def _run_steps(
        self,
        features: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        document_ids: torch.Tensor | None,
        slots: SupervisedSlots,
    ) -> torch.Tensor:
        flat = features.flatten(0, 1)
        read = (flat.index_select(0, slots.student(step)) for step in range(self._num_steps))
        return torch.stack([blocks_of(head)(x) for head, x in zip(self.heads, read, strict=True)], dim=1)

    def _token_loss(
        self, outputs: torch.Tensor, teacher: Teacher, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> tuple[torch.Tensor, StepSums]:
        losses, sums = [], []
        for step, head in enumerate(self.heads):
            only = slice(step, step + 1)
            output_head = OutputHead(output_of(head).weight)
            loss, figures = fused_loss(
                outputs[:, only], output_head, teacher, valid[:, only], step_weights[only], self._slot_loss
            )
            losses.append(loss)
            sums.append(figures)
        loss_sums, acceptance, hits = (
            torch.cat([getattr(part, name) for part in sums]) for name in ("loss", "acceptance", "hits")
        )
        return torch.stack(losses).sum(), StepSums(loss_sums, acceptance, hits)

    @property
    def heads(self) -> MedusaModel:
        assert isinstance(self.head, MedusaModel)
        return self.head


def blocks_of(head: nn.Module) -> nn.Sequential:
    """A head without its output matrix."""
    assert isinstance(head, nn.Sequential)
    return nn.Sequential(*list(head)[:-1])


def output_of(head: nn.Module) -> nn.Linear:
    assert isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear)
    return head[-1]
