"""Beside other processes: plain and EAGLE-3 tokens/s alone, beside a busy process, and beside another demo.

    python benchmarks/bench_busy.py --rounds 5 --output docs/results/tiny_cpu_busy.json

Each way to choose threads (`--ways`) has two processes that decode, one that is timed and one that stands for another
demo; they exist from the beginning and are stopped while others are timed, so that rounds interleave all of them.
`kept` is what is left of the same way's speed alone, pair by pair; a scheduler's fair share would be `fair`. What
processes other than these used of the cores meanwhile stands beside (`others`); a timing with more than `--quiet` of a
core is taken again, for `--patience` seconds in all.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from draftwing.provenance import write_record
from draftwing.threads import CHOSEN_BY, WAITED_BY, FreeCores

ALONE, BUSY, DEMO = CONDITIONS = ("alone", "beside a busy process", "beside another demo")
METHODS = ("plain", "eagle3")
CORES = len(os.sched_getaffinity(0))
WAYS: dict[str, dict[str, str]] = {
    "as shipped": {},
    "torch's own": {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": str(CORES)},
    "brief spins": {"OMP_NUM_THREADS": str(CORES)},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(CORES)},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""The variables of each; `torch's own` is libgomp's default count of spins, on all cores."""
FAIR = {ALONE: 1.0, BUSY: (CORES - 1) / CORES, DEMO: 0.5}
WARM_UP_TOKENS, NUM_PROMPTS = 16, 4


class Timing(NamedTuple):
    """A few prompts decoded; `others` is what other processes used meanwhile, in cores."""

    tokens_per_second: float
    others: float


class Bench:
    """The processes of all ways, a busy one, and the timings so far by way, condition and method."""

    def __init__(self, options: argparse.Namespace, stack: ExitStack) -> None:
        self._options, self._cores = options, FreeCores()
        start = lambda way, mode: stack.enter_context(process(WAYS[way], mode, options.max_new_tokens))
        self._timed = {way: start(way, "timed") for way in options.ways}
        self._demos = {way: start(way, "endless") for way in options.ways}
        self._busy = stack.enter_context(process({}, "busy", 0))
        self._patience = float(options.patience)
        self.timings: dict[tuple[str, str, str], list[Timing]] = defaultdict(list)

    def round(self) -> None:
        """Time everything once."""
        for condition in [ALONE] if self._options.alone else CONDITIONS:
            for way in self._options.ways:
                for method in METHODS:
                    self.timings[way, condition, method].append(self._quiet_timing(way, condition, method))

    def _quiet_timing(self, way: str, condition: str, method: str) -> Timing:
        while True:
            start = time.perf_counter()
            timing = self._timing(way, condition, method)
            if timing.others <= self._options.quiet or self._patience <= 0:
                return timing
            time.sleep(1)
            self._patience -= time.perf_counter() - start

    def _timing(self, way: str, condition: str, method: str) -> Timing:
        timed, neighbour = self._timed[way], {ALONE: None, BUSY: self._busy, DEMO: self._demos[way]}[condition]
        ours = [one.pid for one in (timed, neighbour) if one]
        with running(neighbour):
            time.sleep(0.5)
            before = time.perf_counter(), self._cores.busy_seconds() - sum(map(cpu_seconds, ours))
            speed = float(ask(timed, method))
            after = time.perf_counter(), self._cores.busy_seconds() - sum(map(cpu_seconds, ours))
        return Timing(speed, max(0.0, (after[1] - before[1]) / (after[0] - before[0])))


@contextmanager
def process(variables: Mapping[str, str], mode: str, max_new_tokens: int) -> Iterator["subprocess.Popen[str]"]:
    """A process of this file in another mode, ready; an endless one is stopped until it is to run."""
    kept = {name: value for name, value in os.environ.items() if name not in (*CHOSEN_BY, *WAITED_BY)}
    command = [sys.executable, __file__, "--mode", mode, "--max-new-tokens", str(max_new_tokens)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=kept | variables, stderr=subprocess.DEVNULL, **pipes) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "ready\n"
            if mode != "timed":
                started.send_signal(signal.SIGSTOP)
            yield started
        finally:
            started.kill()


