"""`draftwing demo`: plain and EAGLE decoding of the embedded models side by side."""

import argparse
import json
from functools import partial

from draftwing.cli.arguments import add_device, add_remeasure, positive, seed
from draftwing.cli.output import new_console

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
    parser.add_argument("--seed", type=seed, default=0, help="of the runs at temperature 1 (default: 0)")
    add_remeasure(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from draftwing.api import load
    from draftwing.data.prompts import read_prompts
    from draftwing.embedded import EMBEDDED_PROMPTS
    from draftwing.evaluation.compare import Start
    from draftwing.evaluation.side_by_side import as_table, measure, show_completions

    console, temperatures = new_console(stderr=options.json), (0.0, 1.0)
    prompts = read_prompts(EMBEDDED_PROMPTS)[: options.prompts]
    common = {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
    eagle3 = load("tiny", "tiny", options.dtype, options.device, remeasure=options.remeasure)
    eagle1 = load("tiny", "tiny", options.dtype, options.device, method="eagle1")
    eagle3.check([prompt.token_ids(eagle3.tokenizer) for prompt in prompts], **common)
    for temperature in temperatures:  # now, so that nothing comes between the text or the progress bar's lines
        eagle3.costs(1, sampled=temperature > 0)
    methods: dict[str, Start] = {
        "plain": eagle3.with_method("plain").start,
        "eagle1": eagle1.start,
        # As many nodes as EAGLE-1's tree has: the same head, and what a dynamic tree adds.
        "eagle2": partial(eagle1.with_method("eagle2").start, plan=EAGLE2_PLAN),
        "eagle3": eagle3.start,
    }
    if not options.json:
        show_completions(console, prompts[:3], eagle3.tokenizer, methods, **common)
    rows = measure(console, prompts, eagle3.tokenizer, methods, temperatures, options.repeats, **common)
    if options.json:
        print(json.dumps({"rows": [row.as_dict() for row in rows]}))
        return
    dtype = str(eagle3.target.dtype).removeprefix("torch.")
    console.print(as_table(rows, f"embedded models, {dtype} on {options.device}, {len(prompts)} held-out prompts"))
    console.print("tau: tokens per target pass. Speed-ups are over plain decoding by the same engine.")
    console.print(
        f"Trees: EAGLE-1 the paper's of 26 nodes, EAGLE-2 {EAGLE2_PLAN}, EAGLE-3 by themselves, with looked-up text."
    )
