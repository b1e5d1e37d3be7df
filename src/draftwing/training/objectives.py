"""What a head learns from one batch: EAGLE-1's regression, EAGLE-3's training-time test."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from draftwing.config import TrainConfig
from draftwing.models.eagle import EagleModel
from draftwing.models.eagle3 import Eagle3Model
from draftwing.models.target import TargetModel
from draftwing.training.losses import feature_regression, soft_cross_entropy
from draftwing.training.ttt import TttAttention, shift_left


def draft_mask(loss_mask: torch.Tensor) -> torch.Tensor:
    """The slots to supervise: `[B, S]` over tokens -> `[B, S]` over slots.

    Slot t has read x_{t+1} and predicts x_{t+2}, so it is supervised if x_{t+2} exists and is the model's to say. The
    first such slot is the last prompt position but one: inference drafts from it too.

        tokens   <user> hi <assistant> yes sir <end> (padding)
        mask       0     0      0       1   1    1      0
        slots      0     1      1       1   0    0      0
    """
    return shift_left(loss_mask, 2)


class HeadTraining(nn.Module):
    """A head with its frozen target: `forward(batch)` gives the loss; metrics of each step are summed on the side.

    A step's loss is a mean over the slots that it supervises. Their number follows from the loss mask alone, so it can
    be summed over processes and accumulated batches before the first of them runs (`count_slots`).
    """

    def __init__(self, head: EagleModel | Eagle3Model, target: TargetModel, config: TrainConfig) -> None:
        super().__init__()
        self.head = head
        self.target = target  # a TargetModel is no module, so its weights are not saved
        target.model.requires_grad_(False)  # nor trained, though the head shares its embedding or output head
        self._config = config
        # (Sum, count) of each figure since they were last read, apart for training and evaluation.
        self._sums: dict[bool, dict[str, torch.Tensor]] = {True: {}, False: {}}
        if isinstance(head, Eagle3Model) and head.vocab.target_ids is not None:
            in_vocab = torch.zeros(target.vocab_size, dtype=torch.bool)
            self._in_vocab = in_vocab.index_fill_(0, head.vocab.target_ids, True)
        else:
            self._in_vocab = torch.ones(target.vocab_size, dtype=torch.bool)

    def forward(
        self, input_ids: torch.Tensor, loss_mask: torch.Tensor, num_items_in_batch: torch.Tensor | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """`input_ids [B, S]` right-padded, `loss_mask [B, S]` -> the batch's `loss`.

        `num_items_in_batch [J]` (the Trainer's name): the slots of all batches whose gradients are summed; default: of
        this batch alone.
        """
        with torch.no_grad():
            output = self.target.model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
            features = torch.cat([output.hidden_states[layer] for layer in self.head.config.feature_layers], dim=-1)
            features = features.to(self.head.fc.weight.dtype)  # the target may be in bf16, the head's weights are not
        num_slots = self.count_slots(loss_mask) if num_items_in_batch is None else num_items_in_batch
        num_slots = num_slots.clamp(min=1)
        if isinstance(self.head, EagleModel):
            loss = self._regression_loss(self.head, input_ids, loss_mask, features, output.logits, num_slots)
        else:
            loss = self._ttt_loss(self.head, input_ids, loss_mask, features, output.logits, num_slots)
        return {"loss": loss}

    def count_slots(self, loss_mask: torch.Tensor) -> torch.Tensor:
        """The number of slots that each training-time-test step supervises, `[J]`."""
        mask = draft_mask(loss_mask)
        num_steps = 1 if isinstance(self.head, EagleModel) else self._config.ttt_steps
        return torch.stack([shift_left(mask, step).sum() for step in range(num_steps)])

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
        decay, num_steps = self._config.ttt_decay, sum(name.startswith("accuracy_") for name in metrics)
        if "regression" in metrics:
            metrics["loss"] = metrics["regression"] + self._config.token_loss_weight * metrics["loss_0"]
        else:
            metrics["loss"] = sum(decay**step * metrics.get(f"loss_{step}", 0.0) for step in range(num_steps))
        product, tau = 1.0, 1.0
        for step in range(num_steps):
            product *= metrics[f"accuracy_{step}"]
            tau += product
        return metrics | {"tau_sim": tau}

    def _regression_loss(
        self,
        head: EagleModel,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        features: torch.Tensor,
        logits: torch.Tensor,
        num_slots: torch.Tensor,
    ) -> torch.Tensor:
        """EAGLE-1 (paper, 3.2): smooth-L1 to the next feature, and cross-entropy of the tokens it stands for."""
        config, mask = self._config, draft_mask(loss_mask)
        noise = (torch.rand_like(features) * 2 - 1) * config.feature_noise if self.training else 0.0
        predicted = head(features + noise, shift_left(input_ids, 1), _positions(input_ids), TttAttention())
        draft_logits = head.logits(predicted)
        teacher = shift_left(logits, 1).float().softmax(-1)
        regression = (feature_regression(predicted, shift_left(features, 1)) * mask).sum()
        cross_entropy = (soft_cross_entropy(draft_logits, teacher) * mask).sum()
        self._add("regression", regression, mask)
        self._record(0, cross_entropy, draft_logits.argmax(-1), teacher.argmax(-1), mask)
        return (regression + config.token_loss_weight * cross_entropy) / num_slots[0]

    def _ttt_loss(
        self,
        head: Eagle3Model,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        features: torch.Tensor,
        logits: torch.Tensor,
        num_slots: torch.Tensor,
    ) -> torch.Tensor:
        """EAGLE-3 (paper, 3.2): the sum of decay^j times step j's cross-entropy over the draft vocabulary."""
        config, vocab = self._config, head.vocab
        # Computed once; step j reads these shifted by j more.
        best = shift_left(logits.argmax(-1), 1)
        in_draft_vocab = self._in_vocab.to(best.device)[best]
        teacher_logits = logits if vocab.target_ids is None else logits[..., vocab.target_ids.to(logits.device)]
        teacher = shift_left(teacher_logits, 1).float().softmax(-1)
        supervised = draft_mask(loss_mask)
        mask = supervised & in_draft_vocab
        hidden, attend = head.fuse(features), TttAttention()
        total = torch.zeros((), device=input_ids.device)
        for step in range(config.ttt_steps):
            tokens = shift_left(input_ids, 1 + step)
            output = head(hidden, tokens, _positions(input_ids) + step, attend)
            draft_logits = head.logits(output)
            cross_entropy = soft_cross_entropy(draft_logits, shift_left(teacher, step))
            loss = (cross_entropy * shift_left(mask, step)).sum()
            total = total + config.ttt_decay**step * loss / num_slots[step]
            choice = vocab.to(draft_logits.device).to_target(draft_logits.argmax(-1))
            self._record(step, loss, choice, shift_left(best, step), shift_left(supervised, step))
            hidden = head.feed_back(output)
        return total

    def _record(
        self, step: int, loss: torch.Tensor, choice: torch.Tensor, best: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self._add(f"loss_{step}", loss, mask)
        self._add(f"accuracy_{step}", ((choice == best) * mask).sum(), mask)

    def _add(self, name: str, total: torch.Tensor, mask: torch.Tensor) -> None:
        """Add to a figure's sum over the slots of `mask`; it stays on the device, so that no step waits for it."""
        new = torch.stack((total.detach().double(), mask.sum().double()))
        sums = self._sums[self.training]
        sums[name] = sums[name] + new if name in sums else new


def _positions(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
