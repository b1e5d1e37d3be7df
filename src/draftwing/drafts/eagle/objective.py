"""What EAGLE heads learn: the tokens, and for EAGLE-1 the features, of training-time-test steps.

losses/ttt.py says what a step reads and predicts.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from draftwing.config import Eagle1Stage, TrainConfig
from draftwing.data.chat_template import Example
from draftwing.drafts.eagle.build_head import build_network, network_shapes
from draftwing.drafts.eagle.formats import HeadFormat
from draftwing.drafts.eagle.network import DraftNetwork, Eagle3Layer, Eagle3Model, EagleModel
from draftwing.drafts.eagle.new_head import continued_head, continued_sizes, new_config, new_head
from draftwing.drafts.eagle.save_head import save_head, to_head
from draftwing.drafts.fit import Tensors, sizes_of
from draftwing.drafts.head_loss import HeadLoss, SumOver, TaughtBatch
from draftwing.drafts.objective import SAVED_DTYPE, HeadCosts, HeadSizes, Objective
from draftwing.layers import DecoderLayer, DraftConfig
from draftwing.losses.fused_head import OutputHead
from draftwing.losses.slot_losses import feature_regression
from draftwing.losses.ttt import TttAttention, shift_left
from draftwing.target.model import TargetModel


class EagleTraining(HeadLoss):
    """HeadLoss for heads that read a feature and the next token, and later their own outputs."""

    head: DraftNetwork
    steps_key: str
    """The key of a recipe that says how many training-time-test steps there are."""
    compiled_layers = (Eagle3Layer, DecoderLayer)

    @property
    def num_steps(self) -> int:
        return int(getattr(self.stage, self.steps_key))

    def _run_steps(self, batch: TaughtBatch) -> torch.Tensor:
        head = self.head
        head.rotary.reserve(batch.input_ids.shape[1] + self.num_steps)
        hidden, attend, outputs = head.project(batch.features), TttAttention(batch.document_ids), []
        for step in range(self.num_steps):
            output = head(hidden, shift_left(batch.input_ids, 1 + step), batch.positions + step, attend)
            outputs.append(head.readout(output.flatten(0, 1).index_select(0, batch.slots.student(step))))
            hidden = head.feed_back(output)
        return torch.stack(outputs, dim=1)


TOKENS_PER_INPUT = 64
"""Tokens that the first fit is made from, for each number that `fc` reads."""
RIDGE = 1e-5
"""Share of each input's mean square that is added to it, so that a fit exists however few pairs there are."""


class Eagle1Training(EagleTraining):
    """The next features are learnt too, from noisy ones (EAGLE paper, 3.2)."""

    head: EagleModel
    stage: Eagle1Stage
    steps_key = "feature_steps"

    @property
    def tokens_to_start(self) -> int:
        return TOKENS_PER_INPUT * self.head.fc.in_features

    @torch.no_grad()
    def start(self, batches: Iterable[dict[str, torch.Tensor]], sum_over: SumOver) -> None:
        """Make the head the linear map that estimates the next feature best."""
        self.head.start_from(linear_fit(map(self._linear_pairs, batches), sum_over).T)

    def _linear_pairs(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """What `fc` reads at supervised slots, `[U, 2 * D]`, and the features to estimate from it, `[U, D]`."""
        taught = self.read(**batch)
        inputs = self.head.fc_inputs(taught.features, shift_left(taught.input_ids, 1)).flatten(0, 1)
        return inputs[taught.slots.student(0)], taught.last_hidden.flatten(0, 1)[taught.slots.teacher]

    @property
    def token_weight(self) -> float:
        return self.stage.token_loss_weight

    def _run_steps(self, batch: TaughtBatch) -> torch.Tensor:
        if self.training:
            noise = (torch.rand_like(batch.features) * 2 - 1) * self.stage.feature_noise
            batch = batch._replace(features=batch.features + noise)
        return super()._run_steps(batch)

    def _loss(
        self, outputs: torch.Tensor, last_hidden: torch.Tensor, valid: torch.Tensor, step_weights: torch.Tensor
    ) -> torch.Tensor:
        loss = super()._loss(outputs, last_hidden, valid, step_weights)
        regression = (feature_regression(outputs, last_hidden[:, None]) * valid).sum(0)
        self._add({"regression": regression}, valid.sum(0))
        return loss + (regression * step_weights).sum()


def linear_fit(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], sum_over: SumOver) -> torch.Tensor:
    """The W `[F, D]` (float64) with which `inputs @ W` comes closest to `outputs`, by squared error.

    An input that is always 0 has weights of 0.

    Args:
        pairs: `inputs [U, F]` and `outputs [U, D]`, batch by batch.
        sum_over: sums over the processes that have pairs.
    """
    of_inputs: torch.Tensor | float = 0.0
    of_both: torch.Tensor | float = 0.0
    for inputs, outputs in pairs:
        inputs, outputs = inputs.double(), outputs.double()
        of_inputs += inputs.T @ inputs
        of_both += inputs.T @ outputs
    assert isinstance(of_inputs, torch.Tensor) and isinstance(of_both, torch.Tensor)
    of_inputs, of_both = sum_over(of_inputs), sum_over(of_both)
    ridge = RIDGE * of_inputs.diagonal()
    weights: torch.Tensor = torch.linalg.solve(of_inputs + torch.where(ridge > 0, ridge, 1.0).diag(), of_both)
    return weights


