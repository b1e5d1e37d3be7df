"""`draftwing export`: a draft as another engine reads it, checked in that engine, published."""

import argparse
import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftwing.cli.arguments import DRAFTS, above_zero
from draftwing.cli.output import new_console, note, say_saved
from draftwing.config import DTYPES
from draftwing.drafts.family import ENGINES
from draftwing.embedded import EMBEDDED_PROMPTS

if TYPE_CHECKING:
    from draftwing.checks.check_export import Check, CheckRequest
    from draftwing.drafts.export_draft import Exported

SUMMARY = "Write a draft for another engine, refuse what that engine would read wrong, and check it there."
EXAMPLES = """examples:
  draftwing export tiny --target tiny --to vllm --output build/vllm
  draftwing export path/to/head --target org/model --to sglang --output build/sglang --dtype bfloat16
  draftwing export path/to/head --target org/model --to llama.cpp --target-gguf model.gguf --output build/llama
  draftwing export build/vllm --target tiny --check path/to/python  # one that has vLLM; the folder was exported before
  draftwing export build/vllm --target org/model --push-to-hub org/model-eagle3 --license apache-2.0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("draft", help=f"{DRAFTS}; without --output a folder that was exported before")
    parser.add_argument("--target", help="the draft's target: tiny, a folder or a hub id")
    parser.add_argument("--to", choices=ENGINES, help="the engine; eagle is the EAGLE authors' code")
    parser.add_argument("--output", type=Path, help="the folder to write; it must not hold anything")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the file's)")
    parser.add_argument("--verifier", default="", help="the target's name where the engine runs (default: --target)")
    parser.add_argument("--target-gguf", type=Path, help="llama.cpp: the target's GGUF file, for its tokenizer")
    parser.add_argument(
        "--force", action="store_true", help="write what the engine would load and draft worse with, and say why"
    )
    checking = parser.add_argument_group("check the folder in its engine (docs/export.md)")
    checking.add_argument(
        "--check",
        nargs="?",
        const="",
        metavar="PATH",
        help="start the engine on the folder, decode in both, and compare tokens and accepted drafts (exit status 1 "
        "where they differ); PATH: a Python that has vLLM, speculators or transformers, or llama.cpp's server "
        "(default: $DRAFTWING_VLLM_PYTHON, $DRAFTWING_LLAMA_SERVER, ..., or what `make engines` has installed)",
    )
    checking.add_argument("--prompts", type=Path, default=EMBEDDED_PROMPTS, help="JSONL (default: embedded ones)")
    checking.add_argument(
        "--check-seconds", type=above_zero, default=600.0, help="for the engine's start and each answer (default: 600)"
    )
    publishing = parser.add_argument_group("publish the folder on the Hugging Face hub")
    publishing.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload it, with its model card")
    publishing.add_argument("--private", action="store_true", help="a new repository is private")
    publishing.add_argument("--license", default="", help="the draft's licence, for the model card: apache-2.0, ...")


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 where the engine does something else."""
    _check_options(options)
    request = None if options.check is None else _check_request(options)  # a missing engine is told before all else
    result: dict[str, Any] = {}
    if options.output is not None:
        exported = _export(options)
        result = asdict(exported) | {"folder": str(exported.folder)}
    check = None if request is None else _check(request, options.json)
    agrees = check is None or not check.problems
    if check is not None:
        result["check"] = check.as_dict()
    if options.push_to_hub and agrees:
        result["url"] = _push(options)
    if options.json:
        print(json.dumps(result))
    return 0 if agrees else 1


def _folder(options: argparse.Namespace) -> Path:
    """What is checked and published."""
    return Path(options.draft) if options.output is None else options.output


def _check_options(options: argparse.Namespace) -> None:
    if options.output is None:
        if options.check is None and not options.push_to_hub:
            raise ValueError("output: name the folder to write; without one a folder is checked or published (--check)")
        if not Path(options.draft).is_dir():
            raise ValueError(f"draft: {options.draft} is no folder that was exported; name one to write (--output)")
        return
    for name in ("target", "to"):
        if not getattr(options, name):
            raise ValueError(f"{name}: needed to write a folder (see draftwing export --help)")


def _export(options: argparse.Namespace) -> "Exported":
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
        license=options.license,
    )
    if not options.json:
        for fault in exported.faults:
            note(f"drafts worse there: {fault}", "yellow")
        for text in exported.notes:
            note(text, "yellow")
        print(exported.command)
        say_saved(exported.folder)
    return exported


def _check_request(options: argparse.Namespace) -> "CheckRequest":
    from draftwing.checks.check_export import NUM_PROMPTS, CheckRequest, written_for
    from draftwing.checks.find_engine import find_checker
    from draftwing.data.prompts import read_prompts, spread

    folder = _folder(options)
    engine, target = (options.to, options.target) if options.output else written_for(folder, options.to, options.target)
    checker = find_checker(engine, options.check)
    prompts = spread(read_prompts(options.prompts), NUM_PROMPTS)
    return CheckRequest(folder, engine, target, checker, prompts, options.target_gguf, seconds=options.check_seconds)


def _check(request: "CheckRequest", is_json: bool) -> "Check":
    """Check a folder, and show what agreed."""
    from draftwing.checks.check_export import check_export
    from draftwing.checks.check_table import as_table, verdict

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the engine ends, too
    try:
        check = check_export(request, note)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not is_json:
        console = new_console()
        console.print(as_table(check))
        console.print(verdict(check), style="red" if check.problems else "green", markup=False, soft_wrap=True)
    return check


def _push(options: argparse.Namespace) -> str:
    from draftwing.drafts.publish import push_folder

    url = push_folder(_folder(options), options.push_to_hub, options.private)
    note(f"published at {url}")
    return url
