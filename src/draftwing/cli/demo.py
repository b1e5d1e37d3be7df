"""`draftwing demo`: plain and EAGLE decoding of the embedded models side by side."""

import argparse
import json
from functools import partial

from rich.console import Console

from draftwing.cli.arguments import add_device, positive

EAGLE2_PLAN = "tree:4x5x26"
SUMMARY = "Watch plain and EAGLE decoding of the embedded models side by side."
EXAMPLES = """examples:
  draftwing demo                        # watch the embedded models, then the table
  draftwing demo --json > demo.json     # the table alone, for machines
  draftwing demo --dtype bfloat16 --repeats 5"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    add_device(parser)
    parser.add_argument("--prompts", type=positive, default=8, help="how many of the held-out prompts (default: 8)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="per prompt (default: 128)")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="runs of each prompt; the median counts (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the runs at temperature 1 (default: 0)")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from draftwing.api import load
    from draftwing.checkpoint.load import EMBEDDED_PROMPTS
    from draftwing.data.prompts import read_prompts
    from draftwing.evaluation.compare import Start
    from draftwing.evaluation.demo import as_table, measure, show_completions

    console = Console(stderr=options.json)
    eagle3 = load("tiny", draft="tiny", dtype=options.dtype, device=options.device)
    eagle1 = load("tiny", draft="tiny", dtype=options.dtype, device=options.device, method="eagle1")
    methods: dict[str, Start] = {
        "plain": eagle3.with_method("plain").start,
        "eagle1": eagle1.start,
        # As many nodes as EAGLE-1's tree has: the same head, and what a dynamic tree adds.
        "eagle2": partial(eagle1.with_method("eagle2").start, plan=EAGLE2_PLAN),
        "eagle3": eagle3.start,
    }
    prompts = read_prompts(EMBEDDED_PROMPTS)[: options.prompts]
    common = {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
    if not options.json:
        show_completions(console, prompts[:3], eagle3.tokenizer, methods, **common)
    rows = measure(console, prompts, eagle3.tokenizer, methods, (0.0, 1.0), options.repeats, **common)
    if options.json:
        print(json.dumps({"rows": [row.as_dict() for row in rows]}))
        return
    dtype = str(eagle3.target.dtype).removeprefix("torch.")
    console.print(as_table(rows, f"embedded models, {dtype} on {options.device}, {len(prompts)} held-out prompts"))
    console.print("tau: tokens per target pass. Speed-ups are over plain decoding by the same engine.")
    console.print(
        f"Trees: EAGLE-1 the paper's of 26 nodes, EAGLE-2 {EAGLE2_PLAN}, EAGLE-3 by themselves, with looked-up text."
    )
