"""Coupled against uncoupled drafting: tau and tokens/s by temperature, method and plan, with intervals over prompts.

    python benchmarks/bench_sampling.py --threads 1 --output docs/results/tiny_cpu_sampling.json

All methods run in one process, interleaved prompt by prompt; plain decoding of the same seed is the reference. Run it
again when a head has been replaced: its defaults are the embedded models and all embedded prompts. An interval is a
95 % percentile bootstrap over prompts, whose runs of several seeds stay together. Both ways of drafting emit the same
tokens, so the ratio of their taus is the inverse ratio of their cycles. Speed-ups are over plain decoding.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from draftwing.api import load
from draftwing.data.prompts import read_prompts
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.evaluation.compare import Start
from draftwing.evaluation.figures import Figures, figures_of, rate_ratio
from draftwing.evaluation.journal import Run
from draftwing.evaluation.side_by_side import measure
from draftwing.intervals import Interval
from draftwing.provenance import write_record

WAYS = {"coupled": True, "uncoupled": False}


@dataclass(frozen=True)
class SamplingRow:
    """A method with a plan at one temperature, both ways, and the ratios of coupled to uncoupled drafting."""

    method: str
    temperature: float
    identical: bool
    coupled: Figures | None
    uncoupled: Figures | None
    acceptance_length_ratio: Interval | None
    tokens_per_second_ratio: Interval | None


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    eagle3 = load(options.target, draft=options.eagle3, dtype=options.dtype, device=options.device)
    eagle1 = load(options.target, draft=options.eagle1, dtype=options.dtype, device=options.device, method="eagle1")
    prompts = read_prompts(options.prompts)[: options.num_prompts]
    plans = [(eagle1, plan) for plan in (*options.chains, "eagle1")]
    plans += [(eagle1.with_method("eagle2"), plan) for plan in options.trees]
    plans += [(eagle3, plan) for plan in (*options.chains, *options.trees)]
    methods: dict[str, Start] = {"plain": eagle3.with_method("plain").start}
    for model, plan in plans:
        for way, coupled in WAYS.items():
            methods[f"{model.method} {plan} {way}"] = partial(model.start, plan=plan, coupled=coupled)
    rows = []
    for temperature in track(options.temperatures, "temperatures", console=Console(stderr=True)):
        settings = eagle3.tokenizer, (temperature,), options.repeats, options.max_new_tokens
        by_method: dict[str, list[Run]] = defaultdict(list)
        for seed in range(options.seeds):  # a prompt's runs of several seeds are summed where figures are taken
            for row in measure(methods, prompts, *settings, seed=seed):
                by_method[row.method] += row.runs
        rows += [as_row(f"{model.method} {plan}", temperature, by_method) for model, plan in plans]
    title = f"{options.target}, {options.dtype}, {len(prompts)} prompts, {options.seeds} seeds; [95 % intervals]"
    Console(width=160).print(as_table(rows, title))
    if options.output:
        write_record(options.output, [asdict(row) for row in rows], vars(options))
    return 0


def as_row(name: str, temperature: float, by_method: dict[str, list[Run]]) -> SamplingRow:
    plain, coupled, uncoupled = by_method["plain"], *(by_method[f"{name} {way}"] for way in WAYS)
    return SamplingRow(
        method=name,
        temperature=temperature,
        identical=all(run.identical for run in (*coupled, *uncoupled)),
        coupled=figures_of(coupled, plain),
        uncoupled=figures_of(uncoupled, plain),
        acceptance_length_ratio=rate_ratio(coupled, uncoupled, "num_cycles"),
        tokens_per_second_ratio=rate_ratio(coupled, uncoupled),
    )


def as_table(rows: Sequence[SamplingRow], title: str) -> Table:
    table = Table(title=title)
    table.add_column("method and plan")
    for column in (
        "T",
        "tau: coupled",
        "uncoupled",
        "ratio",
        "tokens/s: coupled",
        "uncoupled",
        "speed-up",
        "identical",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        assert row.coupled is not None and row.uncoupled is not None
        table.add_row(
            row.method,
            f"{row.temperature:g}",
            str(row.coupled.acceptance_length),
            str(row.uncoupled.acceptance_length),
            str(row.acceptance_length_ratio),
            f"{row.coupled.tokens_per_second.value:.0f}",
            f"{row.uncoupled.tokens_per_second.value:.0f}",
            str(row.coupled.speedup),
            "yes" if row.identical else "NO",
            end_section=row.method == rows[-1].method,
        )
    return table


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--eagle1", default="tiny-eagle1")
    parser.add_argument("--eagle3", default="tiny")
    parser.add_argument("--prompts", type=Path, default=EMBEDDED_PROMPTS)
    parser.add_argument("--num-prompts", type=int, help="default: all")
    parser.add_argument("--chains", nargs="*", default=["chain:3"])
    parser.add_argument("--trees", nargs="*", default=["tree:2x4x8", "tree:4x4x16"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.3, 0.7, 1.0, 1.3])
    parser.add_argument("--seeds", type=int, default=2, help="runs of each prompt with different noise (default: 2)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each seed; the median time counts (default: 1)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
