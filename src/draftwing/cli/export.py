"""`draftwing export`: a draft as another engine reads it."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from draftwing.cli.arguments import DRAFTS
from draftwing.cli.output import note, say_saved
from draftwing.config import DTYPES
from draftwing.drafts.family import ENGINES

SUMMARY = "Write a draft for another engine, and refuse what that engine would read wrong."
EXAMPLES = """examples:
  draftwing export tiny --target tiny --to vllm --output build/vllm
  draftwing export path/to/head --target org/model --to sglang --output build/sglang --dtype bfloat16
  draftwing export path/to/head --target org/model --to llama.cpp --target-gguf model.gguf --output build/llama"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("draft", help=DRAFTS)
    parser.add_argument("--target", required=True, help="the draft's target: tiny, a folder or a hub id")
    parser.add_argument("--to", required=True, choices=ENGINES, help="the engine; eagle is the EAGLE authors' code")
    parser.add_argument("--output", required=True, type=Path, help="the folder to write; it must not hold anything")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the file's)")
    parser.add_argument("--verifier", default="", help="the target's name where the engine runs (default: --target)")
    parser.add_argument("--target-gguf", type=Path, help="llama.cpp: the target's GGUF file, for its tokenizer")
    parser.add_argument(
        "--force", action="store_true", help="write what the engine would load and draft worse with, and say why"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from draftwing.drafts.export_draft import export_draft
    from draftwing.target.load import parse_dtype

    exported = export_draft(
        options.draft,
        options.target,
        options.to,
        options.output,
        dtype=parse_dtype(options.dtype),
        verifier=options.verifier,
        target_gguf=options.target_gguf,
        force=options.force,
    )
    if options.json:
        print(json.dumps(asdict(exported) | {"folder": str(exported.folder)}))
        return
    for fault in exported.faults:
        note(f"drafts worse there: {fault}", "yellow")
    for text in exported.notes:
        note(text, "yellow")
    print(exported.command)
    say_saved(exported.folder)
