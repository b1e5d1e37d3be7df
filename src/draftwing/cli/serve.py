"""`draftwing serve`: an OpenAI-compatible server whose answers do not depend on the load."""

import argparse
import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftwing.cli.arguments import (
    DRAFTS,
    TARGETS,
    add_loading,
    add_plan,
    loading,
    not_negative,
    number,
    positive,
)
from draftwing.cli.output import note
from draftwing.drafts.kinds import PLAIN, check_drafting, drafts_in_words
from draftwing.embedded import default_draft

if TYPE_CHECKING:
    from draftwing.serving.replicas import Replica

logger = logging.getLogger(__name__)
SUMMARY = "Serve a target over an OpenAI-compatible API: the same request gets the same tokens, whatever else runs."
EXAMPLES = """examples:
  draftwing serve  # the embedded model at http://127.0.0.1:8000, with a page to try it
  draftwing serve --target path/to/model --draft path/to/head --seats 16 --max-model-len 4096
  draftwing serve --target path/to/model --draft path/to/head --host 0.0.0.0 --api-key-file keys.txt --log-json
  curl http://127.0.0.1:8000/v1/completions --json '{"prompt": "def main(args):", "max_tokens": 32}'"""
KEY_VARIABLE = "DRAFTWING_API_KEY"
MAX_MODEL_LEN = 4096
"""Tokens of a seat where nobody says how many, if the model has as many positions."""
TOOL_FORMATS = ("hermes", "llama3_json", "mistral", "mistral_args")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")

port = number(int, lambda value: 0 <= value < 2**16, "a whole number from 0 (any that is free) to 65535")

drain_seconds = number(int, lambda value: 0 <= value <= 86400, "a whole number from 0 to 86400")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    parser.add_argument("--target", default="tiny", help=f"{TARGETS} (default: tiny, the embedded model)")
    parser.add_argument("--draft", help=f"{DRAFTS}, of {drafts_in_words()} (default: the target's embedded one)")
    add_loading(parser)
    add_plan(parser, "auto")
    parser.add_argument(
        "--tool-call-parser", choices=TOOL_FORMATS, help="how the model calls tools (default: its chat template tells)"
    )
    parser.add_argument("--draft-window", type=positive, help="an EAGLE head reads this many last tokens")
    _add_network(parser.add_argument_group("network"))
    _add_limits(parser.add_argument_group("limits"))


