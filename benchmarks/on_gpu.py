"""Everything that only a CUDA device can tell, in one command and ten minutes: checks, cycles, text, and the goals.

    python benchmarks/on_gpu.py --output docs/results/gpu            # the goals are for one H100
    python benchmarks/on_gpu.py --output /tmp/gpu --device cpu --tiny  # see that everything runs, on a CPU

Each part is a process of its own with a time limit, the most telling ones first; one that fails is reported and the
others go on. Parts whose result is in the folder already, of the same shape on such a device, are not run again: the
same command continues where it was cut. chat_rig.py has the methods side by side on a trained model.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
CHECKS = (
    *("tests/lossless/test_cuda.py", "tests/unit/target/test_row_pass.py"),
    *("tests/unit/drafts/test_fused_levels.py", "tests/unit/engine/test_kernels.py"),
    *("tests/unit/target/test_split_attention.py", "tests/unit/losses/test_ttt.py"),
)
TREE, FIXED = "tree:10x8x60", ("chain:3", "tree:4x5x26")
LONGEST, LONGEST_CHECKS = 90, 240
"""Seconds that a part, or all checks, may take on a GPU; the checks compile every kernel."""


@dataclass(frozen=True)
class Goal:
    """A figure of a part, and what it should be at most, or at least."""

    figure: str
    bound: float
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True)
class Part:
    """A benchmark with its arguments, which write one result, and its goals."""

    name: str
    script: str
    arguments: tuple[str, ...]
    goals: tuple[Goal, ...] = ()


SAME = Goal("outputs that are plain decoding's", 1, at_least=True)
PAYS = Goal("auto / best fixed plan", 0.97, at_least=True)
HARMLESS = Goal("random head, auto / plain", 0.97, at_least=True)
TEXT = SAME, PAYS, HARMLESS
DRAWS = Goal("sampling in draft, ms", 0.1), Goal("sampling in verify, ms", 0.1)
"""What the part "sampled" takes longer than "cycle": 0.3 and 0.2 before noise, quotient and choice were one kernel."""


TOLD = {f"--{name}" for name in ("shape", "rounds", "repeats", "context", "batch-size", "num-prompts")}
"""Options by which a result is known to be a part's."""


def parts(tiny: bool) -> list[Part]:
    """What is measured, in this order. The goals are for an H100 at the shape of Llama 3.1 8B, bfloat16."""
    shape, small = ("tiny", "tiny") if tiny else ("llama-3.1-8b", "llama-3.2-1b")
    plans = ("--plans", *FIXED, TREE, "--rounds", "3" if tiny else "10")
    short = ("--context", "64" if tiny else "1024", "--no-transformers", *plans)
    long = ("--context", "128" if tiny else "8192", "--no-transformers", *plans)
    text = ("--random-head", "--repeats", "1" if tiny else "2", "--plans", "auto", *FIXED)
    few = ("--num-prompts", "2", "--max-new-tokens", "16") if tiny else ("--num-prompts", "2")
    cycle = (
        *(Goal("plain, ms", 5.75), Goal("verify 60, ms", 6.9), Goal("level of 10, ms", 0.2)),
        *(Goal("cycle / plain", 1.45), Goal("draft / cycle", 0.18), Goal("launches a layer", 8)),
    )
    listed = [
        Part("cycle", "bench_cycle.py", ("--shape", shape, *short), cycle),
        Part(
            "sampled", "bench_cycle.py", ("--shape", shape, *short, "--sampled"), (Goal("cycle / plain", 1.5), *DRAWS)
        ),
        Part("inflated", "inflate.py", ("--shape", shape, *text, TREE, *few), TEXT),
        Part("embedded", "bench_generate.py", (*text, *few), TEXT),
        Part(
            "long", "bench_cycle.py", ("--shape", shape, *long), (Goal("verify 60, ms", 8), Goal("cycle / plain", 1.6))
        ),
        Part(
            "batch-16",
            "bench_cycle.py",
            ("--shape", shape, *short, "--batch-size", "16"),
            (Goal("verify 16, ms", 8.5),),
        ),
        Part("batch-4", "bench_cycle.py", ("--shape", shape, *short, "--batch-size", "4")),
        Part("batch-64", "bench_cycle.py", ("--shape", shape, *short, "--batch-size", "64")),
        Part("small", "bench_cycle.py", ("--shape", small, *short)),
    ]
    return [part for part in listed if not (tiny and part.name in ("inflated", "batch-16", "batch-64"))]


def main() -> int:
    options = parse_options()
    folder, console = Path(options.output), Console(width=118)
    folder.mkdir(parents=True, exist_ok=True)
    end, failed, left = time.monotonic() + 60 * options.minutes, [], []
    if not options.skip_checks and not check(folder, options, console):
        failed.append("checks")
    for part in parts(options.tiny):
        if is_there(part, folder, options.device):
            continue
        if time.monotonic() > end:
            left.append(part.name)
        elif not measure(part, folder, options, console):
            failed.append(part.name)
    console.print(summary(folder, options.tiny))
    for names, what in ((failed, f"failed, see the .log files in {folder}"), (left, "no time was left")):
        if names:
            console.print(f"{', '.join(names)}: {what}; the same command goes on there")
    return int(bool(failed))


def check(folder: Path, options: argparse.Namespace, console: Console) -> bool:
    """Run the tests that need the device; on a CPU they are skipped, and pytest's status 5 says that none is left."""
    marks = ("-m", "gpu or not slow") if options.device != "cpu" else ("-m", "gpu")
    command = [sys.executable, "-m", "pytest", *CHECKS, *marks, "--durations=10"]
    return run("checks", command, folder, options, console, LONGEST_CHECKS) in (0, 5)


