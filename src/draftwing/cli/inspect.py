"""`draftwing inspect`: what a draft is, and what does not fit."""

import argparse
import json
from dataclasses import asdict

from draftwing.cli.arguments import DRAFTS
from draftwing.cli.output import print_facts

SUMMARY = "Say what a draft head or draft model is, and what does not fit."
EXAMPLES = """examples:
  draftwing inspect tiny
  draftwing inspect path/to/small-model --target path/to/large-model
  draftwing inspect path/to/head --target meta-llama/Llama-3.1-8B-Instruct --json"""

EXIT_STATUS = (
    "Exit status: 0 if all is well, 1 if something is missing, broken or does not fit, 2 if it cannot be read."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.description = f"{SUMMARY}\n{EXIT_STATUS}"
    parser.add_argument("draft", help=DRAFTS)
    parser.add_argument("--target", help="also check the draft against this target (config and tokenizer are enough)")


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 if something is wrong with the draft."""
    from draftwing.drafts.inspect_draft import inspect_draft, report_table

    report = inspect_draft(options.draft, options.target)
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        print_facts(report_table(report, options.target))
    return int(bool(report.problems))
