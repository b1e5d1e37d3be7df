"""`draftwing train`: run the stages of a recipe."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from draftwing.cli.arguments import above_zero, add_threads, not_negative, positive
from draftwing.cli.output import headline, new_console, note, print_facts, say_saved
from draftwing.config import TrainConfig

if TYPE_CHECKING:
    from rich.table import Table

SUMMARY = "Train what a recipe describes."
EXAMPLES = """examples:
  draftwing train recipes/tiny.yaml            # all stages; a stopped run continues where it was
  draftwing train recipes/tiny.yaml --stage 2  # the third stage alone
  draftwing train recipes/tiny.yaml --plan     # parameters, memory, disk and time, without running
  draftwing train recipes/tiny.yaml --set learning_rate=1e-4 --set max_steps=500
  torchrun --nproc-per-node 8 -m draftwing train recipes/tiny.yaml   # on 8 GPUs"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("recipe", help="a YAML file, see recipes/")
    parser.add_argument("--stage", type=not_negative, help="run this stage only, counted from 0")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the stages that run"
    )
    add_threads(parser)
    parser.add_argument("--plan", action="store_true", help="show what it would take, and run nothing")
    parser.add_argument("--processes", type=positive, default=1, help="--plan: for so many (default: 1)")
    parser.add_argument(
        "--tflops",
        type=above_zero,
        help="--plan: TFLOP/s that a process reaches (default: 40 %% of what large products do on this machine)",
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from draftwing.config import read_recipe

    stages = read_recipe(options.recipe, options.set)
    if options.stage is not None and not 0 <= options.stage < len(stages):
        raise ValueError(f"stage: {options.recipe} has stages 0 to {len(stages) - 1}, got {options.stage}")
    chosen = stages if options.stage is None else [stages[options.stage]]
    outputs = [stage.output for stage in chosen]
    for output in outputs:
        if outputs.count(output) > 1:
            raise ValueError(f"output: two stages write to {output}; choose one with --stage")
    if options.plan:
        _show_estimate(chosen, stages, options)
        return
    from draftwing.files import to_json
    from draftwing.training.interruption import TrainingStopped
    from draftwing.training.processes import end_processes, is_main_process, start_processes

    try:
        from draftwing.training.stage import train_stage
    except ModuleNotFoundError as error:
        raise ValueError(f'train: needs {error.name}: pip install "draftwing[train]"') from None

    console = new_console(stderr=True)
    start_processes()
    try:
        for stage in chosen:
            if is_main_process():
                headline(console, f"{stage.objective} -> {stage.output}")
            metrics = train_stage(stage)
            if is_main_process():
                print(to_json({"objective": stage.objective, "output": stage.output, **metrics}), flush=True)
        if is_main_process():
            say_saved(*outputs)
    except TrainingStopped as stop:
        if is_main_process():
            note(f"{stop}; the same command continues from there")
        end_processes(128 + stop.signal_number)
        raise SystemExit(128 + stop.signal_number) from None
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # all processes find the same mistake; one per machine says it
            sys.exit(2)
        raise
    end_processes(0)


def _show_estimate(chosen: Sequence[TrainConfig], stages: Sequence[TrainConfig], options: argparse.Namespace) -> None:
    from draftwing.training.estimates import REACHED, estimate_stages, measure_rate

    rate = options.tflops * 1e12 if options.tflops else REACHED * measure_rate()
    estimates = estimate_stages(stages, options.processes, rate)  # of all: a stage may use what an earlier one makes
    estimates = [estimate for stage, estimate in zip(stages, estimates, strict=True) if stage in chosen]
    if options.json:
        settings = [stage.as_dict() for stage in chosen]
        rows = [each.as_dict() | {"recipe": recipe} for each, recipe in zip(estimates, settings, strict=True)]
        print(json.dumps({"processes": options.processes, "flops_per_second": rate, "stages": rows}))
        return
    console = new_console()
    for stage, estimate in zip(chosen, estimates, strict=True):
        print_facts(_table(stage, estimate, options.processes))
    source = "as given" if options.tflops else f"{REACHED:.0%} of what large products reach on this machine"
    console.print(
        "Memory is one process's, with all rows full and on a GPU. Time assumes "
        f"{rate / 1e12:.3g} TFLOP/s per process, {source}, and nothing for reading, evaluating and saving; how long "
        "rows of self_generated take depends on what the target says, and is not estimated.",
        soft_wrap=True,
    )


def _table(stage: TrainConfig, estimate: Any, num_processes: int) -> "Table":
    from rich.table import Table

    table = Table(title=f"{estimate.objective} -> {estimate.output}", show_header=False, title_justify="left")
    values = stage.as_dict()
    changed = {name: value for name, value in values.items() if value != getattr(TrainConfig, name, {})}
    table.add_row("recipe", ", ".join(f"{name} {value}" for name, value in changed.items()))
    table.add_row(
        "target", f"{estimate.target_params:,} parameters, {estimate.target_active_params:,} multiply per token"
    )
    table.add_row("trained", f"{estimate.trained_params:,} parameters, and {estimate.frozen_params:,} frozen")
    table.add_row(
        "a step",
        f"{estimate.rows_per_step} rows, {estimate.flops_per_step:.3g} FLOP in each of {num_processes} processes",
    )
    table.add_row("all steps", f"at most {estimate.most_tokens:,} tokens")
    for name, size in estimate.memory.items():
        table.add_row(f"memory: {name}", _size(size))
    table.add_row("memory: together", _size(sum(estimate.memory.values())), end_section=True)
    for name, size in estimate.disk.items():
        table.add_row(f"disk: {name}", _size(size))
    table.add_row("time", "not estimated" if estimate.seconds is None else f"{estimate.seconds / 3600:,.2f} h")
    return table


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
