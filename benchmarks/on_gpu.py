"""Everything that only a CUDA device can tell, in one command: the checks, then cycles beside the goals.

    python benchmarks/on_gpu.py --output docs/results/gpu            # the goals are for one H100
    python benchmarks/on_gpu.py --output /tmp/gpu --device cpu --tiny  # see that everything runs, on a CPU

Each part is a process of its own with a time limit; one that fails is reported and the others go on. Parts whose
result is in the folder already, of the same shape on such a device, are not run again. chat_rig.py has the methods side
by side on a trained model.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
CHECKS = ("tests/lossless/test_cuda.py", "tests/unit/target/test_split_attention.py", "tests/unit/losses/test_ttt.py")
TREE = "tree:10x8x60"
LONGEST = 600
"""Seconds that a part may take."""


@dataclass(frozen=True)
class Part:
    """The arguments of bench_cycle.py for one result, and its goals: names of `figures`, and at most what."""

    name: str
    arguments: tuple[str, ...]
    goals: tuple[tuple[str, float], ...] = ()


def parts(tiny: bool) -> list[Part]:
    """What is measured. The goals are for an H100 at the shape of Llama 3.1 8B, bfloat16."""
    large, small = ("tiny", "tiny") if tiny else ("llama-3.1-8b", "llama-3.2-1b")
    goals = (("plain / least", 1 / 0.85), ("cycle / plain", 1.5), ("draft / cycle", 0.25))
    cycle = ("--shape", large, "--context", "64" if tiny else "1024")
    long = ("--shape", large, "--context", "128" if tiny else "8192", "--no-transformers")
    batches = [Part(f"batch-{rows}", (*cycle, "--batch-size", str(rows), "--no-transformers")) for rows in (4, 16, 64)]
    return [
        Part("cycle", cycle, goals),
        Part("cycle-eager", (*cycle, "--no-capture", "--no-compile", "--no-transformers")),
        Part("cycle-not-compiled", (*cycle, "--no-compile", "--no-transformers")),
        Part("long-context", long, (("cycle / plain", 1.7),)),
        Part("small", ("--shape", small, *cycle[2:])),
        *(batches[:1] if tiny else batches),
    ]


def main() -> int:
    options = parse_options()
    folder, console = Path(options.output), Console(width=118)
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    if not options.skip_checks and not check(folder, options.device, console):
        failed.append("checks")
    for part in parts(options.tiny):
        if not measure(part, folder, options, console):
            failed.append(part.name)
    console.print(summary(folder, options.tiny))
    for line in missed(folder, options.tiny):
        console.print(f"missed: {line}")
    if failed:
        console.print(f"failed: {', '.join(failed)}; see the .log files in {folder}; the same command runs them again")
    return int(bool(failed))


def check(folder: Path, device: str, console: Console) -> bool:
    """Run the tests that need the device; on a CPU they are skipped, and pytest's status 5 says that none is left."""
    marks = ("-m", "gpu or not slow") if device != "cpu" else ("-m", "gpu")
    return run("checks", [sys.executable, "-m", "pytest", *CHECKS, *marks], folder, console) in (0, 5)


def measure(part: Part, folder: Path, options: argparse.Namespace, console: Console) -> bool:
    """Run bench_cycle.py for a part, unless its result is there."""
    result = folder / f"{part.name}.json"
    if result.exists():
        made_with = json.loads(result.read_text(encoding="utf-8"))["options"]
        if (made_with["device"], made_with["shape"]) == (options.device, part.arguments[1]):
            return True
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_cycle.py"), *part.arguments, "--output", str(result)]
    command += ["--device", options.device, "--plans", "chain:3", "tree:4x5x26", TREE]
    command += ["--rounds", "3"] if options.tiny else []
    return run(part.name, command, folder, console) == 0


def run(name: str, command: list[str], folder: Path, console: Console) -> int:
    """The exit status of a command, 124 if it took too long; its output goes to a log."""
    console.print(f"{name} ...", end=" ")
    start = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        try:
            status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=LONGEST, check=False).returncode
        except subprocess.TimeoutExpired:
            status = 124
    console.print(f"{'done' if status == 0 else f'status {status}'} after {time.monotonic() - start:.0f} s")
    return status


def figures(record: dict[str, Any]) -> dict[str, float]:
    """The ratios that have goals, and milliseconds, of a result of bench_cycle.py.

    Captured cycles read the committed tokens into the draft at their end, so that the commit has that share.
    """
    cycle = next(cycle for cycle in record["cycles"] if cycle["plan"] == TREE)
    plain = record["costs"]["plain"][0]
    return {
        "plain, ms": 1000 * plain,
        "plain / least": plain / record["least_seconds"],
        "cycle, ms": 1000 * cycle["seconds"],
        "cycle / plain": cycle["over_plain"],
        "draft / cycle": cycle["draft_seconds"] / cycle["seconds"],
        "transformers, ms": 1000 * (record["transformers_seconds"] or float("nan")),
    }


def summary(folder: Path, tiny: bool) -> Table:
    """All parts' figures, each with its goal."""
    table = Table(title=f"cycles of {TREE}; in brackets the goals, at most")
    names = ("plain, ms", "plain / least", "cycle, ms", "cycle / plain", "draft / cycle", "transformers, ms")
    for column in ("part", *names):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in parts(tiny):
        if values := figures_of(part, folder):
            goals = dict(part.goals)
            cells = [f"{values[name]:.2f}" + (f" ({goals[name]:.2f})" if name in goals else "") for name in names]
            table.add_row(part.name, *cells)
    return table


def missed(folder: Path, tiny: bool) -> list[str]:
    """The goals that the parts' figures do not reach."""
    return [
        f"{part.name}: {name} is {values[name]:.2f}, the goal {goal:.2f}"
        for part in parts(tiny)
        if (values := figures_of(part, folder))
        for name, goal in part.goals
        if values[name] > goal
    ]


def figures_of(part: Part, folder: Path) -> dict[str, float]:
    """A part's figures; none where it has failed."""
    result = folder / f"{part.name}.json"
    return figures(json.loads(result.read_text(encoding="utf-8"))["rows"]) if result.exists() else {}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="a folder for the results and logs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the embedded model's shape and few cycles")
    parser.add_argument("--skip-checks", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