def is_there(part: Part, folder: Path, device: str) -> bool:
    """Whether a part's result is in the folder."""
    result = folder / f"{part.name}.json"
    if not result.exists():
        return False
    made_with = json.loads(result.read_text(encoding="utf-8"))["options"]
    given = dict(zip(part.arguments, part.arguments[1:], strict=False))
    made_alike = all(str(made_with.get(name[2:].replace("-", "_"))) == given[name] for name in TOLD & given.keys())
    return made_with["device"] == device and made_alike


def measure(part: Part, folder: Path, options: argparse.Namespace, console: Console) -> bool:
    """Run a part's benchmark."""
    command = [sys.executable, str(ROOT / "benchmarks" / part.script), *part.arguments, "--device", options.device]
    return run(part.name, [*command, "--output", str(folder / f"{part.name}.json")], folder, options, console) == 0


def run(
    name: str, command: list[str], folder: Path, options: argparse.Namespace, console: Console, longest: int = LONGEST
) -> int:
    """The exit status of a command, 124 if it took too long; its output goes to a log."""
    console.print(f"{name} ...", end=" ")
    start = time.monotonic()
    limit = longest if options.device != "cpu" else None
    with (folder / f"{name}.log").open("w") as log:
        try:
            status = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            status = 124
    console.print(f"{'done' if status == 0 else f'status {status}'} after {time.monotonic() - start:.0f} s")
    return status


def cycle_figures(record: dict[str, Any]) -> dict[str, float]:
    """Milliseconds and ratios of a result of bench_cycle.py.

    Captured cycles read the committed tokens into the draft at their end, so that the commit has that share.
    """
    costs, plain = record["costs"], record["costs"]["plain"][0]
    cycle = next(cycle for cycle in record["cycles"] if cycle["plan"] == TREE)
    verify = dict(zip(costs["num_nodes"], costs["verify"][0], strict=True))
    levels = dict(zip(costs["widths"], costs["draft_step"][0], strict=True))
    launches = record.get("launches") or {}  # a record of an earlier version has none
    return {
        "plain, ms": 1000 * plain,
        "plain / least": plain / record["least_seconds"],
        **{f"verify {num_nodes}, ms": 1000 * seconds for num_nodes, seconds in verify.items()},
        **{f"level of {width}, ms": 1000 * seconds for width, seconds in levels.items()},
        "cycle, ms": 1000 * cycle["seconds"],
        "cycle / plain": cycle["over_plain"],
        "draft, ms": 1000 * cycle["draft_seconds"],
        "draft / cycle": cycle["draft_seconds"] / cycle["seconds"],
        **{f"launches a {what}": count for what, count in launches.items()},
    }


def sampling_figures(sampled: dict[str, float], greedy: dict[str, float]) -> dict[str, float]:
    """What drawing tokens adds to a cycle."""
    verify = max((name for name in greedy if name.startswith("verify")), key=lambda name: int(name.split()[1][:-1]))
    names = {"draft": "draft, ms", "verify": verify}
    return {f"sampling in {stage}, ms": sampled[name] - greedy[name] for stage, name in names.items()}


def text_figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of a result of bench_generate.py or inflate.py: speeds over plain decoding's, auto's over the best fixed one."""
    ours = [row for row in rows if row["method"].startswith("eagle3")]
    random = [row for row in rows if row["method"].startswith("random head")]
    figures = {f"{row['method']}, T={row['temperature']:g}": row["speedup"] for row in ours}
    ratios = []
    for temperature in {row["temperature"] for row in ours}:
        speeds = {row["method"]: row["speedup"] for row in ours if row["temperature"] == temperature}
        ratios.append(speeds.pop("eagle3 auto") / max(speeds.values()))
    same = [bool(row["identical"]) for row in ours + random]
    goals = {PAYS.figure: min(ratios), SAME.figure: sum(same) / len(same)}
    return figures | goals | ({HARMLESS.figure: min(row["speedup"] for row in random)} if random else {})


def figures_of(part: Part, folder: Path) -> dict[str, float]:
    """A part's figures; none where it has no result."""
    result = folder / f"{part.name}.json"
    if not result.exists():
        return {}
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    if part.script != "bench_cycle.py":
        return text_figures(rows)
    figures, greedy = cycle_figures(rows), folder / "cycle.json"
    if "--sampled" in part.arguments and greedy.exists():
        figures |= sampling_figures(figures, cycle_figures(json.loads(greedy.read_text(encoding="utf-8"))["rows"]))
    return figures


def lines(folder: Path, tiny: bool) -> Iterator[tuple[str, str, str, str]]:
    """Part, figure, value and goal: all that have goals, and the others behind."""
    for part in parts(tiny):
        values, goals = figures_of(part, folder), {goal.figure: goal for goal in part.goals}
        for name in sorted(values, key=lambda name: name not in goals):
            goal = goals.get(name)
            wanted = "" if goal is None else f"{'at least' if goal.at_least else 'at most'} {goal.bound:g}"
            missed = goal is not None and not goal.is_met(values[name])
            yield part.name, name, f"{values[name]:.3f}", wanted + (" (missed)" if missed else "")


def summary(folder: Path, tiny: bool) -> Table:
    """All parts' figures, each with its goal."""
    table = Table(title=f"cycles of {TREE}, and speeds over plain decoding's")
    for column in ("part", "figure", "value", "goal"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for line in lines(folder, tiny):
        table.add_row(*line)
    return table


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="a folder for the results and logs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.5, help="no part begins later (default: 8.5)")
    parser.add_argument("--tiny", action="store_true", help="the embedded model's shape and few cycles")
    parser.add_argument("--skip-checks", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
