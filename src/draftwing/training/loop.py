"""The transformers Trainer with our recipe's settings: processes, checkpoints, resume, schedule, logging."""

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from draftwing.config import Stage
from draftwing.data.fingerprint import contents_of, of_data
from draftwing.training.checkpoints import (
    complete_checkpoint,
    discard_checkpoint,
    newest_checkpoint,
    settings_of,
)
from draftwing.training.display import ProgressDisplay, RunLogKeeper
from draftwing.training.interruption import StopOnSignal, TrainingDiverged, TrainingStopped
from draftwing.training.muon import MuonAdamW, hidden_matrices
from draftwing.training.processes import is_main_process, num_processes, sum_over_processes, wait_for_others

logger = logging.getLogger(__name__)
Held = TypeVar("Held")


class WholeSteps(Sampler[int]):
    """An epoch's order of rows, filled up with rows from its beginning to whole optimizer steps.

    So no step is smaller than the others, and however its rows are split over processes and accumulated batches, it has
    the same ones. The `order` is a function of (seed, epoch), so it resumes.
    """

    def __init__(
        self, order: Callable[[torch.Generator], list[int]], num_rows: int, rows_per_step: int, seed: int
    ) -> None:
        self._order, self._num_rows, self._rows_per_step = order, num_rows, rows_per_step
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def start_at(self, step: int) -> None:
        """Take the order of the epoch that an optimizer step belongs to."""
        self.set_epoch(step * self._rows_per_step // len(self))

    def __len__(self) -> int:
        return -(-self._num_rows // self._rows_per_step) * self._rows_per_step

    def __iter__(self) -> Iterator[int]:
        rows = self._order(torch.Generator().manual_seed(self._seed + self._epoch))
        for index in range(len(self)):
            yield rows[index % len(rows)]


class ResumableTrainer(Trainer):
    """A Trainer that continues where it left off, bit for bit, on as many processes as before or on others."""

    def __init__(self, config: Stage, rows: str, **arguments: Any) -> None:
        """`rows` is a hash of what is trained on: a run that continues with other rows is refused."""
        self.config = config
        self._losses: list[torch.Tensor] = []
        contents = contents_of(config)
        self.settings = settings_of(config.as_dict(), num_processes()) | contents
        self.settings |= {"examples": len(arguments["train_dataset"]), "rows": rows}
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)
        self.add_callback(Housekeeping(self))
        self.run_log = RunLogKeeper(config, contents | of_data(config.data))
        self.display = ProgressDisplay()
        if is_main_process():
            self.add_callback(self.display)
            self.add_callback(self.run_log)

    def run(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; returns the held-out metrics.

        Raises:
            TrainingStopped: a signal came; a checkpoint is written.
            TrainingDiverged: the loss, a gradient or a figure is not finite; nothing of it is written.
            ValueError: the checkpoint was made with other settings.
        """
        checkpoint = newest_checkpoint(Path(str(self.args.output_dir)), self.settings)
        wait_for_others()  # nobody writes before everyone has looked
        if checkpoint is not None and is_main_process():
            logger.info("resuming from %s", checkpoint)
        if checkpoint is None:
            self.start()
        with StopOnSignal() as stop:
            self.add_callback(stop)
            try:
                self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            finally:
                self.display.stop()
        if stop.received:
            raise TrainingStopped(stop.received, self.state.global_step)
        last = self.state.log_history[-2:]  # the last is the Trainer's summary of the run
        evaluated = [entry for entry in last if "eval_loss" in entry and entry["step"] == self.state.global_step]
        metrics: dict[str, float] = evaluated[0] if evaluated else self.evaluate()
        return {name: value for name, value in metrics.items() if name.startswith("eval_")}

    def start(self) -> None:
        """What a run does before its first step; one that continues has done it."""

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Record that the run is over and what was made is written; gives the metrics back."""
        if is_main_process():
            self.run_log.write(self.state.log_history, metrics)
        wait_for_others()
        return metrics

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def check_step(self) -> None:
        """Raise TrainingDiverged, in all processes, if a loss or gradient of the step under way is not finite.

        A checkpoint of the weights that gave such a loss is no good one, and does not count any more.
        """
        gradients = [_local(parameter.grad) for parameter in self.model.parameters() if parameter.grad is not None]
        is_broken = torch.stack([~torch.stack(self._losses).isfinite().all(), ~_are_finite(gradients)])
        self._losses.clear()
        losses, any_gradients = sum_over_processes(is_broken.float()).tolist()
        step = self.state.global_step
        if losses and is_main_process():
            discard_checkpoint(Path(str(self.args.output_dir)), step)
        if losses or any_gradients:
            self._diverged(f"the {'loss' if losses else 'gradient'} of step {step + 1} is not finite")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.check_figures(logs)
        super().log(logs, *args, **kwargs)

    def check_figures(self, logs: dict[str, float]) -> None:
        """Raise TrainingDiverged if a figure to be logged is not finite."""
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                self._diverged(f"{name} at step {self.state.global_step} is not finite")

    def _diverged(self, what: str) -> NoReturn:
        kept = newest_checkpoint(Path(str(self.args.output_dir)), self.settings)
        saved = "no checkpoint was made before" if kept is None else f"the last good checkpoint is {kept}"
        raise TrainingDiverged(
            f"training: {what}; {saved}. A lower learning_rate (it is {self.config.learning_rate:g}), more "
            "warmup_steps or a lower max_grad_norm may help, or a feature or weight that was read is not finite"
        )

    def order(self, generator: torch.Generator) -> list[int]:
        """A random order of the rows, for an epoch."""
        order: list[int] = torch.randperm(len(self.train_dataset), generator=generator).tolist()
        return order

    def start_epoch(self) -> None:
        """Take the order that belongs to the step reached; accelerate forgets to, where it skips into an epoch."""
        self._steps.start_at(self.state.global_step)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.config.optimizer == "muon" and not isinstance(optimizer, MuonAdamW):
            matrices = hidden_matrices(self.model, self.output_matrices)
            optimizer = MuonAdamW(optimizer.param_groups, matrices)
        self.optimizer: Any = optimizer
        return optimizer

    @property
    def output_matrices(self) -> list[torch.Tensor]:
        """What makes logits in the trained model."""
        return [self.model.get_output_embeddings().weight]

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.config.parallel == "fsdp2":
            os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate's note to itself; it would hold for later stages
            state = self.accelerator.state
            if state.device.type == "cpu":  # accelerate shards on accelerators alone; torch does it with gloo as well
                state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
                state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
                self.is_fsdp_enabled = True
            # As under ddp: float32 weights and gradients, and autocast; not weights rounded to bfloat16.
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:  # its checkpoints hold the gathered weights already, beside the optimizer's state
            super().save_model(output_dir, _internal_call)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Evaluations leave no trace in the random numbers, so their interval can be changed.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> WholeSteps:
        num_rows, rows_per_step = len(self.train_dataset), int(self.settings["rows_per_step"])
        self._steps = WholeSteps(self.order, num_rows, rows_per_step, int(self.args.seed))
        return self._steps


def _local(gradient: torch.Tensor) -> torch.Tensor:
    """This process's part of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _are_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Whether all numbers are finite, without waiting for the device; a norm is not where one of its numbers is not."""
    return torch.stack(torch._foreach_norm(list(tensors), ord=torch.inf)).isfinite().all()


class Housekeeping(TrainerCallback):
    """Keeps a trainer's order of rows, its checkpoints, and what is not finite out of its weights."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_step()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.start_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for_others()  # every process has written its part
        if is_main_process():
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            complete_checkpoint(checkpoint, self._trainer.settings, self._trainer.config.keep_checkpoints)


def new_trainer(
    config: Stage,
    model: nn.Module,
    train_dataset: Sequence[Any],
    eval_dataset: Sequence[Any],
    rows: str,
    data_collator: Callable[[list[Any]], Any] | None = None,
    trainer_class: type[ResumableTrainer] = ResumableTrainer,
) -> ResumableTrainer:
    """A Trainer over `model` (its forward returns a mapping with `loss`) with checkpoints under `config.output`.

    `rows` is a hash of the tokens of `train_dataset`.

    Raises:
        ValueError: there is nothing to train on or to evaluate on, or a tracker is not installed.
    """
    for name, dataset in (("training", train_dataset), ("held-out", eval_dataset)):
        if not dataset and config.objective == "language_model":
            raise ValueError(
                f"data: {config.data} has no usable {name} rows that fill sequence_length {config.sequence_length}"
            )
        if not dataset:
            which = "those marked `held_out`, else the last ones," if name == "held-out" else "those that train"
            reason = "cannot be read, are too short, or have nothing that the model says"
            raise ValueError(f"data: no usable {name} row: of {config.data}, {which} {reason}")
    return trainer_class(
        config,
        rows,
        model=model,
        args=training_arguments(config),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
    )


def filled_up(held_out: Sequence[Held], blank: Callable[[Held], Held], config: Stage) -> list[Held]:
    """Held-out rows, and `blank` ones that count for nothing, so that processes have equally many whole batches."""
    missing = -len(held_out) % (config.batch_size * num_processes())
    return [*held_out, *(blank(row) for row in held_out[:1] for _ in range(missing))]


def wants_compile(config: Stage) -> bool:
    """Whether the recipe's network is compiled: as the recipe says, else where there is a GPU."""
    return torch.cuda.is_available() if config.compile is None else config.compile


def training_arguments(config: Stage) -> TrainingArguments:
    """The recipe's settings as the Trainer names them.

    Raises:
        ValueError: a tracker is not installed, or fsdp2 without several processes.
    """
    is_cuda = torch.cuda.is_available()
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"report_to: {tracker} is not installed; pip install {tracker}")
    sharding: dict[str, Any] = {}
    if config.parallel == "fsdp2":
        if "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "parallel: fsdp2 shards over several processes; start them with "
                "`torchrun --nproc-per-node N -m draftwing train ...`, or set parallel=ddp"
            )
        # One layer is too little to shard apart: all of the head is one group.
        options = {"version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": "FULL_STATE_DICT"}
        sharding = {"fsdp": True, "fsdp_config": options}
    backends: Any = torch.backends
    precision = backends.fp32_precision
    arguments = TrainingArguments(
        output_dir=str(Path(config.output) / "checkpoints"),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused" if is_cuda else "adamw_torch",
        bf16=config.bf16,
        torch_compile=wants_compile(config) and config.objective == "language_model",  # of heads, the layers alone are
        use_cpu=not is_cuda,
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # such a loss ends the run
        eval_strategy="steps",
        eval_steps=config.evaluate_every,
        save_steps=config.save_every,
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        # Stored features are read ahead.
        dataloader_num_workers=min(2, torch.get_num_threads()) if config.features else 0,
        dataloader_pin_memory=is_cuda,
        ddp_find_unused_parameters=False,
        **sharding,
    )
    # With compiling it sets TF32 for all of the process, where torch's older functions that read the setting raise.
    backends.fp32_precision = precision
    # One process, one GPU: with more in sight the Trainer would split batches over them with nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
