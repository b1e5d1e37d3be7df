"""`draftwing train`: run the stages of a recipe."""

import argparse
import json
import os
import sys

from rich.console import Console

SUMMARY = "Train what a recipe describes."
EXAMPLES = """examples:
  draftwing train recipes/tiny.yaml            # all stages; a stopped run continues where it was
  draftwing train recipes/tiny.yaml --stage 2  # the third stage alone
  draftwing train recipes/tiny.yaml --plan     # parameters, memory, disk and time, without running
  draftwing train recipes/tiny.yaml --set learning_rate=1e-4 --set architecture.hidden_size=128

many GPUs:
  torchrun --nproc-per-node 8 -m draftwing train recipe.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("recipe", help="a YAML file, see recipes/")
    parser.add_argument("--stage", type=int, help="run this stage only, counted from 0")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the stages that run"
    )
    parser.add_argument("--plan", action="store_true", help="show what it would take, and run nothing")
    parser.add_argument("--processes", type=int, default=1, help="--plan: for so many (default: 1)")
    parser.add_argument(
        "--tflops", type=float, help="--plan: TFLOP/s that a process reaches (default: measured on this machine)"
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
    from draftwing.training.processes import end_processes, is_main_process, start_processes
    from draftwing.training.stopping import TrainingStopped
    from draftwing.training.train import train_stage

    console = Console(stderr=True)
    start_processes()
    try:
        for stage in chosen:
            if is_main_process():
                console.rule(f"{stage.objective} -> {stage.output}")
            metrics = train_stage(stage)
            if is_main_process():
                print(json.dumps({"objective": stage.objective, "output": stage.output, **metrics}), flush=True)
    except TrainingStopped as stop:
        if is_main_process():
            console.print(f"{stop}; the same command continues from there", highlight=False, soft_wrap=True)
        raise SystemExit(128 + stop.signal_number) from None
    except ValueError:
        if os.environ.get("LOCAL_RANK", "0") != "0":  # all processes find the same mistake; one per machine says it
            sys.exit(2)
        raise
    finally:
        end_processes()
