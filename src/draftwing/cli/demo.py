"""`draftwing demo`: plain decoding and what drafts make of it, side by side."""

import argparse
import json
from functools import partial
from typing import TYPE_CHECKING

from draftwing.cli.arguments import DRAFTS, TARGETS, add_device, add_remeasure, positive, seed
from draftwing.cli.output import new_console
from draftwing.embedded import default_draft

if TYPE_CHECKING:
    from draftwing.api import SpeculativeModel
    from draftwing.data.prompts import Prompt
    from draftwing.evaluation.compare import Start

EAGLE2_PLAN = "tree:4x5x26"
SUMMARY = "Watch plain and drafted decoding side by side: the embedded models, or any target."
EXAMPLES = """examples:
  draftwing demo                        # watch the embedded models, then the table
  draftwing demo --json > demo.json     # the table alone, for machines
  draftwing demo --dtype bfloat16 --repeats 5
  draftwing demo --target smollm2       # a chat model with its embedded head, and what needs none
  draftwing demo --target org/model --draft org/head --device cuda"""
QUESTIONS = (
    "Why does the sky turn red in the evening?",
    "Write a Python function that removes duplicates from a list and keeps the order.",
    "Give me three ideas for a quick dinner with rice, and say what I need for each.",
    "Explain to a child what a computer does.",
    "Write a short, polite email that moves a meeting from Monday to Tuesday.",
    "List the planets of the solar system, each with one fact.",
    "A train goes 60 kilometres in 45 minutes. How fast is it? Show the steps.",
    "Summarise in two sentences why people sleep.",
)
"""What a chat model is asked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--target", default="tiny", help=f"{TARGETS} (default: tiny)")
    parser.add_argument("--draft", help=f"{DRAFTS} (default: the embedded ones of the target, or none)")
    add_device(parser)
    parser.add_argument("--prompts", type=positive, default=8, help="how many of the held-out prompts (default: 8)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="per prompt (default: 128)")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="runs of each prompt; the median counts (default: 3)"
    )
    parser.add_argument(
        "--seed",
        type=seed,
        default=0,
        help="of the first prompt at temperature 1; each next one has one more (default: 0)",
    )
    add_remeasure(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from rich.progress import Progress

    from draftwing.evaluation.side_by_side import as_facts, as_table, measure, show_completions

    console, temperatures = new_console(stderr=options.json), (0.0, 1.0)
    is_embedded = options.target == "tiny" and options.draft is None
    model, methods, note = embedded_methods(options) if is_embedded else methods_of(options)
    prompts = prompts_for(options.target, model)[: options.prompts]
    common = {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
    model.check([prompt.token_ids(model.tokenizer) for prompt in prompts], **common)
    for temperature in temperatures if model.draft is not None else ():  # now, so that no line of it comes between
        model.costs(1, sampled=temperature > 0)
    if not options.json:
        show_completions(console, prompts[:3], model.tokenizer, methods, **common)
    with Progress(console=console, transient=True) as progress:
        total = len(temperatures) * len(prompts) * len(methods) * options.repeats
        task = progress.add_task(f"measuring {len(prompts)} prompts", total=total)
        settings = model.tokenizer, temperatures, options.repeats
        results = measure(methods, prompts, *settings, advance=lambda done: progress.advance(task, done), **common)
    rows = [as_facts(row) for row in results]
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    what = "embedded models" if is_embedded else str(options.target)
    dtype = str(model.target.dtype).removeprefix("torch.")
    console.print(as_table(rows, f"{what}, {dtype} on {options.device}, {len(prompts)} prompts"))
    console.print("tau: tokens per target pass. Speed-ups are over plain decoding by the same engine.")
    console.print(note)


def embedded_methods(options: argparse.Namespace) -> "tuple[SpeculativeModel, dict[str, Start], str]":
    """The model whose trees size themselves, each method by its name, and what to know of their trees."""
    from draftwing.api import load

    eagle3 = load("tiny", "tiny", options.dtype, options.device, remeasure=options.remeasure)
    eagle1 = eagle3.with_draft("tiny-eagle1", "eagle1")
    methods: dict[str, Start] = {
        "plain": eagle3.with_method("plain").start,
        "eagle1": eagle1.start,
        # As many nodes as EAGLE-1's tree has: the same head, and what a dynamic tree adds.
        "eagle2": partial(eagle1.with_method("eagle2").start, plan=EAGLE2_PLAN),
        "eagle3": eagle3.start,
    }
    note = f"Trees: EAGLE-1 the paper's of 26 nodes, EAGLE-2 {EAGLE2_PLAN}, EAGLE-3 by themselves, with looked-up text."
    return eagle3, methods, note


def methods_of(options: argparse.Namespace) -> "tuple[SpeculativeModel, dict[str, Start], str]":
    """As `embedded_methods`, of any target: what needs no draft, and the draft's own method."""
    from draftwing.api import load

    where = {"dtype": options.dtype, "device": options.device, "remeasure": options.remeasure}
    draft = options.draft or default_draft(options.target)
    model = load(options.target, draft, method=None if draft else "ngram", **where)
    names = dict.fromkeys(("plain", "lookahead", "ngram", model.method))
    methods = {name: (model if name == model.method else model.with_method(name)).start for name in names}
    sizes = f" Trees of {model.method} size themselves." if draft else ""
    return model, methods, f"ngram and lookahead need no draft.{sizes}"


def prompts_for(target: str, model: "SpeculativeModel") -> "list[Prompt]":
    """Questions for a chat model; else the embedded models' held-out prompts."""
    from draftwing.data.prompts import Prompt, has_chat_template, read_prompts
    from draftwing.embedded import EMBEDDED_PROMPTS

    if target == "tiny" or not has_chat_template(model.tokenizer):
        return read_prompts(EMBEDDED_PROMPTS)
    return [Prompt(str(number), messages=({"role": "user", "content": text},)) for number, text in enumerate(QUESTIONS)]
