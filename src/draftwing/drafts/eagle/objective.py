"""What EAGLE heads learn: the tokens, and for EAGLE-1 the features, of training-time-test steps.

losses/ttt.py says what a step reads and predicts.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftwing.config import Eagle1Stage, Eagle3Stage, EagleStage, TrainConfig
from draftwing.data.chat_template import Example
from draftwing.drafts.eagle.eagle1 import EagleModel
from draftwing.drafts.eagle.eagle3 import Eagle3Layer, Eagle3Model
from draftwing.drafts.eagle.formats import HeadFormat
from draftwing.drafts.eagle.load_head import DraftNetwork, build_network, network_shapes
from draftwing.drafts.eagle.new_head import (
    continued_eagle1,
    continued_eagle3,
    continued_sizes,
    eagle1_config,
    eagle3_config,
    new_eagle1,
    new_eagle3,
    read_sizes,
)
from draftwing.drafts.eagle.save_head import save_head, to_head
from draftwing.drafts.fit import Tensors, sizes_of
from draftwing.drafts.head_loss import HeadLoss
from draftwing.drafts.objective import SAVED_DTYPE, HeadCosts, HeadSizes, Objective
from draftwing.layers import DecoderLayer, DraftConfig
from draftwing.losses.fused_head import OutputHead, StepSums, Teacher, fused_loss
from draftwing.losses.slot_losses import feature_regression
from draftwing.losses.slots import SupervisedSlots
from draftwing.losses.ttt import TttAttention, shift_left
from draftwing.target.model import TargetModel


class EagleTraining(HeadLoss):
    """HeadLoss for heads that read a feature and the next token, and later their own outputs."""

    head: DraftNetwork
    compiled_layers = (Eagle3Layer, DecoderLayer)

    def _run_steps(
        self,
        features: torch.Tensor,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        document_ids: torch.Tensor | None,
        slots: SupervisedSlots,
    ) -> torch.Tensor:
        head = self.head
        head.rotary.reserve(input_ids.shape[1] + self.num_steps)
        hidden, attend, outputs = head.project(features), TttAttention(document_ids), []
        for step in range(self.num_steps):
            output = head(hidden, shift_left(input_ids, 1 + step), positions + step, attend)
            outputs.append(head.readout(output.flatten(0, 1).index_select(0, slots.student(step))))
            hidden = head.feed_back(output)
        return torch.stack(outputs, dim=1)

    def _token_loss(
        self, outputs: torch.Tensor, teacher: Teacher, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> tuple[torch.Tensor, StepSums]:
        return fused_loss(outputs, self.output_head, teacher, valid, step_weights, self._slot_loss)

    @property
    def output_head(self) -> OutputHead:
        """What makes logits of the head's outputs."""
        return self._target_head


