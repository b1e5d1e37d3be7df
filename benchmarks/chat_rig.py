"""Every method on a chat target of a size at which a forward pass costs what it costs in earnest, from nothing.

    python benchmarks/chat_rig.py --corpus answers.jsonl.gz --data mt_bench=mt_bench.jsonl,gsm8k=gsm8k.jsonl
    python benchmarks/chat_rig.py --corpus answers.jsonl.gz --data mt_bench=mt_bench.jsonl --tiny   # try it on a CPU

Trains the stages of recipes/chat_rig.yaml, then runs `draftwing eval`. All of it continues where it was: run the same
command again after a cut (SIGTERM writes a checkpoint first), or one part at a time with --parts. The seconds of each
part are kept in `seconds.json`, the tables in `tables/`.
"""

import argparse
import dataclasses
import gzip
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from draftwing.cli import main as draftwing
from draftwing.config import TrainConfig, read_recipe
from draftwing.training.interruption import TrainingStopped
from draftwing.training.stage import train_stage

RECIPE = Path(__file__).parents[1] / "recipes" / "chat_rig.yaml"
FOLDER = "build/chat_rig"
PARTS = ("target", "rows.jsonl", "eagle3", "eagle1", "medusa", "draft", "tables")
METHODS = (
    *("all", "eagle1:chain:5", "eagle2:tree:10x8x60", "eagle3:chain:5", "eagle3:tree:10x8x60"),
    *("eagle3:tree:10x8x60+uncoupled", "eagle3+ngram"),
)
SMALL: Mapping[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
"""What --tiny makes of the architectures."""


def main() -> int:
    options = parse_options()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    unpack(Path(options.corpus), folder / "corpus.jsonl", most_rows=200 if options.tiny else None)
    stages = {Path(stage.output).name: in_folder(stage, options) for stage in read_recipe(RECIPE)}
    for part in options.parts.split(","):
        start = time.perf_counter()
        try:
            status = make_tables(folder, options) if part == "tables" else int(train_stage(stages[part]) is None)
        except TrainingStopped as stop:
            print(f"{stop}; the same command continues from there", file=sys.stderr)
            status = 128 + stop.signal_number
        note_seconds(folder / "seconds.json", part, time.perf_counter() - start)
        if status:
            return status
    print_seconds(folder / "seconds.json")
    return 0


def unpack(corpus: Path, goal: Path, most_rows: int | None) -> None:
    """Copy a JSONL file, which may be gzipped, as a whole or not at all."""
    if goal.exists():
        return
    partial = goal.with_suffix(".partial")
    with gzip.open(corpus) if corpus.suffix == ".gz" else corpus.open("rb") as source, partial.open("wb") as file:
        if most_rows is None:
            shutil.copyfileobj(source, file)
        else:
            file.writelines(line for line, _ in zip(source, range(most_rows), strict=False))
    partial.replace(goal)


def in_folder(stage: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """The stage in another folder than the recipe's, and with --tiny so small that a CPU does it in seconds."""
    changes: dict[str, Any] = {
        name: value.replace(FOLDER, options.folder) for name, value in vars(stage).items() if isinstance(value, str)
    }
    if options.tiny:
        changes |= {"max_steps": 6, "warmup_steps": 1, "evaluate_every": 6, "batch_size": 4, "evaluate_rows": 4}
        changes |= {"compile": False, "vocab_size": 512, "sequence_length": 128, "max_rows": 12}
        changes |= {"architecture": {**stage.architecture, **SMALL}} if stage.architecture else {}
        changes |= {"aux_layers": (1, 3, 5), "draft_vocab_size": 256} if stage.objective == "eagle3" else {}
        changes |= {"max_rows": None} if stage.objective == "language_model" else {}
    return dataclasses.replace(stage, **changes)


def make_tables(folder: Path, options: argparse.Namespace) -> int:
    drafts = [f"--draft={name}={folder / name}" for name in ("eagle3", "eagle1", "medusa", "draft")]
    length, prompts = ("8", "1") if options.tiny else (str(options.max_new_tokens), str(options.num_prompts))
    sizes = ["--max-new-tokens", length, "--num-prompts", prompts, "--repeats", "1"]
    where = ["--device", "cuda" if torch.cuda.is_available() else "cpu", "--output", str(folder / "tables")]
    return draftwing(
        [
            "eval",
            "--target",
            str(folder / "target"),
            *drafts,
            "--methods",
            ",".join(METHODS),
            "--data",
            options.data,
            *sizes,
        ]
        + ["--against", "transformers", *where]
    )


def note_seconds(file: Path, part: str, seconds: float) -> None:
    """Add to what a part has taken so far, over all calls."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known[part] = round(known.get(part, 0.0) + seconds, 1)
    file.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def print_seconds(file: Path) -> None:
    table = Table(title="Seconds by part, over all calls")
    table.add_column("part")
    table.add_column("s", justify="right")
    for part, seconds in json.loads(file.read_text(encoding="utf-8")).items():
        table.add_row(part, f"{seconds:.0f}")
    Console().print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="a JSONL file of chats (`messages`), gzipped or not")
    parser.add_argument("--data", required=True, help="what `draftwing eval --data` takes")
    parser.add_argument("--folder", default=FOLDER)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, in this order (default: all)")
    parser.add_argument("--num-prompts", type=int, default=10, help="of each data set (default: 10)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to see that everything runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
