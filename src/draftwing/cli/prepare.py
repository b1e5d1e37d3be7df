"""`draftwing prepare`: data for training: tokenised once, answered by the target, or with the target's features."""

import argparse
import json
import os
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftwing.cli.arguments import (
    TARGETS,
    add_device,
    layers,
    not_negative,
    positive,
    read_by,
    seed,
    temperature,
    temperatures_in_turn,
    without_use,
)
from draftwing.cli.output import headline, new_console, note, say_saved
from draftwing.drafts.kinds import head_objectives

if TYPE_CHECKING:
    from draftwing.api import SpeculativeModel
    from draftwing.config import TrainConfig
    from draftwing.data.chat_template import Example
    from draftwing.prepare.self_generated import EngineAnswers, RunPart

SUMMARY = "Prepare training data: tokenise it once, let the target answer or write it, or store the target's features."
EXAMPLES = """examples:
  draftwing prepare --data chats.jsonl --target path/to/model --output build/data --preview 1
  draftwing prepare --data hub:HuggingFaceH4/ultrachat_200k:train_sft more.jsonl --target org/model --output build/data
  draftwing prepare --regenerate --data chats.jsonl --target tiny --draft tiny --output build/answers.jsonl
  draftwing prepare --regenerate --data chats.jsonl --target org/model --endpoint http://localhost:8000/v1 \\
      --model org/model --concurrency 64 --shard 1/8 --output build/answers-1.jsonl
  draftwing prepare --from-target 1000 --target smollm2 --max-new-tokens 256 --output build/rows.jsonl --preview 3
  draftwing prepare --features --data build/data --target path/to/model --output build/features --storage fp8"""


