"""Heads for a chat model, trained on nothing but what it writes itself, and tables of the methods that use them.

    python benchmarks/chat_rig.py --data mt_bench=mt_bench.jsonl,gsm8k=gsm8k.jsonl
    python benchmarks/chat_rig.py --data mt_bench=mt_bench.jsonl --tiny   # minutes on a CPU, to see that it runs

The model is SmolLM2-135M-Instruct (docs/formats.md says how to install it) or another --target. It writes the rows, the
stages of recipes/smollm2.yaml train heads on them, `draftwing eval` makes the tables. Each part continues where it was:
run the same command again after a cut, or one part at a time with --parts. The seconds of each part are kept in
`seconds.json`, the tables in `tables/`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from draftwing.cli import main as draftwing

RECIPES = Path(__file__).parents[1] / "recipes"
HEADS = ("eagle3", "eagle1", "medusa")
PARTS = ("rows", *HEADS, "tables")
METHODS = (
    *("all", "eagle1:chain:5", "eagle2:tree:10x8x60", "eagle3:chain:5", "eagle3:tree:10x8x60"),
    *("eagle3:tree:10x8x60+uncoupled", "eagle3+ngram"),
)
SEQUENCE_LENGTH = 640
TINY_STAGE = ("max_steps=2", "warmup_steps=1", "batch_size=2", "evaluate_rows=2", "decode_prompts=1", "bf16=false")
TINY_HEAD = ("aux_layers=[1,3,5]", "draft_vocab_size=512", "medusa_heads=2")


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        start = time.perf_counter()
        try:
            status = draftwing(command_of(part, folder, options))
        finally:
            note_seconds(folder / "seconds.json", part, time.perf_counter() - start)
        if status:
            return status
    print_seconds(folder / "seconds.json")
    return 0


def command_of(part: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """The `draftwing` command of a part."""
    if part in HEADS:
        return train_command(part, folder, options)
    return {"rows": rows_command, "tables": tables_command}[part](folder, options)


def rows_command(folder: Path, options: argparse.Namespace) -> list[str]:
    seats = 512 if device() == "cuda" else 64
    count, batch, request, answer = (2, 2, 80, 16) if options.tiny else (options.num_rows, seats, 192, 256)
    sizes = {"--from-target": count, "--batch-size": batch, "--max-request-tokens": request, "--max-new-tokens": answer}
    where = ["--target", options.target, "--device", device(), "--output", str(folder / "rows.jsonl")]
    return [
        *("prepare", "--request-temperature", "0.8", "--sequence-length", str(SEQUENCE_LENGTH)),
        *("--request-prefixes", str(RECIPES / "chat_prefixes.txt")),
        *(str(part) for pair in sizes.items() for part in pair),
        *where,
    ]


def train_command(head: str, folder: Path, options: argparse.Namespace) -> list[str]:
    stage = "0" if head == "eagle3" else "1"  # Medusa's heads are trained as EAGLE-1's is
    settings = [
        f"objective={head}",
        f"target={options.target}",
        f"data={folder / 'rows.jsonl'}",
        f"output={folder / head}",
    ]
    settings += [*TINY_STAGE, *TINY_HEAD] if options.tiny else []
    recipe = str(RECIPES / "smollm2.yaml")
    return ["train", recipe, "--stage", stage, *(part for setting in settings for part in ("--set", setting))]


def tables_command(folder: Path, options: argparse.Namespace) -> list[str]:
    length, prompts = ("8", "1") if options.tiny else (str(options.max_new_tokens), str(options.num_prompts))
    return [
        *("eval", "--target", options.target, *(f"--draft={head}={folder / head}" for head in HEADS)),
        *("--methods", ",".join(METHODS), "--data", options.data, "--against", "transformers"),
        *("--max-new-tokens", length, "--num-prompts", prompts, "--repeats", "1"),
        *("--device", device(), "--output", str(folder / "tables"), "--temperatures", "0" if options.tiny else "0,1"),
    ]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


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


def parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}, got {unknown[0]!r}")
    return names


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="what `draftwing eval --data` takes")
    parser.add_argument("--target", default="smollm2", help="a chat model (default: %(default)s)")
    parser.add_argument("--folder", default="build/chat_rig", help="(default: %(default)s)")
    parser.add_argument("--parts", type=parts, default=PARTS, help=f"some of {','.join(PARTS)} (default: all)")
    parser.add_argument("--num-rows", type=int, default=8192, help="that it writes (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=10, help="of each data set (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer measured (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="minutes on a CPU, to see that everything runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
