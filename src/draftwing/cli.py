"""The command line: one short function per command; heavy imports happen inside the commands."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from rich.console import Console

DEMO_EAGLE2_PLAN = "tree:4x5x26"
EXAMPLES = {
    "demo": """examples:
  draftwing demo                        # watch the embedded models, then the table
  draftwing demo --json > demo.json     # the table alone, for machines
  draftwing demo --dtype bfloat16 --repeats 5""",
    "generate": """examples:
  draftwing generate --target tiny --draft tiny --prompt "def main(args):"
  draftwing generate --target path/to/large-model --draft path/to/small-model --prompt "def main(args):"
  draftwing generate --target tiny --draft tiny --prompt "x = [1, 2, 3]" --ngram
  draftwing generate --target tiny --draft tiny --chat --prompt "Write the Python function clamp." --compare
  draftwing generate --target meta-llama/Llama-3.1-8B-Instruct --draft yuhuili/EAGLE3-LLaMA3.1-Instruct-8B \\
      --device cuda --chat --prompt "Why is the sky blue?" --temperature 0.7 --seed 1""",
    "plan": """examples:
  draftwing plan --target tiny --draft tiny
  draftwing plan --target tiny --draft tiny --batch-size 8 --temperature 1 --json
  draftwing plan --target path/to/model --draft path/to/head --prompts prompts.jsonl --save""",
    "inspect": """examples:
  draftwing inspect tiny
  draftwing inspect path/to/small-model --target path/to/large-model
  draftwing inspect path/to/head --target meta-llama/Llama-3.1-8B-Instruct --json""",
    "train": """examples:
  draftwing train recipes/tiny.yaml            # all stages; a stopped run continues where it was
  draftwing train recipes/tiny.yaml --stage 2  # the third stage alone""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends with a one-line message and status 2, Ctrl-C with 130."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="draftwing", description="Speculative decoding with EAGLE heads: faster, and exactly the same tokens."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    _add_generate(commands)
    _add_plan(commands)
    _add_inspect(commands)
    _add_train(commands)
    return parser


def run_demo(options: argparse.Namespace) -> None:
    from draftwing.api import load
    from draftwing.checkpoint.load import ASSETS
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
        "eagle2": partial(eagle1.with_method("eagle2").start, plan=DEMO_EAGLE2_PLAN),
        "eagle3": eagle3.start,
    }
    prompts = read_prompts(ASSETS / "tiny" / "prompts.jsonl")[: options.prompts]
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
    console.print(f"Trees: EAGLE-1 the paper's of 26 nodes, EAGLE-2 {DEMO_EAGLE2_PLAN}, EAGLE-3 sized by themselves.")


def run_generate(options: argparse.Namespace) -> None:
    from draftwing.api import load
    from draftwing.data.prompts import Prompt
    from draftwing.evaluation.demo import print_stream

    model = load(options.target, options.draft, options.dtype, options.device, options.method)
    prompt = Prompt("prompt", text=options.prompt)
    if options.chat:
        prompt = Prompt("prompt", messages=({"role": "user", "content": options.prompt},))
    ids = prompt.token_ids(model.tokenizer)
    settings = {
        name: getattr(options, name)
        for name in (
            *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
            *("seed", "stop", "plan", "ngram", "draft_window"),
        )
    }
    if options.compare:
        _print_comparison(model, ids, settings, options.json)
    elif options.json:
        generation, run = _timed_run(model, ids, settings)
        reason = generation.outputs[0].finish_reason
        print(json.dumps(run | {"finish_reason": reason, "statistics": generation.statistics.as_dict()}))
    else:
        console = Console(highlight=False)
        generation = model.start([ids], **settings)
        print_stream(console, generation.cycles(), model.tokenizer)
        figures = generation.statistics
        Console(stderr=True).print(
            f"{figures.num_tokens} tokens in {figures.total_seconds:.2f} s, tau {figures.acceptance_length:.2f}",
            style="dim",
        )


def run_plan(options: argparse.Namespace) -> None:
    from draftwing.api import load, suitable_draft
    from draftwing.checkpoint.load import ASSETS, resolve_draft
    from draftwing.data.prompts import read_prompts
    from draftwing.evaluation.planning import as_tables, implied_plan, measure_plan, save_acceptance

    prompts = read_prompts(options.prompts or ASSETS / "tiny" / "prompts.jsonl")
    model = load(options.target, options.draft, options.dtype, options.device, options.method)
    ids = [prompt.token_ids(model.tokenizer) for prompt in prompts]
    console, progress = Console(), Console(stderr=True)
    with progress.status("measuring costs"):
        batch_size = min(options.batch_size, len(ids))
        costs = model.costs(batch_size)
    with progress.status("decoding prompts, plain and with trees that size themselves"):
        report = measure_plan(
            model.start,
            model.experience(batch_size, options.temperature > 0),
            costs,
            ids,
            batch_size,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
        )
    if options.json:
        print(json.dumps(report.as_dict()))
    else:
        console.print(as_tables(report))
        for sentence in implied_plan(report):
            console.print(sentence)
    if options.save:
        name = "sampled" if options.temperature > 0 else "greedy"
        file = save_acceptance(
            resolve_draft(suitable_draft(options.draft, options.method)), {name: report.experience.acceptance}
        )
        progress.print(f"acceptance written to {file}")


def run_inspect(options: argparse.Namespace) -> None:
    from draftwing.checkpoint.inspect import inspect_draft, report_table

    report = inspect_draft(options.draft, options.target)
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        Console().print(report_table(report))