USED_WITH = {
    **dict.fromkeys(("shard", "draft", "max_new_tokens"), ("regenerate", "from_target")),
    "endpoint": ("regenerate",),
    "model": ("endpoint",),
    "request_prefixes": ("from_target",),
    **dict.fromkeys(("aux_layers", "verify"), ("features",)),
}
"""Options, and those that they say something of."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument(
        "--data",
        nargs="+",
        help="stdlib, files (.jsonl, .json, .txt), hub:org/name[/config][:split]; with --features a prepared folder",
    )
    parser.add_argument("--target", required=True, help=f"{TARGETS}; its tokenizer and template count")
    parser.add_argument("--output", required=True, help="a folder; with --regenerate and --from-target a .jsonl file")
    parser.add_argument("--sequence-length", type=positive, default=2048, help="longest document (default: 2048)")
    parser.add_argument(
        "--max-rows",
        type=positive,
        help="so many training rows, a fair sample; of answers, so many rows in all (default: all, of answers 64 "
        "held-out ones at most)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the order and the sampling (default: 0)")
    parser.add_argument("--workers", type=positive, help="processes that tokenise (default: cores, at most 8)")
    parser.add_argument(
        "--preview", type=not_negative, default=0, metavar="N", help="show N documents, what is supervised green"
    )
    add_device(parser)
    answers = parser.add_argument_group("answers by the target")
    answers.add_argument("--regenerate", action="store_true", help="replace every answer by the target's own")
    answers.add_argument("--draft", help="speculate with this head or small model (the answers stay the same)")
    answers.add_argument("--endpoint", help="let an OpenAI-compatible server answer, such as http://localhost:8000/v1")
    answers.add_argument("--model", help="the endpoint's name of the target")
    answers.add_argument("--concurrency", type=positive, default=16, help="requests in flight (default: 16)")
    answers.add_argument("--shard", type=read_by(_parse_shard), help="answer part I of N, as 2/8 (default: 1/1)")
    answers.add_argument(
        "--temperatures", type=temperatures_in_turn, nargs="+", default=[(0.0, 1.0)], help="in turn (default: 0,1)"
    )
    answers.add_argument(
        "--max-new-tokens",
        type=positive,
        help="per answer (default: what the sequence leaves, half of it at an endpoint)",
    )
    answers.add_argument("--batch-size", type=positive, default=16, help="rows answered together (default: 16)")
    answers.add_argument(
        "--from-target", type=positive, metavar="N", help="write N rows without any data: the target asks, and answers"
    )
    answers.add_argument("--request-temperature", type=temperature, default=1.0, help="of what it asks (default: 1)")
    answers.add_argument(
        "--request-prefixes", metavar="FILE", help="first words, one text a line; each request begins with one of them"
    )
    answers.add_argument(
        "--max-request-tokens", type=positive, default=256, help="longer requests are dropped (default: 256)"
    )
    answers.add_argument("--prompt-length", type=positive, default=64, help="tokens of a text to go on (default: 64)")
    features = parser.add_argument_group("features of the target")
    features.add_argument("--features", action="store_true", help="store the target's hidden states for every token")
    features.add_argument("--method", choices=head_objectives(), default="eagle3", help="default: eagle3")
    features.add_argument(
        "--aux-layers", type=layers, nargs="+", help="eagle3: i is the output of layer i (default: 2,n/2,n-3)"
    )
    features.add_argument("--storage", choices=("bf16", "fp8"), default="bf16", help="default: bf16")
    features.add_argument("--verify", action="store_true", help="check stored features against their checksums")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if sum(map(bool, (options.regenerate, options.features, options.from_target))) > 1:
        raise ValueError("features: one of --regenerate, --features and --from-target at a time")
    if bool(options.data) == bool(options.from_target):
        raise ValueError("data: expected --data, or --from-target N, which needs none")
    asked = {mode for modes in USED_WITH.values() for mode in modes if getattr(options, mode)}
    for name, modes in without_use(options, USED_WITH, asked):
        raise ValueError(f"{name}: is for {' and '.join('--' + mode.replace('_', '-') for mode in modes)}")
    if options.aux_layers and options.method != "eagle3":
        raise ValueError(f"aux_layers: are what --method eagle3 stores, and the method is {options.method}")
    if options.preview and (options.regenerate or options.features):
        raise ValueError("preview: is for what is tokenised, and for --from-target")
    if options.from_target:
        _write_from_target(options)
    elif options.regenerate:
        _regenerate(options)
    elif options.features:
        _store_features(options)
    else:
        _tokenise(options)


def _tokenise(options: argparse.Namespace) -> None:
    from draftwing.data.prepared import REJECTS, PrepareSettings
    from draftwing.prepare.data_statistics import as_tables, summarise
    from draftwing.prepare.tokens import prepare
    from draftwing.target.load import load_tokenizer

    tokenizer = load_tokenizer(options.target)
    settings = PrepareSettings(tuple(options.data), options.sequence_length, options.max_rows, options.seed)
    workers = options.workers or min(8, os.cpu_count() or 1)
    prepared = prepare(settings, tokenizer, Path(options.output), workers)
    statistics = summarise(prepared, 1 + max(tokenizer.get_vocab().values()))  # ids may have gaps
    if summary := prepared.describe_rejects():
        note(summary, "yellow")
    if not prepared.splits["held_out"]:
        note(
            "nothing is held out, so no head can be trained: the rows marked `held_out`, or else the last ones of "
            f"each source, cannot be used (see {REJECTS}) or supervise nothing",
            "yellow",
        )
    if options.json:
        print(json.dumps({"output": options.output, **statistics.as_dict()}))
    else:
        console, documents = new_console(), prepared.examples("train")
        for table in as_tables(statistics):
            console.print(table)
        for index in range(min(options.preview, len(documents))):
            _show(f"document {index}", [documents[index]], tokenizer)
    say_saved(options.output)


def _show(title: str, examples: "Iterable[Example]", tokenizer: Any) -> None:
    from draftwing.prepare.data_statistics import as_coloured_text

    console = new_console()
    headline(console, f"{title}: green is supervised")
    for example in examples:
        console.print(as_coloured_text(example, tokenizer), soft_wrap=True)


def _write_from_target(options: argparse.Namespace) -> None:
    _check_output(options, "--from-target")
    if options.max_rows:
        raise ValueError(
            "from_target: says how many rows our own engine writes; --endpoint and --max-rows are not for it"
        )
    from draftwing.api import load
    from draftwing.prepare.from_target import Author, read_prefixes, user_turn, write_from_target
    from draftwing.prepare.self_generated import RunPart
    from draftwing.target.load import load_tokenizer

    prefixes = read_prefixes(options.request_prefixes) if options.request_prefixes else ()
    user_turn(load_tokenizer(options.target))  # before the model
    model = load(options.target, options.draft, options.dtype, options.device, None if options.draft else "ngram")
    config, answers = _our_answers(options, model)
    asked = options.request_temperature, options.max_request_tokens, prefixes
    author = Author(config, model.tokenizer, answers, model.target.eos_token_ids, *asked)
    answers.say_what_is_never_chosen()
    engine = model.engine(options.batch_size, config.sequence_length)
    figures = write_from_target(config, author, engine, options.from_target, RunPart(*options.shard or ()))
    _print_figures(options, figures)
    if not options.json:
        _show_rows(options, model.tokenizer)
    say_saved(options.output)


def _show_rows(options: argparse.Namespace, tokenizer: Any) -> None:
    from draftwing.data.chat_template import encode_row

    with open(options.output, encoding="utf-8") as file:
        for index, line in enumerate(islice(file, options.preview)):
            _show(f"row {index}", encode_row(json.loads(line), tokenizer), tokenizer)


def _check_output(options: argparse.Namespace, what: str) -> None:
    if not options.output.endswith(".jsonl"):
        raise ValueError(f"output: {what} writes a .jsonl file, got {options.output!r}")


def _print_figures(options: argparse.Namespace, figures: dict[str, float]) -> None:
    if options.json:
        print(json.dumps({"output": options.output, **figures}))
    else:
        new_console().print(", ".join(f"{name} {value:,}" for name, value in figures.items()), markup=False)


def _regenerate(options: argparse.Namespace) -> None:
    _check_output(options, "--regenerate")
    if options.endpoint and (not options.model or options.draft):
        raise ValueError("endpoint: needs --model, the server's name of the target, and takes no --draft")
    from draftwing.prepare.self_generated import RunPart

    answer = _answer_by_endpoint if options.endpoint else _answer_by_engine
    _print_figures(options, answer(options, RunPart(*options.shard or ())))
    say_saved(options.output)


def _our_answers(options: argparse.Namespace, model: "SpeculativeModel") -> "tuple[TrainConfig, EngineAnswers]":
    """The stage that the options ask for, and who answers in it."""
    from draftwing.prepare.self_generated import EngineAnswers

    target, config = model.target, _as_stage(options, model.target.max_positions)
    start, ends = model.start_requests, target.eos_token_ids
    return config, EngineAnswers(config, model.tokenizer, start, ends, target.vocab_size)


def _answer_by_engine(options: argparse.Namespace, part: "RunPart") -> dict[str, float]:
    from draftwing.api import load
    from draftwing.prepare.self_generated import regenerate

    model = load(options.target, options.draft, options.dtype, options.device)
    config, answers = _our_answers(options, model)
    return regenerate(config, model.tokenizer, answers, part)


def _answer_by_endpoint(options: argparse.Namespace, part: "RunPart") -> dict[str, float]:
    from draftwing.prepare.endpoint import Endpoint, EndpointAnswers
    from draftwing.prepare.self_generated import regenerate
    from draftwing.target.load import load_tokenizer

    endpoint, config = Endpoint(options.endpoint, options.model), _as_stage(options)
    answers = EndpointAnswers(config, endpoint, options.concurrency)
    return regenerate(config, load_tokenizer(options.target), answers, part, source=f"{endpoint.url} {options.model}")


def _as_stage(options: argparse.Namespace, max_positions: int | None = None) -> "TrainConfig":
    """The options as a recipe's stage `self_generated`; sequences end at the target's last position."""
    from draftwing.config import TrainConfig

    names = ("target", "output", "seed", "max_new_tokens", "batch_size", "prompt_length")
    values = {name: getattr(options, name) for name in names} | _split(options.max_rows)
    values["temperatures"] = tuple(chain(*options.temperatures))
    length = min(options.sequence_length, max_positions or options.sequence_length)
    return TrainConfig("self_generated", data=tuple(options.data or ("stdlib",)), sequence_length=length, **values)


def _split(max_rows: int | None) -> dict[str, int]:
    """So many rows in all as a stage's training rows and held-out ones."""
    from draftwing.data.rows import HELD_OUT_SHARE

    if max_rows is None:
        return {}
    if max_rows < 2:
        raise ValueError(f"max_rows: --regenerate writes at least 2 rows (one is held out), got {max_rows}")
    num_held_out = max(1, int(max_rows * HELD_OUT_SHARE))
    return {"max_rows": max_rows - num_held_out, "evaluate_rows": num_held_out}