@contextmanager
def running(neighbour: "subprocess.Popen[str] | None") -> Iterator[None]:
    """Let a stopped process run for a while."""
    if neighbour is None:
        yield
        return
    neighbour.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        neighbour.send_signal(signal.SIGSTOP)


def ask(timed: "subprocess.Popen[str]", method: str) -> str:
    assert timed.stdin is not None
    assert timed.stdout is not None
    timed.stdin.write(method + "\n")
    timed.stdin.flush()
    return timed.stdout.readline()


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def work(mode: str, max_new_tokens: int) -> None:
    """Be one of the processes: busy, or decoding what is asked for, or one method after the other without an end."""
    if mode == "busy":
        print("ready", flush=True)
        while True:
            pass
    from draftwing.api import load
    from draftwing.data.prompts import read_prompts
    from draftwing.embedded import EMBEDDED_PROMPTS
    from draftwing.evaluation.compare import timed

    eagle3 = load("tiny", draft="tiny")
    starts = {"plain": eagle3.with_method("plain").start, "eagle3": eagle3.start}
    prompts = [prompt.token_ids(eagle3.tokenizer) for prompt in read_prompts(EMBEDDED_PROMPTS)][:NUM_PROMPTS]

    def speed(method: str) -> float:
        timed(starts[method], prompts[:1], max_new_tokens=WARM_UP_TOKENS)
        runs = [timed(starts[method], [prompt], max_new_tokens=max_new_tokens) for prompt in prompts]
        return sum(run.statistics.num_tokens for run, _ in runs) / sum(seconds for _, seconds in runs)

    for method in METHODS:
        speed(method)
    print("ready", flush=True)
    if mode == "timed":
        for line in sys.stdin:
            print(speed(line.strip()), flush=True)
    while mode == "endless":
        for method in METHODS:
            speed(method)


def as_rows(timings: Mapping[tuple[str, str, str], Sequence[Timing]]) -> list[dict[str, Any]]:
    """Medians, and ratios to the same way alone and to the first way in the same condition, pair by pair."""
    rows = []
    first = next(iter(timings))[0]
    for (way, condition, method), values in timings.items():
        speeds = [value.tokens_per_second for value in values]
        ratio_to = lambda others, speeds=speeds: statistics.median(
            mine / other.tokens_per_second for mine, other in zip(speeds, others, strict=True)
        )
        row = {"way": way, "condition": condition, "method": method, "tokens_per_second": statistics.median(speeds)}
        row |= {"lowest": min(speeds), "highest": max(speeds), "others": statistics.median(v.others for v in values)}
        row |= {"kept": ratio_to(timings[way, ALONE, method]), "fair": FAIR[condition]}
        rows.append(row | {f"over {first}": ratio_to(timings[first, condition, method])})
    return rows


def print_table(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Rows that have the same columns, numbers to the right."""
    table = Table(title=title)
    for column, value in rows[0].items():
        table.add_column(column, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=180).print(table)


def main() -> int:
    options = parse_options()
    if options.mode:
        work(options.mode, options.max_new_tokens)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stopped processes are not left behind
    with ExitStack() as stack:
        bench = Bench(options, stack)
        for number in range(options.rounds):
            bench.round()
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    rows = as_rows(bench.timings)
    print_table(rows, f"embedded models, {CORES} cores")
    if options.output:
        more = {"timings": [[*key, *map(list, values)] for key, values in bench.timings.items()]}
        write_record(options.output, rows, vars(options), **more)
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["as shipped", "torch's own"])
    parser.add_argument("--alone", action="store_true", help="beside nothing else")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--quiet", type=float, default=0.1, help="of a core that other processes may use (default: 0.1)"
    )
    parser.add_argument("--patience", type=float, default=600, help="seconds of timings to take again (default: 600)")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    parser.add_argument("--mode", choices=("timed", "endless", "busy"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
