"""The transformers Trainer with our recipe's settings: checkpoints, resume, schedule, logging, progress bar."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from draftwing.config import TrainConfig


class ResumableTrainer(Trainer):
    """A Trainer that knows where it left off."""

    def last_checkpoint(self) -> str | None:
        """The folder of the newest checkpoint of this run, None on a first start."""
        folder = Path(str(self.args.output_dir))
        return get_last_checkpoint(str(folder)) if folder.is_dir() else None


DULL = ("runtime", "per_second", "total_flos", "epoch")
"""Endings of the Trainer's log entries that the display leaves out."""


class ProgressDisplay(TrainerCallback):
    """A progress bar with the latest figures, and each log line above it; all on stderr."""

    def __init__(self) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
        self._task = self._progress.add_task("training")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        figures = " ".join(f"{name} {value:.4g}" for name, value in (logs or {}).items() if not name.endswith(DULL))
        self._progress.console.print(f"step {state.global_step}: {figures}", highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.stop()


def new_trainer(
    config: TrainConfig,
    model: nn.Module,
    train_dataset: Sequence[Any],
    eval_dataset: Sequence[Any],
    data_collator: Callable[[list[Any]], Any] | None = None,
    trainer_class: type[ResumableTrainer] = ResumableTrainer,
) -> ResumableTrainer:
    """A Trainer over `model` (its forward returns a mapping with `loss`) with checkpoints under `config.output`.

    Raises:
        ValueError: there is nothing to train on, or nothing to evaluate on.
    """
    for name, dataset in (("training", train_dataset), ("held-out", eval_dataset)):
        if not dataset:
            raise ValueError(
                f"data: {config.data} has no {name} row that fills sequence_length {config.sequence_length}"
            )
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
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=2 if config.features else 0,  # stored features are read ahead
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=train_dataset,  # type: ignore[arg-type]
        eval_dataset=eval_dataset,  # type: ignore[arg-type]
        data_collator=data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressDisplay())
    return trainer
