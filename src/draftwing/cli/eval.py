"""`draftwing eval`: methods, data sets and temperatures on one target, beside plain decoding and other engines."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftwing.cli.arguments import (
    DRAFTS,
    TARGETS,
    add_device,
    add_execution,
    add_remeasure,
    positive,
    read_by,
    seed,
    temperatures,
)
from draftwing.cli.output import new_console, note, say_saved
from draftwing.data.benchmarks import BENCHMARKS
from draftwing.drafts.kinds import family_of
from draftwing.evaluation.specs import MethodSpec, read_specs
from draftwing.files import write_text

if TYPE_CHECKING:
    from draftwing.evaluation.evaluate import Evaluation

KNOWN_DATA = ("embedded", *BENCHMARKS)

SUMMARY = "Measure methods on data sets: tokens/s, speed-up, tau, acceptance, sameness."
EXAMPLES = """examples:
  draftwing eval                                                # the embedded models, about a minute
  draftwing eval --methods plain,eagle3,eagle3:chain:5,eagle3:tree:4x5x26+uncoupled --temperatures 0
  draftwing eval --target path/to/model --draft old=path/to/head --draft new=path/to/other \\
      --data mt_bench,mine=prompts.jsonl --max-new-tokens 256 --device cuda --output results/heads
  draftwing eval --against transformers --against http://localhost:8000/v1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--target", default="tiny", help=f"{TARGETS} (default: tiny)")
    parser.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="[NAME=]DRAFT",
        help=f"{DRAFTS}, of a head or a small model; may be given several times (default: all embedded drafts of an "
        "embedded target)",
    )
    parser.add_argument(
        "--methods",
        type=read_by(read_specs),
        default="all",
        help="comma-separated: METHOD[@DRAFT][:PLAN][+OPTION...], where options are ngram (looked-up continuations "
        "compete for the tree's nodes, as by default in `generate`) and uncoupled (drafts do not know the target's "
        "noise); `all` (default) is every method that the drafts allow",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME[=PATH]",
        help=f"comma-separated: embedded (the default), {', '.join(BENCHMARKS)} (from the hub), or JSONL files of "
        "prompt, messages or turns",
    )
    parser.add_argument("--temperatures", type=temperatures, default=(0.0, 1.0), help="default: 0,1")
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="per turn (default: 128)")
    parser.add_argument(
        "--num-prompts",
        type=positive,
        help="of each data set, evenly spread (default: 80 at most, 8 of the embedded ones)",
    )
    parser.add_argument("--repeats", type=positive, default=1, help="runs of each turn; the median counts (default: 1)")
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    add_device(parser)
    add_execution(parser)
    add_remeasure(parser)
    parser.add_argument(
        "--output",
        type=Path,
        help="a folder for results.json, report.html and runs.jsonl, from which a stopped run goes on",
    )
    parser.add_argument("--fresh", action="store_true", help="start anew where --output has runs already")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="ENGINE",
        help="measure another engine too: transformers, or the URL of an OpenAI-compatible API (http://host:port/v1)",
    )
    parser.add_argument("--assistant", help="a model for transformers' assisted generation: a folder or a hub id")
    parser.add_argument("--endpoint-model", help="the model's name at the URL (default: the first it serves)")


def run(options: argparse.Namespace) -> int:
    """Run the command; 1 if a method failed, or no turn could be decoded."""
    _check_engines(options)
    sources, wanted = _data_sources(options.data or ["embedded"]), options.methods
    from draftwing.cli.eval_setup import check_drafts, prepare, read_data, read_drafts, settings_of
    from draftwing.evaluation.evaluate import Remarks, evaluate
    from draftwing.evaluation.journal import Journal
    from draftwing.progress import progress_bar
    from draftwing.target.load import check_device

    check_device(options.device)
    drafts = read_drafts(options)
    check_drafts(wanted, drafts)
    data = read_data(options, sources)
    settings = settings_of(options, drafts, wanted, data)
    journal, remarks = Journal(settings, options.output, options.fresh), Remarks()
    methods, evaluation = prepare(options, drafts, wanted, data)
    is_stopped = False
    with progress_bar(console=new_console(stderr=True), transient=True) as progress:
        task = progress.add_task("decoding", total=evaluation.num_decodings)
        try:
            evaluate(evaluation, journal, remarks, lambda done: progress.advance(task, done))
        except KeyboardInterrupt:
            is_stopped = True
    _show(options, _report(options, evaluation, journal, remarks, methods, settings))
    if is_stopped:
        raise KeyboardInterrupt
    return 1 if remarks.failures or not journal.runs else 0


