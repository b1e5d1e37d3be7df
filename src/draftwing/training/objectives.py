"""What a head learns from one batch: EAGLE-1's regression, EAGLE-3's training-time test."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from draftwing.config import TrainConfig
from draftwing.models.eagle import EagleModel
from draftwing.models.eagle3 import Eagle3Model
from draftwing.models.target import TargetModel
from draftwing.training.losses import feature_regression, masked_mean, soft_cross_entropy
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
    """A head with its frozen target: `forward(batch)` gives the loss; metrics of each step are summed on the side."""

    def __init__(self, head: EagleModel | Eagle3Model, target: TargetModel, config: TrainConfig) -> None:
        super().__init__()
        self.head = head
        self._target = target  # a TargetModel is no module, so its weights are not saved
        target.model.requires_grad_(False)  # nor trained, though the head shares its embedding or output head
        self._config = config
        # Sums over the batches since they were last read, apart for training and evaluation.
        self._sums: dict[bool, dict[str, float]] = {True: defaultdict(float), False: defaultdict(float)}
        if isinstance(head, Eagle3Model) and head.vocab.target_ids is not None:
            in_vocab = torch.zeros(target.vocab_size, dtype=torch.bool)
            self._in_vocab = in_vocab.index_fill_(0, head.vocab.target_ids, True)
        else:
            self._in_vocab = torch.ones(target.vocab_size, dtype=torch.bool)

    def forward(self, input_ids: torch.Tensor, loss_mask: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        """`input_ids [B, S]` right-padded, `loss_mask [B, S]` -> the batch's `loss`."""
        with torch.no_grad():
            output = self._target.model(input_ids=input_ids, use_cache=False, output_hidden_states=True)
            features = torch.cat([output.hidden_states[layer] for layer in self.head.config.feature_layers], dim=-1)
            features = features.to(self.head.fc.weight.dtype)  # the target may be in bf16, the head's weights are not
        if isinstance(self.head, EagleModel):
            loss = self._regression_loss(self.head, input_ids, loss_mask, features, output.logits)
        else:
            loss = self._ttt_loss(self.head, input_ids, loss_mask, features, output.logits)
        self._add("loss", loss)
        return {"loss": loss}

    def pop_metrics(self, training: bool) -> dict[str, float]:
        """Means over the training or evaluation batches since the last call: loss, each step's figures, tau_sim."""
        sums = self._sums[training]
        count = sums.pop("batches", 1)
        metrics = {name: total / count for name, total in sums.items()}
        product, tau, step = 1.0, 1.0, 0
        while f"accuracy_{step}" in metrics:
            product *= metrics[f"accuracy_{step}"]
            step += 1
            tau += product
        sums.clear()
        return metrics | {"tau_sim": tau}

    def _regression_loss(
        self,
        head: EagleModel,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        features: torch.Tensor,
        logits: torch.Tensor,
    ) -> torch.Tensor:
        """EAGLE-1 (paper, 3.2): smooth-L1 to the next feature, and cross-entropy of the tokens it stands for."""
        config, mask = self._config, draft_mask(loss_mask)
        noise = (torch.rand_like(features) * 2 - 1) * config.feature_noise if self.training else 0.0
        predicted = head(features + noise, shift_left(input_ids, 1), _positions(input_ids), TttAttention())
        draft_logits = head.logits(predicted)
        teacher = shift_left(logits, 1).float().softmax(-1)
        regression = masked_mean(feature_regression(predicted, shift_left(features, 1)), mask)
        cross_entropy = masked_mean(soft_cross_entropy(draft_logits, teacher), mask)
        self._add("regression", regression)
        self._record(0, cross_entropy, draft_logits.argmax(-1), teacher.argmax(-1), mask)
        return regression + config.token_loss_weight * cross_entropy

    def _ttt_loss(
        self,
        head: Eagle3Model,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        features: torch.Tensor,
        logits: torch.Tensor,
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
            loss = masked_mean(soft_cross_entropy(draft_logits, shift_left(teacher, step)), shift_left(mask, step))
            total = total + config.ttt_decay**step * loss
            choice = vocab.to(draft_logits.device).to_target(draft_logits.argmax(-1))
            self._record(step, loss, choice, shift_left(best, step), shift_left(supervised, step))
            hidden = head.feed_back(output)
        return total

    def _record(
        self, step: int, loss: torch.Tensor, choice: torch.Tensor, best: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self._add(f"loss_{step}", loss)
        self._add(f"accuracy_{step}", masked_mean((choice == best).float(), mask))

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[self.training][name] += float(value.detach())
        self._sums[self.training]["batches"] += name == "loss"


def _positions(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
