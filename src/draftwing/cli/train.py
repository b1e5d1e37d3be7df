"""`draftwing train`: run the stages of a recipe."""

import argparse
import json

from rich.console import Console

SUMMARY = "Train what a recipe describes."
EXAMPLES = """examples:
  draftwing train recipes/tiny.yaml            # all stages; a stopped run continues where it was
  draftwing train recipes/tiny.yaml --stage 2  # the third stage alone"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("recipe", help="a YAML file, see recipes/")
    parser.add_argument("--stage", type=int, help="run this stage only, counted from 0")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from draftwing.config import read_recipe
    from draftwing.training.train import train_stage

    stages = read_recipe(options.recipe)
    if options.stage is not None and not 0 <= options.stage < len(stages):
        raise ValueError(f"stage: {options.recipe} has stages 0 to {len(stages) - 1}, got {options.stage}")
    chosen = stages if options.stage is None else [stages[options.stage]]
    for stage in chosen:
        Console(stderr=True).rule(f"{stage.objective} -> {stage.output}")
        print(json.dumps({"objective": stage.objective, "output": stage.output, **train_stage(stage)}))
