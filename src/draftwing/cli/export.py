"""`draftwing export`: a draft as another engine reads it, checked in that engine, published."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftwing.cli.arguments import DRAFTS, TARGETS, above_zero, without_use
from draftwing.cli.output import new_console, note, say_saved
from draftwing.config import DTYPES
from draftwing.drafts.family import ENGINES
from draftwing.embedded import EMBEDDED_PROMPTS

if TYPE_CHECKING:
    from rich.table import Table

    from draftwing.checks.check_export import Check, CheckRequest
    from draftwing.drafts.export_draft import Exported

SUMMARY = "Write a draft for another engine, refuse what that engine would read wrong, and check it there."
EXAMPLES = """examples:
  draftwing export tiny --target tiny --to vllm --output build/vllm
  draftwing export path/to/head --target org/model --to sglang --output build/sglang --dtype bfloat16
  draftwing export path/to/head --target org/model --to llama.cpp --target-gguf model.gguf --output build/llama
  draftwing export build/vllm --target tiny --check path/to/python  # one that has vLLM; the folder was exported before
  draftwing export build/vllm --target org/model --push-to-hub org/model-eagle3 --license apache-2.0"""

USED_WITH = {
    "dtype": {"output"},
    "force": {"output"},
    "to": {"output", "check"},
    "target_gguf": {"output", "check"},
    "verifier": {"output", "push-to-hub"},
    "license": {"output", "push-to-hub"},
    "private": {"push-to-hub"},
}
"""Options, and the parts of the command that they say something of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("draft", help=f"{DRAFTS}; without --output a folder that was exported before")
    parser.add_argument("--target", help=f"the draft's target: {TARGETS}")
    parser.add_argument("--to", choices=ENGINES, help="the engine; eagle is the EAGLE authors' code")
    parser.add_argument("--output", type=Path, help="the folder to write; it must not hold anything")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the file's)")
    parser.add_argument(
        "--verifier", default="", help="the target's name where the engine runs, and on the hub (default: --target)"
    )
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
    if options.push_to_hub:  # what cannot work is told before all else
        from draftwing.drafts.publish import check_publishing

        check_publishing(options.push_to_hub, _target_name(options))
    request = None if options.check is None else _check_request(options)
    result: dict[str, Any] = {}
    try:
        return _run(options, request, result)
    finally:
        if options.json and result:  # what was done, also where the next step fails
            print(json.dumps(result))


def _run(options: argparse.Namespace, request: "CheckRequest | None", result: dict[str, Any]) -> int:
    """Export, check and publish, as far as each is asked for; `result` is filled."""
    if options.output is not None:
        exported = _export(options)
        result |= asdict(exported) | {"folder": str(exported.folder)}
    if request is not None:
        check = _check(request, options.json)
        result["check"] = check.as_dict()
        if check.problems:
            if options.push_to_hub:
                note(f"nothing was published at {options.push_to_hub}", "red")
            return 1
    if options.push_to_hub:
        result["url"] = _push(options)
    return 0


def _folder(options: argparse.Namespace) -> Path:
    """What is checked and published."""
    return Path(options.draft) if options.output is None else options.output


def _target_name(options: argparse.Namespace) -> str:
    """The target's name on the hub."""
    from draftwing.drafts.publish import ExportFacts

    return options.verifier or options.target or ExportFacts.read(Path(options.draft)).target


def _check_options(options: argparse.Namespace) -> None:
    parts = {"output": options.output, "check": options.check, "push-to-hub": options.push_to_hub}
    asked = {name for name, value in parts.items() if value is not None}
    if not asked:
        raise ValueError("output: name the folder to write; without one a folder is checked or published (--check)")
    for name, places in without_use(options, USED_WITH, asked):
        option = name.replace("_", "-")
        raise ValueError(f"{option}: has no use without {' or '.join(f'--{place}' for place in sorted(places))}")
    if options.output is None and not Path(options.draft).is_dir():
        raise ValueError(f"draft: {options.draft} is no folder that was exported; name one to write (--output)")
    for name in ("target", "to") if options.output is not None else ():
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
    to, target = (options.to, options.target) if options.output else written_for(folder, options.to, options.target)
    checker = find_checker(to, options.check)
    prompts = spread(read_prompts(options.prompts), NUM_PROMPTS)
    return CheckRequest(folder, to, target, checker, prompts, options.target_gguf, seconds=options.check_seconds)


def _check(request: "CheckRequest", is_json: bool) -> "Check":
    """Check a folder, and show what agreed."""
    from draftwing.checks.check_export import check_export

    check = check_export(request, note)
    if not is_json:
        console = new_console()
        console.print(as_table(check))
        console.print(check.conclusion, style="red" if check.problems else "green", markup=False, soft_wrap=True)
    return check


def as_table(check: "Check") -> "Table":
    """A line for each prompt, or for what a loader read."""
    from rich.table import Table

    table = Table(title=f"{check.checker} {check.version}")
    if check.loaded is not None:
        table.add_column("fields and tensors", justify="right")
        table.add_column("read as written", justify="right")
        table.add_row(str(check.loaded.num_read), str(check.loaded.num_read - len(check.loaded.differing)))
        return table
    table.add_column("prompt")
    for name in ("tokens", "same", "cycles here", "there", "compared", "equal"):
        table.add_column(name, justify="right")
    for row in check.rows:
        parted = "all" if row.tokens_agree else f"up to {row.parted_at}"
        cells = (row.num_tokens, parted, row.num_cycles, row.their_cycles, row.num_compared, row.num_equal)
        table.add_row(row.prompt, *map(str, cells))
    return table


def _push(options: argparse.Namespace) -> str:
    from draftwing.drafts.publish import push_folder

    url = push_folder(
        _folder(options),
        options.push_to_hub,
        is_private=options.private,
        target=_target_name(options),
        license=options.license,
    )
    note(f"published at {url}")
    return url