def run_train(options: argparse.Namespace) -> None:
    from draftwing.config import read_recipe
    from draftwing.training.train import train_stage

    stages = read_recipe(options.recipe)
    if options.stage is not None and not 0 <= options.stage < len(stages):
        raise ValueError(f"stage: {options.recipe} has stages 0 to {len(stages) - 1}, got {options.stage}")
    chosen = stages if options.stage is None else [stages[options.stage]]
    for stage in chosen:
        Console(stderr=True).rule(f"{stage.objective} -> {stage.output}")
        print(json.dumps({"objective": stage.objective, "output": stage.output, **train_stage(stage)}))


def _print_comparison(model: Any, ids: list[int], settings: dict[str, Any], as_json: bool) -> None:
    from draftwing.evaluation.compare import warm_up

    plain_model = model.with_method("plain")
    warm_up(plain_model.start, ids, **settings)
    warm_up(model.start, ids, **settings)
    _, plain = _timed_run(plain_model, ids, settings)
    generation, speculative = _timed_run(model, ids, settings)
    result = {
        "plain": plain,
        "speculative": speculative,
        "acceptance_length": generation.statistics.acceptance_length,
        "speedup": speculative["tokens_per_second"] / plain["tokens_per_second"],
        "identical": speculative["token_ids"] == plain["token_ids"],
    }
    if as_json:
        print(json.dumps(result))
        return
    console = Console(highlight=False)
    console.print(speculative["text"], markup=False)
    console.print(
        f"plain {plain['tokens_per_second']:.0f} tokens/s, "
        f"{model.method} {speculative['tokens_per_second']:.0f} tokens/s "
        f"({result['speedup']:.2f}x), tau {result['acceptance_length']:.2f}, "
        f"identical: {'yes' if result['identical'] else 'NO'}",
        style="bold",
    )


def _timed_run(model: Any, ids: list[int], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from draftwing.decoding.stopping import cut_at_stop
    from draftwing.evaluation.compare import timed

    generation, seconds = timed(model.start, ids, **settings)
    tokens = generation.outputs[0].tokens
    text = cut_at_stop(model.tokenizer.decode(tokens, skip_special_tokens=True), settings["stop"])
    return generation, {
        "text": text,
        "token_ids": tokens,
        "num_tokens": len(tokens),
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
    }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _add_command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or float64 (default: the file's; float32 on a CPU without bf16)"
    )


def _add_demo(commands: Any) -> None:
    parser = _add_command(
        commands, "demo", run_demo, "Watch plain and EAGLE decoding of the embedded models side by side."
    )
    _add_device(parser)
    parser.add_argument("--prompts", type=_positive, default=8, help="how many of the held-out prompts (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="per prompt (default: 128)")
    parser.add_argument(
        "--repeats", type=_positive, default=3, help="runs of each prompt; the median counts (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the runs at temperature 1 (default: 0)")


def _add_generate(commands: Any) -> None:
    parser = _add_command(
        commands, "generate", run_generate, "Generate text with a target and a draft: an EAGLE head or a smaller model."
    )
    parser.add_argument("--target", required=True, help="tiny (embedded), a folder or a hub id")
    parser.add_argument(
        "--draft", help="tiny, a folder or a hub id, of an EAGLE head or a small model; without it, plain"
    )
    parser.add_argument("--prompt", required=True, help="the text to continue, or with --chat the user's message")
    parser.add_argument("--chat", action="store_true", help="put the prompt through the tokenizer's chat template")
    _add_device(parser)
    parser.add_argument(
        "--method",
        choices=("plain", "ngram", "eagle1", "eagle2", "eagle3", "draft_model"),
        help="default: what the draft is made for",
    )
    parser.add_argument(
        "--ngram", action="store_true", help="let n-grams looked up in the text compete for an EAGLE tree's nodes"
    )
    parser.add_argument(
        "--draft-window", type=_positive, help="an EAGLE head reads this many last tokens (default: all)"
    )
    parser.add_argument(
        "--plan", help="auto (default), off, chain:DEPTH, tree:WIDTHxDEPTHxNODES or eagle1 (EAGLE-1's tree)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: 1 (off)")
    parser.add_argument("--top-k", type=int, default=0, help="default: 0 (off)")
    parser.add_argument("--min-p", type=float, default=0.0, help="default: 0 (off)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="default: 1 (off)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help="end at this text, which --json and --compare cut off; may be given several times",
    )
    parser.add_argument("--compare", action="store_true", help="decode plainly too, and compare tokens and speed")


def _add_plan(commands: Any) -> None:
    parser = _add_command(
        commands, "plan", run_plan, "Measure what a cycle costs and what is accepted, and show which trees pay."
    )
    parser.add_argument("--target", required=True, help="tiny, a folder or a hub id")
    parser.add_argument("--draft", required=True, help="tiny, tiny-eagle1, a folder or a hub id")
    _add_device(parser)
    parser.add_argument("--method", choices=("eagle2", "eagle3", "draft_model"), help="default: what the draft is for")
    parser.add_argument("--batch-size", type=_positive, default=1, help="rows that are decoded together (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--prompts", help="a JSONL file with prompt, messages or turns (default: the embedded ones)")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, help="per prompt (default: 64)")
    parser.add_argument("--save", action="store_true", help="write the acceptance beside the draft, to start from")


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands, "inspect", run_inspect, "Say what a draft head or draft model is, and what does not fit."
    )
    parser.add_argument("draft", help="tiny, tiny-eagle1, a folder or a hub id")
    parser.add_argument("--target", help="also check the draft against this target (config and tokenizer are enough)")


def _add_train(commands: Any) -> None:
    parser = _add_command(commands, "train", run_train, "Train what a recipe describes.")
    parser.add_argument("recipe", help="a YAML file, see recipes/")
    parser.add_argument("--stage", type=int, help="run this stage only, counted from 0")


if __name__ == "__main__":
    sys.exit(main())