def _add_network(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    group.add_argument("--port", type=port, default=8000, help="0 is any that is free (default: 8000)")
    group.add_argument(
        "--replicas", type=positive, default=1, help="processes behind the port, each with all seats (default: 1)"
    )
    group.add_argument("--api-key", help=f"clients must send it (default: ${KEY_VARIABLE}, or none)")
    group.add_argument("--api-key-file", help="a file of keys, one a line")
    group.add_argument("--served-name", help="what clients call the model (default: the target's name)")
    group.add_argument("--log-json", action="store_true", help="stderr has lines of JSON alone, one for each request")


def _add_limits(group: Any) -> None:
    group.add_argument("--seats", type=positive, default=8, help="requests decoded at once (default: 8)")
    group.add_argument(
        "--max-model-len",
        type=positive,
        help=f"tokens of a seat, prompt and new ones (default: the model's positions, at most {MAX_MODEL_LEN})",
    )
    group.add_argument("--max-queue", type=not_negative, help="requests that may wait (default: 4 for each seat)")
    group.add_argument("--max-new-tokens", type=positive, help="of a request (default: what its prompt leaves)")
    group.add_argument(
        "--drain-seconds",
        type=drain_seconds,
        default=30,
        help="that running requests have at SIGTERM or Ctrl-C; a second one ends at once (default: 30)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; with --log-json a mistake is a line of JSON as well."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f'serve: needs {", ".join(missing)}: pip install "draftwing[serve]"')
    if not options.log_json:
        return _run(options)
    from draftwing.serving.json_lines import json_lines

    with json_lines():
        try:
            return _run(options)
        except (ValueError, OSError) as error:
            logger.error("%s", error)
            return 2


def _run(options: argparse.Namespace) -> int:
    keys = _read_keys(options)
    target, draft = options.target, options.draft or default_draft(options.target)
    if options.method or not draft:  # else the draft tells which
        check_drafting(options.method or PLAIN, options.plan, None, options.draft_window)
    from draftwing.serving.process import bind
    from draftwing.serving.replicas import ALONE, Replicas

    with bind(options.host, options.port) as listener:  # a taken port is known before the models are loaded
        replica = ALONE if options.replicas == 1 else Replicas(options.replicas, listener).run()
        if isinstance(replica, int):
            return replica
        from draftwing.api import load

        model = load(target, draft, **loading(options))
        return _serve(options, model, target, keys, listener, replica)


def _serve(
    options: argparse.Namespace, model: Any, target: str, keys: list[str], listener: Any, replica: "Replica"
) -> int:
    from draftwing.engine.options import GenerateOptions
    from draftwing.serving.app import create_app
    from draftwing.serving.intake import Intake
    from draftwing.serving.process import address_of, serve
    from draftwing.serving.scheduler import Scheduler
    from draftwing.serving.streams import Identity

    settings = GenerateOptions(plan=options.plan, draft_window=options.draft_window)
    length = options.max_model_len or min(model.target.max_positions or MAX_MODEL_LEN, MAX_MODEL_LEN)
    max_queue = 4 * options.seats if options.max_queue is None else options.max_queue
    scheduler = Scheduler(model, options.seats, length, settings, max_queue)
    intake = Intake(model, scheduler, options.max_new_tokens, options.tool_call_parser)
    name = options.served_name or (Path(target).resolve().name if Path(target).exists() else target)
    root = name if Path(target).exists() else target  # no path of this machine
    fingerprint = f"draftwing-{model.method}-{str(model.dtype).removeprefix('torch.')}"
    app = create_app(scheduler, intake, Identity(name, root, fingerprint), keys, replica.peers)
    scheduler.start()
    facts = {
        "url": address_of(listener),
        "model": name,
        "method": model.method,
        "seats": options.seats,
        "max_model_len": length,
        "seat_bytes": scheduler.seat_bytes,
    }
    listener.listen()
    if replica.says_start:
        _print_start(options, facts | {"replicas": options.replicas}, bool(keys))
    replica.tell_ready()
    return serve(app, scheduler, listener, options.drain_seconds, has_others=replica.peers is not None)


def _read_keys(options: argparse.Namespace) -> list[str]:
    """The keys that clients may send; none: everybody is served."""
    given: str | None = options.api_key
    lines = [given if given is not None else os.environ.get(KEY_VARIABLE, "")]
    if options.api_key_file:
        lines += Path(options.api_key_file).read_text(encoding="utf-8").split("\n")
    keys = [line.strip() for line in lines if line.strip()]
    if not keys and (options.api_key_file or given is not None):
        raise ValueError("api_key: expected a key that is not empty")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ValueError("api_key: expected printable ASCII characters")
    return keys


def _print_start(options: argparse.Namespace, facts: dict[str, Any], has_key: bool) -> None:
    """Say where it is, what it holds, and what is promised; where bits may differ, `load` has said so."""
    from draftwing.engine.memory import in_words

    if options.json:
        print(json.dumps(facts), flush=True)
        return
    say = note
    if options.log_json:
        say = lambda text, style="": logger.info("%s", text)
    seats, each = facts["seats"], facts["seat_bytes"]
    say(f"{facts['model']} by {facts['method']}: a page at {facts['url']}, the API at {facts['url']}/v1", "bold")
    if facts["replicas"] > 1:
        say(f"the first of {facts['replicas']} replicas; the others follow, and each holds as much")
    say(f"{seats} seats of {facts['max_model_len']} tokens: {in_words(seats * each)}, {in_words(each)} each")
    say("a request with its seed gets the same tokens whatever else is running, drafted or not (docs/serving.md)")
    if not has_key and options.host not in LOOPBACK:
        say("everybody who reaches this address is served: no --api-key-file was given", "yellow")
