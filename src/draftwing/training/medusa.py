"""What Medusa's heads learn from one batch (Medusa-1, arXiv 2401.10774, section 2.2.1: the target is frozen).

Head k at slot t predicts x_{t+2+k}. Its teacher is the target's own distribution there, of which the paper's token is
one draw; heads that look further ahead weigh less.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from draftwing.checkpoint.load import load_draft
from draftwing.config import TrainConfig
from draftwing.models.medusa import MedusaConfig, MedusaModel
from draftwing.models.target import TargetModel
from draftwing.training.ttt import shift_left


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


class MedusaTraining(nn.Module):
    """Heads with their frozen target: `forward(batch)` gives the loss; each head's figures are summed on the side."""

    def __init__(self, head: MedusaModel, target: TargetModel, config: TrainConfig) -> None:
        super().__init__()
        self.head = head
        self._target = target  # a TargetModel is no module, so its weights are not saved
        target.model.requires_grad_(False)
        self._decay = config.ttt_decay
        # Sums over the batches since they were last read, apart for training and evaluation.
        self._sums: dict[bool, dict[str, float]] = {True: defaultdict(float), False: defaultdict(float)}

    def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        """`input_ids [B, S]` right-padded, `loss_mask [B, S]` -> the batch's `loss`, the sum of decay^k times head k's.

        Slot t trains head k if x_{t+2+k} is the model's to say.
        """
        with torch.no_grad():
            output = self._target.model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
            features = output.hidden_states[-1].to(next(self.head.parameters()).dtype)
        total = torch.zeros((), device=input_ids.device)
        for index, head in enumerate(self.head):
            rows, slots = shift_left(loss_mask, 2 + index).nonzero(as_tuple=True)
            teacher = output.logits[rows, slots + 1 + index].float()
            logits = head(features[rows, slots]).float()
            # The mean over the slots, 0 if there are none.
            loss = functional.cross_entropy(logits, teacher.softmax(-1), reduction="sum") / max(1, len(slots))
            total = total + self._decay**index * loss
            hits = (logits.argmax(-1) == teacher.argmax(-1)).sum() / max(1, len(slots))
            self._add(f"loss_{index}", loss)
            self._add(f"accuracy_{index}", hits)
        self._add("loss", total)
        return {"loss": total}

    def pop_metrics(self, training: bool) -> dict[str, float]:
        """Means over the training or evaluation batches since the last call: loss, each head's figures, tau_sim."""
        sums = self._sums[training]
        count = sums.pop("batches", 1)
        metrics = {name: total / count for name, total in sums.items()}
        product, tau = 1.0, 1.0
        for index in range(len(self.head)):
            product *= metrics.get(f"accuracy_{index}", 0.0)
            tau += product
        sums.clear()
        return metrics | {"tau_sim": tau}

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[self.training][name] += float(value.detach())
        self._sums[self.training]["batches"] += name == "loss"