def _parse_shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"shard: expected I/N with I from 1 to N, got {text!r}")
    return int(number), int(count)


def _store_features(options: argparse.Namespace) -> None:
    if len(options.data) > 1:
        raise ValueError(f"data: --features takes one prepared folder, got {len(options.data)} names")
    from draftwing.data.features import check_features
    from draftwing.data.prepared import is_prepared, open_prepared
    from draftwing.drafts.eagle.formats import default_aux_layers
    from draftwing.prepare.target_features import FeatureWriter
    from draftwing.target.hidden_states import NORMED
    from draftwing.target.load import check_device, load_target, load_tokenizer, parse_dtype

    if not is_prepared(options.data[0]):
        raise ValueError(f"data: --features takes a folder made by `draftwing prepare`, got {options.data[0]}")
    check_device(options.device)
    prepared = open_prepared(options.data[0], load_tokenizer(options.target))
    target = load_target(options.target, parse_dtype(options.dtype), options.device)
    if options.method != "eagle3":
        stored: tuple[int, ...] = (NORMED,)
    elif options.aux_layers:
        stored = tuple(chain(*options.aux_layers))
    else:
        stored = default_aux_layers(target.num_layers)
    writer = FeatureWriter(prepared, target, stored, options.storage, Path(options.output))
    estimate = writer.estimate()
    note(f"to write: {estimate}")
    writer.write()
    result = {"output": options.output, "feature_layers": list(stored), "storage": options.storage}
    result |= {"tokens": estimate.num_tokens, "bytes_per_token": writer.bytes_per_token}
    if options.verify:
        result["verified_bytes"] = check_features(options.output)
    if options.json:
        print(json.dumps(result))
    else:
        new_console().print(", ".join(f"{name} {value}" for name, value in result.items()), markup=False)
    say_saved(options.output)