def _check_engines(options: argparse.Namespace) -> None:
    urls = [engine for engine in options.against if engine.startswith(("http://", "https://"))]
    for engine in options.against:
        if engine not in (*urls, "transformers"):
            raise ValueError(f"against: expected transformers or a URL such as http://host:port/v1, got {engine!r}")
    if options.assistant and "transformers" not in options.against:
        raise ValueError("assistant: needs --against transformers")
    if options.endpoint_model and not urls:
        raise ValueError("endpoint-model: needs --against URL")


def _data_sources(texts: Sequence[str]) -> dict[str, str]:
    """The data sets by name with their files, where they have one.

    Raises:
        ValueError: an unknown data set, two of one name.
    """
    sources: dict[str, str] = {}
    for part in (part for text in texts for part in text.split(",")):
        name, has_path, path = part.partition("=")
        if has_path and not path:
            raise ValueError(f"data: expected NAME=PATH, got {part!r}")
        if not has_path and name not in KNOWN_DATA:
            if not Path(part).is_file():
                raise ValueError(f"data: expected NAME=PATH, a file, or one of {', '.join(KNOWN_DATA)}; got {part!r}")
            name, path = Path(part).stem, part
        if name in sources:
            raise ValueError(f"data: two data sets are called {name}; name them: NAME=PATH")
        sources[name] = path
    return sources


def _report(
    options: argparse.Namespace,
    evaluation: "Evaluation",
    journal: Any,
    remarks: Any,
    methods: dict[str, "MethodSpec"],
    settings: dict[str, Any],
) -> Any:
    from draftwing.data.prompts import has_chat_template
    from draftwing.evaluation.compare import memory_kind
    from draftwing.evaluation.figures import ablations, result_rows
    from draftwing.evaluation.report import Report
    from draftwing.intervals import FEWEST_PROMPTS
    from draftwing.provenance import provenance

    chains = [
        name for name, spec in methods.items() if spec.is_chain and "draft_window" in family_of(spec.method).takes
    ]
    rows = result_rows(evaluation, journal, remarks, chains)
    warnings = []
    is_chat = any(prompt.messages for data in evaluation.data for prompt in data.prompts)
    if is_chat and not has_chat_template(evaluation.tokenizer):
        warnings.append("the tokenizer has no chat template: turns are put as plain text")
    warnings += [
        f"{data.name}: intervals over fewer than {FEWEST_PROMPTS} prompts mean nothing, and it has {len(data.prompts)}"
        for data in evaluation.data
        if len(data.prompts) < FEWEST_PROMPTS
    ]
    target = f"{options.target} in {options.quantize}" if options.quantize else options.target
    title = f"{target} on {options.device}, up to {options.max_new_tokens} new tokens"
    memory = memory_kind(options.device)
    return Report(title, rows, ablations(rows, methods), remarks.skipped, warnings, memory, settings, provenance())


def _show(options: argparse.Namespace, report: Any) -> None:
    """Print the results, and write them if asked."""
    from draftwing.evaluation.report import as_html, as_tables, remarks

    record = report.as_dict()
    if options.output:  # before whoever reads what is printed may be gone
        write_text(options.output / "results.json", json.dumps(record, indent=2) + "\n")
        write_text(options.output / "report.html", as_html(report))
    console = new_console(stderr=options.json)
    if options.json:
        print(json.dumps(record))
    else:
        console.print(as_tables(report))
        console.print("Speed-ups are over plain; tau: tokens per target pass; same: turns whose output equals plain's.")
        console.print("Brackets: 95 % intervals over prompts.")
    for line in remarks(report):
        note(line, "yellow")
    if options.output:
        say_saved(*(options.output / name for name in ("results.json", "report.html", "runs.jsonl")))