class Eagle3Training(EagleTraining):
    """The tokens alone are learnt, with the head's own output matrix if it has one."""

    head: Eagle3Model
    steps_key = "ttt_steps"

    @property
    def output_head(self) -> OutputHead:
        return OutputHead(self.output_matrices[0]) if self.output_matrices else self._target_head

    @property
    def output_matrices(self) -> list[torch.Tensor]:
        return [self.head.lm_head.weight] if self.head.config.own_lm_head else []


class EagleObjective(Objective):
    """What both kinds have in common; a head's `trainer` and published `format` are its kind's."""

    format: HeadFormat
    trainer: type[EagleTraining]

    def check(self, stage: TrainConfig, target_config: Any) -> None:
        if not stage.init_from:
            new_config(stage, target_config, target_config.vocab_size)

    def make(self, stage: TrainConfig, target: TargetModel, train: Sequence[Example]) -> DraftNetwork:
        return (continued_head if stage.init_from else new_head)(stage, target, train)

    def like(self, head: DraftNetwork, target: TargetModel) -> DraftNetwork:
        return build_network(head.config, target, head.vocab.target_ids, own_embedding=hasattr(head, "embed_tokens"))

    def save(self, head: DraftNetwork, tensors: Tensors, folder: Path, target: TargetModel, target_name: str) -> None:
        written = dataclasses.replace(to_head(head, self.format), tensors=tensors)
        save_head(written, folder, sizes_of(target), dtype=SAVED_DTYPE)

    def sizes(self, stage: TrainConfig, target_config: Any, made_before: Mapping[str, HeadSizes]) -> HeadSizes:
        if stage.init_from:
            made = made_before.get(stage.init_from)
            return continued_sizes(stage, made if made and isinstance(made.config, DraftConfig) else None)
        config = new_config(stage, target_config, target_config.vocab_size)
        shapes = network_shapes(config, own_embedding=stage.train_embedding)
        return HeadSizes({name: shape.numel() for name, shape in shapes.items()}, config)

    def costs(self, stage: TrainConfig, target_config: Any, sizes: HeadSizes) -> HeadCosts:
        """What training a head would take.

        A step of the head keeps for its backward pass, uncompiled: what attention and the MLP read, queries, keys,
        values, attention's output before and behind the merger, and four widths of the MLP. In float32 it keeps
        what the norms read, the residuals, what the output head reads and its gradient.
        """
        head, config, num_steps = sizes.shapes, sizes.config, getattr(stage, self.trainer.steps_key)
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


class Eagle1Objective(EagleObjective):
    """`eagle1` of a recipe."""

    format = "eagle1"
    trainer = Eagle1Training


class Eagle3Objective(EagleObjective):
    """`eagle3` of a recipe."""

    format = "eagle3"
    trainer = Eagle3Training
