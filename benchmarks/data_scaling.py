"""How much a head gains from more data, and what each part of EAGLE-3 brings: heads trained alike but for one thing.

    python benchmarks/data_scaling.py --rows build/tiny/self_generated.jsonl --output results.json --plot curve.svg

Heads differ in how many rows they learn from (1x, 2x, 4x, 8x: EAGLE-3, figure 1), or, at 8x, in one part that is left
out (EAGLE-3, table 2): training-time test, the low and middle layers. All get the same number of steps, which repeat
the rows, or with `--epochs` all rows are repeated as often. Figures are the held-out accuracy of training and tau on
held-out prompts, decoded greedily. A stopped run goes on where it was; with `--only` several processes share the work.
"""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from draftwing.api import load
from draftwing.charts import line_chart
from draftwing.config import TrainConfig
from draftwing.data.prompts import read_prompts
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.files import check_same
from draftwing.provenance import write_record
from draftwing.training.stage import train_stage

BATCH_SIZE = 16
PLANS = ("chain:5", "tree:4x5x26")
SETTINGS = ("target", "rows", "smallest", "ttt_steps", "num_prompts", "max_new_tokens")
"""Options that a kept result must have been made with; its folder's name has the others."""


@dataclass(frozen=True)
class Variant:
    """A head to train: its name in the table, its objective, times the smallest data set, and what differs."""

    name: str
    objective: Any
    times: int
    changes: dict[str, Any] = field(default_factory=dict)


def main() -> int:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for variant in variants(options.times):
        if not variant.name.startswith(options.only):
            continue
        length = f"{options.steps} steps" if options.epochs is None else f"{options.epochs:g} epochs"
        folder = Path(options.folder) / f"{variant.name} {length}".replace(" ", "_").replace(",", "")
        finished, settings = folder / "result.json", {name: getattr(options, name) for name in SETTINGS}
        if not finished.is_file():
            row = train_and_measure(variant, folder, options)
            finished.write_text(json.dumps(row | {"settings": settings}), encoding="utf-8")
        row = json.loads(finished.read_text(encoding="utf-8"))
        check_same(row.pop("settings", {}), settings, finished)
        rows.append(row)
    print_table(rows)
    if options.plot:
        Path(options.plot).write_text(plot(rows), encoding="utf-8")
    if options.output:
        write_record(options.output, rows, vars(options))
    return 0


def plot(rows: list[dict[str, Any]]) -> str:
    """tau against rows, of the heads that differ in these alone, as SVG."""
    lines = {
        f"{objective}, {plan}": [
            (row["rows"], row["tau"][plan]) for row in rows if row["objective"] == objective and "," not in row["name"]
        ]
        for objective in ("eagle3", "eagle1")
        for plan in PLANS
    }
    return line_chart(lines, "rows", "tau")


def variants(times: list[int]) -> list[Variant]:
    most = max(times)
    scaled = [Variant(f"{objective} {n}x", objective, n) for n in times for objective in ("eagle3", "eagle1")]
    return scaled + [
        Variant(f"eagle3 {most}x, no training-time test", "eagle3", most, {"ttt_steps": 1}),
        Variant(f"eagle3 {most}x, last layer only", "eagle3", most, {"aux_layers": (12,)}),
    ]


def train_and_measure(variant: Variant, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = variant.times * options.smallest
    steps = options.steps if options.epochs is None else round(rows * options.epochs / BATCH_SIZE)
    settings: dict[str, Any] = {
        "ttt_steps": options.ttt_steps,
        "aux_layers": (2, 6, 11),
        "draft_vocab_size": 3072,
    } | variant.changes
    config = TrainConfig(
        objective=variant.objective,
        output=str(folder),
        target=options.target,
        data=options.rows,
        max_rows=rows,
        sequence_length=192,
        batch_size=BATCH_SIZE,
        max_steps=steps,
        learning_rate=1e-3,
        warmup_steps=steps // 20,
        evaluate_every=steps,
        save_every=max(1, steps // 4),
        **(settings if variant.objective == "eagle3" else {}),
    )
    metrics = train_stage(config)  # of a finished run, the record
    model = load(options.target, draft=str(folder), dtype="float32")
    prompts = [prompt.token_ids(model.tokenizer) for prompt in read_prompts(EMBEDDED_PROMPTS)]
    tau = {}
    for plan in PLANS:
        generation = model.start(prompts[: options.num_prompts], plan=plan, max_new_tokens=options.max_new_tokens)
        tau[plan] = generation.run().statistics.acceptance_length
    return {
        "name": variant.name,
        "objective": variant.objective,
        "rows": rows,
        "steps": steps,
        "accuracy": metrics["eval_accuracy_0"],
        "tau_sim": metrics["eval_tau_sim"],
        "tau": tau,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Heads trained alike, but for one thing")
    for column in ("head", "rows", "steps", "accuracy", *(f"tau, {plan}" for plan in PLANS)):
        table.add_column(column, justify="left" if column == "head" else "right")
    for row in rows:
        figures = [row["accuracy"], *(row["tau"][plan] for plan in PLANS)]
        table.add_row(row["name"], str(row["rows"]), str(row["steps"]), *(f"{figure:.3f}" for figure in figures))
    Console(width=110).print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--rows", required=True, help="a JSONL file of what the target says itself")
    parser.add_argument("--folder", default="build/data_scaling", help="where the heads are trained")
    parser.add_argument("--smallest", type=int, default=800, help="rows of the 1x data set (default: 800)")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=400, help="of 16 rows, for every head (default: %(default)s)")
    parser.add_argument("--epochs", type=float, help="repeat all rows as often, instead of --steps for every head")
    parser.add_argument("--only", default="", help="the heads whose names begin so: eagle1, 'eagle3 8x, '")
    parser.add_argument("--ttt-steps", type=int, default=4)
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--plot", help="draw tau against rows into this SVG file")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
