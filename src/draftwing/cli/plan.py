"""`draftwing plan`: what a cycle costs, what is accepted, and which trees pay."""

import argparse
import json

from draftwing.cli.arguments import (
    DRAFTS,
    TARGETS,
    add_loading,
    loading,
    positive,
    temperature,
)
from draftwing.cli.output import new_console, say_saved
from draftwing.drafts.kinds import sized_methods, suitable_draft

SUMMARY = "Measure what a cycle costs and what is accepted, and show which trees pay."
EXAMPLES = """examples:
  draftwing plan --target tiny --draft tiny
  draftwing plan --target tiny --draft tiny --batch-size 8 --temperature 1 --json
  draftwing plan --target path/to/model --draft path/to/head --prompts prompts.jsonl --save"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--target", required=True, help=TARGETS)
    parser.add_argument("--draft", required=True, help=DRAFTS)
    add_loading(parser, sized_methods())
    parser.add_argument("--batch-size", type=positive, default=1, help="rows that are decoded together (default: 1)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--prompts", help="a JSONL file with prompt, messages or turns (default: the embedded ones)")
    parser.add_argument("--max-new-tokens", type=positive, default=64, help="per prompt (default: 64)")
    parser.add_argument("--save", action="store_true", help="write the acceptance beside the draft, to start from")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from draftwing.api import load
    from draftwing.data.prompts import read_prompts
    from draftwing.drafts.load_draft import resolve_draft
    from draftwing.embedded import EMBEDDED_PROMPTS
    from draftwing.evaluation.planning import as_tables, implied_plan, measure_plan, save_acceptance

    prompts = read_prompts(options.prompts or EMBEDDED_PROMPTS)
    place = resolve_draft(suitable_draft(options.draft, options.method)) if options.save else None
    if place is not None and place.is_file():
        raise ValueError(f"save: acceptance is kept in a draft's folder, and {place} is a file")
    model = load(options.target, options.draft, **loading(options))
    ids = [prompt.token_ids(model.tokenizer) for prompt in prompts]
    settings = {"temperature": options.temperature, "max_new_tokens": options.max_new_tokens}
    model.check(ids, **settings)
    progress = new_console(stderr=True)
    with progress.status("measuring costs"):
        batch_size = min(options.batch_size, len(ids))
        costs = model.costs(batch_size, sampled=options.temperature > 0)
    with progress.status("decoding prompts, plain and with trees that size themselves"):
        report = measure_plan(
            model.start,
            model.experience(batch_size, options.temperature > 0),
            costs,
            ids,
            batch_size,
            **settings,
        )
    name = "sampled" if options.temperature > 0 else "greedy"
    saved = None if place is None else save_acceptance(place, {name: report.experience.acceptance})
    if options.json:
        print(json.dumps(report.as_dict()))
    else:
        console = new_console()
        console.print(as_tables(report))
        for sentence in implied_plan(report):
            console.print(sentence)
    if saved is not None:
        say_saved(saved)
