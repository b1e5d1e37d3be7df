"""What training asks of a kind of head: an `Objective` for each objective that trains one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftwing.config import TrainConfig
from draftwing.data.chat_template import Example
from draftwing.drafts.eagle.formats import FROM_FILE, HeadOptions
from draftwing.drafts.family import Draft
from draftwing.drafts.fit import Tensors
from draftwing.drafts.head_loss import HeadLoss
from draftwing.drafts.kinds import family_of_draft
from draftwing.drafts.load_draft import load_draft
from draftwing.target.model import TargetModel

SAVED_DTYPE = torch.bfloat16
"""Of the weights in the files that training writes."""


@dataclass(frozen=True)
class HeadSizes:
    """A head that is planned.

    Attributes:
        shapes: number of elements by parameter name.
        config: the family's own configuration, which has `feature_layers`.
    """

    shapes: Mapping[str, int]
    config: Any

    @property
    def num_elements(self) -> int:
        return sum(self.shapes.values())


@dataclass(frozen=True)
class HeadCosts:
    """What training a head takes beside its target and its weights, in numbers, not in bytes.

    Attributes:
        frozen: weights that are not trained.
        kept: numbers that one token leaves for the backward pass, in the dtype of products.
        kept_wide: the same, in float32.
        logits: draft logits of one token that exist at a time.
        output_gradient: elements of the output matrix whose gradient is summed in float32.
        teacher_rows: elements of a copy of the target's output matrix, in the dtype of products.
        flops: operations of the head's two passes for one token.
    """

    frozen: int
    kept: int
    kept_wide: int
    logits: int
    output_gradient: int
    teacher_rows: int
    flops: float


class Objective(ABC):
    """How one kind of head is made, taught, kept and planned. It keeps no state."""

    trainer: type[HeadLoss]

    @abstractmethod
    def check(self, stage: TrainConfig, target_config: Any) -> None:
        """Find a recipe's mistakes before anything large is read.

        Raises:
            ValueError: the recipe asks for what a target with this text configuration does not have.
        """

    @abstractmethod
    def make(self, stage: TrainConfig, target: TargetModel, train: Sequence[Example]) -> nn.Module:
        """A new head to train, or that of `init_from` to continue. It will learn from the rows `train`.

        Raises:
            ValueError: `init_from` holds a head of another kind, or one that does not fit.
        """

    def training(self, head: Any, target: TargetModel, stage: TrainConfig) -> HeadLoss:
        """The module that learns."""
        return self.trainer(head, target, stage)

    @abstractmethod
    def like(self, head: Any, target: TargetModel) -> nn.Module:
        """A network of the head's shape, to be filled with its weights."""

    @abstractmethod
    def save(self, head: Any, tensors: Tensors, folder: Path, target: TargetModel, target_name: str) -> None:
        """Write a head, with `tensors` as its weights, in its published format in bfloat16."""

    @abstractmethod
    def sizes(self, stage: TrainConfig, target_config: Any, made_before: Mapping[str, HeadSizes]) -> HeadSizes:
        """The head that a stage would train, from configurations alone.

        `made_before` has the heads of earlier stages by their `output`, of any kind.
        """

    @abstractmethod
    def costs(self, stage: TrainConfig, target_config: Any, sizes: HeadSizes) -> HeadCosts:
        """What training it would take."""


def head_to_continue(stage: TrainConfig, target: TargetModel, options: HeadOptions = FROM_FILE) -> Draft:
    """The head of `init_from`, to train further.

    Raises:
        ValueError: it is of a kind that the objective does not train, or does not fit the target.
    """
    head = load_draft(stage.init_from, target, torch.float32, options)
    family = family_of_draft(head)
    if stage.objective not in family.objectives:
        raise ValueError(f"init_from: {stage.init_from} holds {family.name}, the objective is {stage.objective}")
    return head.train()