class Eagle1Training(EagleTraining):
    """The next features are learnt too, from noisy ones (EAGLE paper, 3.2)."""

    head: EagleModel
    stage: Eagle1Stage

    @property
    def num_steps(self) -> int:
        return self.stage.feature_steps

    @property
    def token_weight(self) -> float:
        return self.stage.token_loss_weight

    def _run_steps(self, features: torch.Tensor, *batch: Any) -> torch.Tensor:
        if self.training:
            features = features + (torch.rand_like(features) * 2 - 1) * self.stage.feature_noise
        return super()._run_steps(features, *batch)

    def _loss(
        self, outputs: torch.Tensor, last_hidden: torch.Tensor, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> torch.Tensor:
        loss = super()._loss(outputs, last_hidden, valid, step_weights)
        regression = (feature_regression(outputs, last_hidden[:, None]) * valid).sum(0)
        self._add({"regression": regression}, valid.sum(0))
        return loss + (regression * step_weights).sum()


class Eagle3Training(EagleTraining):
    """The tokens alone are learnt, with the head's own output matrix if it has one."""

    head: Eagle3Model
    stage: Eagle3Stage

    @property
    def num_steps(self) -> int:
        return self.stage.ttt_steps

    @property
    def output_head(self) -> OutputHead:
        return OutputHead(self.head.lm_head.weight) if self.head.config.own_lm_head else self._target_head


class EagleObjective(Objective):
    """What both kinds have in common."""

    format: HeadFormat

    @abstractmethod
    def new_config(self, stage: TrainConfig, target_config: Any, vocab_size: int) -> DraftConfig:
        """The configuration of a new head."""

    @abstractmethod
    def num_steps(self, stage: TrainConfig) -> int:
        """Training-time-test steps."""

    def check(self, stage: TrainConfig, target_config: Any) -> None:
        if not stage.init_from:
            self.new_config(stage, target_config, target_config.vocab_size)

    def like(self, head: DraftNetwork, target: TargetModel) -> nn.Module:
        return build_network(head.config, target, head.vocab.target_ids, own_embedding=hasattr(head, "embed_tokens"))

    def save(self, head: DraftNetwork, tensors: Tensors, folder: Path, target: TargetModel, target_name: str) -> None:
        written = dataclasses.replace(to_head(head, self.format), tensors=tensors)
        save_head(written, folder, sizes_of(target), dtype=SAVED_DTYPE)

    def sizes(self, stage: TrainConfig, target_config: Any, made_before: Mapping[str, HeadSizes]) -> HeadSizes:
        if stage.init_from:
            made = made_before.get(stage.init_from)
            return made if made and isinstance(made.config, DraftConfig) else read_sizes(stage.init_from)
        config = self.new_config(stage, target_config, target_config.vocab_size)
        return HeadSizes({name: shape.numel() for name, shape in network_shapes(config).items()}, config)

    def costs(self, stage: TrainConfig, target_config: Any, sizes: HeadSizes) -> HeadCosts:
        return _costs(stage, target_config, sizes, self.num_steps(stage))


class Eagle1Objective(EagleObjective):
    """`eagle1` of a recipe."""

    format = "eagle1"

    def new_config(self, stage: TrainConfig, target_config: Any, vocab_size: int) -> DraftConfig:
        return eagle1_config(stage, target_config, vocab_size)

    def num_steps(self, stage: TrainConfig) -> int:
        return stage.feature_steps

    def make(self, stage: TrainConfig, target: TargetModel, train: Sequence[Example]) -> EagleModel:
        return continued_eagle1(stage, target) if stage.init_from else new_eagle1(stage, target)

    def training(self, head: EagleModel, target: TargetModel, stage: TrainConfig) -> Eagle1Training:
        return Eagle1Training(head, target, stage)


class Eagle3Objective(EagleObjective):
    """`eagle3` of a recipe."""

    format = "eagle3"

    def new_config(self, stage: TrainConfig, target_config: Any, vocab_size: int) -> DraftConfig:
        return eagle3_config(stage, target_config, vocab_size)

    def num_steps(self, stage: TrainConfig) -> int:
        return stage.ttt_steps

    def make(self, stage: TrainConfig, target: TargetModel, train: Sequence[Example]) -> Eagle3Model:
        return (continued_eagle3 if stage.init_from else new_eagle3)(stage, target, train)

    def training(self, head: Eagle3Model, target: TargetModel, stage: TrainConfig) -> Eagle3Training:
        return Eagle3Training(head, target, stage)

    def sizes(self, stage: TrainConfig, target_config: Any, made_before: Mapping[str, HeadSizes]) -> HeadSizes:
        sizes = super().sizes(stage, target_config, made_before)
        return continued_sizes(sizes, stage) if stage.init_from else sizes


def _costs(stage: EagleStage, target_config: Any, sizes: HeadSizes, num_steps: int) -> HeadCosts:
    """As `Objective.costs`.

    A step of the head keeps for its backward pass, uncompiled: what attention and the MLP read, queries, keys,
    values, attention's output before and behind the merger, and four widths of the MLP. In float32 it keeps
    what the norms read, the residuals, what the output head reads and its gradient.
    """
    head, config = sizes.shapes, sizes.config
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    embedding, fusion = head.get("embed_tokens.weight", 0), head.get("fc.weight", 0)
    in_steps = sizes.num_elements - embedding - fusion  # the embedding is no product, the fusion is not repeated
    is_subset = config.draft_vocab_size < config.vocab_size
    return HeadCosts(
        frozen=0 if stage.train_embedding else embedding,
        kept=num_steps * (3 * config.hidden_size + 3 * queries + 2 * keys + 4 * config.intermediate_size),
        kept_wide=num_steps * 7 * config.hidden_size,
        logits=num_steps * config.draft_vocab_size,
        output_gradient=head.get("lm_head.weight", 0),
        teacher_rows=config.draft_vocab_size * target_config.hidden_size if is_subset else 0,
        flops=6.0 * (fusion + num_steps * in_steps) + 6.0 * stage.sequence_length * queries,
    )
