"""`draftwing generate`: text from a target and a draft, if asked beside plain decoding."""

import argparse
import json
import sys
from typing import Any

from draftwing.cli.arguments import (
    DRAFTS,
    TARGETS,
    above_zero,
    add_loading,
    add_plan,
    finite,
    loading,
    not_negative,
    plain_text,
    positive,
    positive_share,
    seed,
    share,
    temperature,
)
from draftwing.cli.output import new_console, note
from draftwing.drafts.kinds import PLAIN, check_drafting, drafts_in_words

SUMMARY = "Generate text with a target, and a draft or none."
EXAMPLES = """examples:
  draftwing generate --target tiny --draft tiny --prompt "def main(args):"
  draftwing generate --target tiny --draft tiny --prompt -  # standard input
  draftwing generate --target path/to/large-model --draft path/to/small-model --prompt "def main(args):"
  draftwing generate --target tiny --draft tiny --prompt "x = [1, 2, 3]" --plan tree:4x4x16 --ngram
  draftwing generate --target tiny --draft tiny --prompt "x = [1, 2, 3]" --quantize int8
  draftwing generate --target tiny --method lookahead --prompt "x = [1, 2, 3]" --compare
  draftwing generate --target tiny --draft tiny --chat --prompt "Write the Python function clamp." --compare
  draftwing generate --target meta-llama/Llama-3.1-8B-Instruct --draft yuhuili/EAGLE3-LLaMA3.1-Instruct-8B \\
      --device cuda --chat --prompt "Why is the sky blue?" --temperature 0.7 --seed 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--target", required=True, help=TARGETS)
    parser.add_argument("--draft", help=f"{DRAFTS}, of {drafts_in_words()}; without it, {PLAIN}")
    parser.add_argument(
        "--prompt",
        type=plain_text,
        help="the text to continue, or with --chat the user's message; - (or none, where something is piped in) reads "
        "standard input, without the newline at its end",
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt through the tokenizer's chat template")
    add_loading(parser)
    parser.add_argument(
        "--ngram",
        action=argparse.BooleanOptionalAction,
        help="let n-grams looked up in the text compete for an EAGLE tree's nodes (default: with --plan auto)",
    )
    parser.add_argument(
        "--draft-window", type=positive, help="an EAGLE head reads this many last tokens (default: as it was trained)"
    )
    add_plan(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=128, help="default: 128")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=positive_share, default=1.0, help="default: 1 (off)")
    parser.add_argument("--top-k", type=not_negative, default=0, help="default: 0 (off)")
    parser.add_argument("--min-p", type=share, default=0.0, help="default: 0 (off)")
    parser.add_argument("--repetition-penalty", type=above_zero, default=1.0, help="default: 1 (off)")
    parser.add_argument("--presence-penalty", type=finite, default=0.0, help="default: 0 (off)")
    parser.add_argument("--frequency-penalty", type=finite, default=0.0, help="default: 0 (off)")
    parser.add_argument("--min-new-tokens", type=not_negative, default=0, help="default: 0 (an end may come at once)")
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    parser.add_argument(
        "--stop",
        action="append",
        type=plain_text,
        default=[],
        help="end at this text, which --json and --compare cut off; may be given several times",
    )
    parser.add_argument("--compare", action="store_true", help="decode plainly too, and compare tokens and speed")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    text = read_prompt(options.prompt)  # mistakes are found before the models are loaded
    settings = {
        name: getattr(options, name)
        for name in (
            *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
            *("presence_penalty", "frequency_penalty", "min_new_tokens"),
            *("seed", "stop", "plan", "ngram", "draft_window"),
        )
    }
    if options.method or not options.draft:  # else the draft tells which
        check_drafting(options.method or PLAIN, options.plan, options.ngram, options.draft_window)
    from draftwing.api import load
    from draftwing.data.prompts import Prompt, has_chat_template

    model = load(options.target, options.draft, **loading(options))
    prompt = Prompt("prompt", text=text)
    if options.chat:
        if not has_chat_template(model.tokenizer):
            raise ValueError("chat: the target's tokenizer has no chat template; leave --chat out")
        prompt = Prompt("prompt", messages=({"role": "user", "content": text},))
    ids = prompt.token_ids(model.tokenizer)
    if options.compare:
        print_comparison(model, ids, settings, options.json)
    elif options.json:
        generation, run = timed_run(model, ids, settings)
        reason = generation.outputs[0].finish_reason
        print(json.dumps(run | {"finish_reason": reason, "statistics": generation.statistics.as_dict()}))
    else:
        _print_stream(model, ids, settings)


def read_prompt(given: str | None) -> str:
    if given not in (None, "-"):
        return str(given)
    if given is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("prompt: expected --prompt TEXT, or a text on standard input")
    try:
        text = sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt: standard input is not UTF-8: {error}") from None
    if not text:
        raise ValueError("prompt: standard input is empty; expected --prompt TEXT, or a text there")
    return text


def _print_stream(model: Any, ids: list[int], settings: dict[str, Any]) -> None:
    from draftwing.evaluation.side_by_side import LEGEND, print_stream

    console = new_console()
    generation = model.start([ids], **settings)
    print_stream(console, generation.cycles(), model.tokenizer)
    figures = generation.statistics
    legend = f" ({LEGEND})" if console.is_terminal and model.method != PLAIN else ""
    note(
        f"{figures.num_tokens} tokens in {figures.total_seconds:.2f} s, tau {figures.acceptance_length:.2f}{legend}",
        "dim",
    )


def print_comparison(model: Any, ids: list[int], settings: dict[str, Any], as_json: bool) -> None:
    """Decode plainly too, and say how long both took and whether they are the same."""
    from draftwing.evaluation.compare import warm_up
    from draftwing.evaluation.side_by_side import print_text

    plain_model = model.with_method(PLAIN)
    plain_settings = settings | {"plan": None, "ngram": None, "draft_window": None}
    warm_up(plain_model.start, ids, **plain_settings)
    warm_up(model.start, ids, **settings)
    _, plain = timed_run(plain_model, ids, plain_settings)
    generation, speculative = timed_run(model, ids, settings)
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
    console = new_console()
    print_text(console, speculative["text"] + "\n")
    console.print(
        f"plain {plain['tokens_per_second']:.0f} tokens/s, "
        f"{model.method} {speculative['tokens_per_second']:.0f} tokens/s "
        f"({result['speedup']:.2f}x), tau {result['acceptance_length']:.2f}, "
        f"identical: {'yes' if result['identical'] else 'NO'}",
        style="bold",
    )


def timed_run(model: Any, ids: list[int], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A generation, run to its end, with its text, tokens and seconds."""
    from draftwing.engine.stopping import cut_at_stop
    from draftwing.evaluation.compare import timed

    generation, seconds = timed(model.start, [ids], **settings)
    output = generation.outputs[0]
    tokens = output.tokens
    text = cut_at_stop(tokens, settings["stop"] if output.finish_reason == "stop" else (), model.tokenizer)
    return generation, {
        "text": text,
        "token_ids": tokens,
        "num_tokens": len(tokens),
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
    }
