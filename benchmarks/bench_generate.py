"""End to end on real weights: every method and plan against plain decoding and transformers, in one run.

    python benchmarks/bench_generate.py --plans auto chain:3 tree:4x4x16 --output results.json

All run in one process, interleaved prompt by prompt; a figure is the median over repeats of each prompt, summed.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_plan import draw_anew
from rich.console import Console
from rich.table import Table
from torch import nn

from draftwing.api import SpeculativeModel, load
from draftwing.data.prompts import read_prompts
from draftwing.drafts.eagle.fused_layers import pack_head
from draftwing.drafts.family import Draft
from draftwing.drafts.kinds import suitable_draft
from draftwing.drafts.load_draft import load_draft
from draftwing.embedded import EMBEDDED_PROMPTS
from draftwing.evaluation.compare import Start
from draftwing.evaluation.figures import ResultRow
from draftwing.evaluation.rivals import transformers_rivals
from draftwing.evaluation.side_by_side import as_facts, measure
from draftwing.provenance import write_record
from draftwing.target.load import load_stock

RANDOM = "random head auto"
"""The method whose head knows nothing."""


def main() -> int:
    options = parse_options()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    eagle3 = load(options.target, draft=options.eagle3, dtype=options.dtype, device=options.device)
    options.dtype = str(eagle3.target.dtype).removeprefix("torch.")
    eagle1 = load(options.target, draft=options.eagle1, dtype=options.dtype, device=options.device)
    methods = {"plain": eagle3.with_method("plain").start, "eagle1": eagle1.with_method("eagle1").start}
    for plan in options.plans:
        methods[f"eagle2 {plan}"] = partial(eagle1.with_method("eagle2").start, plan=plan, ngram=False)
        methods[f"eagle3 {plan}"] = partial(eagle3.start, plan=plan, ngram=False)  # of auto too: fixed trees have none
    if options.random_head:
        head = load_draft(suitable_draft(options.eagle3, "eagle3"), eagle3.target)
        methods[RANDOM] = random_head(eagle3, head)
    prompts = read_prompts(options.prompts)[: options.num_prompts]
    settings = options.temperatures, options.repeats, options.max_new_tokens
    rows = [as_row(row) for row in measure(methods, prompts, eagle3.tokenizer, *settings)]
    if 0 in options.temperatures:
        ids = [prompt.token_ids(eagle3.tokenizer) for prompt in prompts]
        speed = transformers_speed(eagle3, ids, options)
        plain = next(row["tokens_per_second"] for row in rows if row["temperature"] == 0)
        rows.append({"method": "transformers generate", "temperature": 0.0, "tokens_per_second": speed,
                     "speedup": speed / plain})  # fmt: skip
    print_table(rows, options)
    if options.output:
        write_record(options.output, rows, vars(options))
    return 0


def random_head(model: SpeculativeModel, head: Draft) -> Start:
    """Trees that size themselves, without what is looked up, by a head like this one that knows nothing."""
    assert isinstance(head, nn.Module)
    draw_anew(head)
    pack_head(head)
    return partial(SpeculativeModel(model.target, head, model.tokenizer, "eagle3").start, ngram=False)


def as_row(row: ResultRow) -> dict[str, Any]:
    """A method's figures as the record has them."""
    num_cycles = sum(run.num_cycles or 0.0 for run in row.runs)
    return as_facts(row) | {
        "acceptance_rate": [depth.rate for depth in row.acceptance_rate],
        "ms_per_cycle": {stage: 1000 * s / num_cycles for stage, s in row.stage_seconds.items()},
    }


def transformers_speed(model: Any, prompts: list[list[int]], options: argparse.Namespace) -> float:
    """Tokens per second of the stock greedy `generate` on the same weights, with transformers' own attention."""
    stock = load_stock(options.target, model.target.dtype, options.device)
    decode = transformers_rivals(stock)["transformers"]
    num_tokens, total = 0, 0.0
    for prompt in prompts:
        runs = [
            decode(prompt, temperature=0.0, max_new_tokens=options.max_new_tokens, seed=0)
            for _ in range(options.repeats)
        ]
        num_tokens += runs[-1].num_tokens
        total += statistics.median(run.seconds for run in runs)
    return num_tokens / total


def print_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(title=f"{options.target}, {options.dtype}, {torch.get_num_threads()} threads, {options.device}")
    for column in (
        "method",
        "T",
        "tokens/s",
        "speed-up",
        "tau",
        "identical",
        "ms per cycle: draft",
        "verify",
        "commit",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        stages = row.get("ms_per_cycle", {})
        table.add_row(
            row["method"],
            f"{row['temperature']:g}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['acceptance_length']:.2f}" if "acceptance_length" in row else "",
            {True: "yes", False: "NO", None: ""}[row.get("identical")],
            *(f"{stages[name]:.2f}" if stages else "" for name in ("draft", "verify", "commit")),
        )
    Console(width=130).print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--eagle1", default="tiny-eagle1")
    parser.add_argument("--eagle3", default="tiny")
    parser.add_argument("--prompts", type=Path, default=EMBEDDED_PROMPTS)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--plans", nargs="+", default=["auto"])
    parser.add_argument("--random-head", action="store_true", help="add a head that knows nothing, with plan auto")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", help="default: the package's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    parser.add_argument("--output", help="write the figures with their provenance to this JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
