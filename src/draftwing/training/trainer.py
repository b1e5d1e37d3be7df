"""The transformers Trainer with our recipe's settings: checkpoints, resume, schedule, logging, progress bar."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from draftwing.config import TrainConfig


class ResumableTrainer(Trainer):
    """A Trainer that knows where it left off."""

    def last_checkpoint(self) -> str | None:
        """The folder of the newest checkpoint of this run, None on a first start."""
        folder = Path(str(self.args.output_dir))
        return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def new_trainer(
    config: TrainConfig,
    model: nn.Module,
    train_dataset: Sequence[Any],
    eval_dataset: Sequence[Any],
    data_collator: Callable[[list[Any]], Any] | None = None,
    trainer_class: type[ResumableTrainer] = ResumableTrainer,
) -> ResumableTrainer:
    """A Trainer over `model` (its forward returns a mapping with `loss`) with checkpoints under `config.output`."""
    arguments = TrainingArguments(
        output_dir=str(Path(config.output) / "checkpoints"),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        torch_compile=config.compile,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=config.log_every,
        eval_strategy="steps",
        eval_steps=config.evaluate_every,
        save_steps=config.save_every,
        save_total_limit=2,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    return trainer_class(
        model=model,
        args=arguments,
        train_dataset=train_dataset,  # type: ignore[arg-type]
        eval_dataset=eval_dataset,  # type: ignore[arg-type]
        data_collator=data_collator,
    )
