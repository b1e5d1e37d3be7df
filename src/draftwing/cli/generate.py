"""`draftwing generate`: text from a target and a draft, if asked beside plain decoding."""

import argparse
import json
from typing import Any

from rich.console import Console

from draftwing.cli.arguments import (
    add_device,
    add_execution,
    add_head_options,
    execution,
    head_options,
    positive,
    temperature,
)

SUMMARY = "Generate text with a target and a draft: EAGLE or Medusa heads, a smaller model, or none."
EXAMPLES = """examples:
  draftwing generate --target tiny --draft tiny --prompt "def main(args):"
  draftwing generate --target path/to/large-model --draft path/to/small-model --prompt "def main(args):"
  draftwing generate --target tiny --draft tiny --prompt "x = [1, 2, 3]" --plan tree:4x4x16 --ngram
  draftwing generate --target tiny --draft tiny --prompt "x = [1, 2, 3]" --quantize int8
  draftwing generate --target tiny --method lookahead --prompt "x = [1, 2, 3]" --compare
  draftwing generate --target tiny --draft tiny --chat --prompt "Write the Python function clamp." --compare
  draftwing generate --target meta-llama/Llama-3.1-8B-Instruct --draft yuhuili/EAGLE3-LLaMA3.1-Instruct-8B \\
      --device cuda --chat --prompt "Why is the sky blue?" --temperature 0.7 --seed 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--target", required=True, help="tiny (embedded), a folder or a hub id")
    parser.add_argument(
        "--draft", help="tiny, a folder or a hub id, of EAGLE or Medusa heads or a small model; without it, plain"
    )
    parser.add_argument("--prompt", required=True, help="the text to continue, or with --chat the user's message")
    parser.add_argument("--chat", action="store_true", help="put the prompt through the tokenizer's chat template")
    add_device(parser)
    add_execution(parser)
    parser.add_argument(
        "--method",
        choices=("plain", "ngram", "lookahead", "eagle1", "eagle2", "eagle3", "medusa", "draft_model"),
        help="default: what the draft is made for",
    )
    parser.add_argument(
        "--ngram",
        action=argparse.BooleanOptionalAction,
        help="let n-grams looked up in the text compete for an EAGLE tree's nodes (default: with --plan auto)",
    )
    parser.add_argument(
        "--draft-window", type=positive, help="an EAGLE head reads this many last tokens (default: as it was trained)"
    )
    parser.add_argument(
        "--plan",
        help="auto, off, chain:DEPTH, tree:WIDTHxDEPTHxNODES, eagle1 or medusa (their papers' trees), lookahead:WxNxG "
        "(default: the method's)",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="default: 128")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default)")
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
    add_head_options(parser)
    parser.add_argument("--compare", action="store_true", help="decode plainly too, and compare tokens and speed")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from draftwing.api import load
    from draftwing.data.prompts import Prompt, has_chat_template
    from draftwing.evaluation.demo import print_stream

    more = head_options(options) | execution(options)
    model = load(options.target, options.draft, options.dtype, options.device, options.method, **more)
    prompt = Prompt("prompt", text=options.prompt)
    if options.chat:
        if not has_chat_template(model.tokenizer):
            raise ValueError("chat: the target's tokenizer has no chat template; leave --chat out")
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


def _print_comparison(model: Any, ids: list[int], settings: dict[str, Any], as_json: bool) -> None:
    from draftwing.evaluation.compare import warm_up

    plain_model, plain_settings = model.with_method("plain"), settings | {"ngram": None, "draft_window": None}
    warm_up(plain_model.start, ids, **plain_settings)
    warm_up(model.start, ids, **settings)
    _, plain = _timed_run(plain_model, ids, plain_settings)
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

    generation, seconds = timed(model.start, [ids], **settings)
    tokens = generation.outputs[0].tokens
    text = cut_at_stop(tokens, settings["stop"], model.tokenizer)
    return generation, {
        "text": text,
        "token_ids": tokens,
        "num_tokens": len(tokens),
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
    }
