"""The command line: one module per command; heavy imports happen when a command runs."""

import argparse
from collections.abc import Sequence
from types import ModuleType

from rich.console import Console

from draftwing.cli import demo, eval, generate, inspect, plan, prepare, train

COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "generate": generate,
    "eval": eval,
    "plan": plan,
    "inspect": inspect,
    "prepare": prepare,
    "train": train,
}
"""Each module has SUMMARY, EXAMPLES, `add_arguments(parser)` and `run(options)`, which may return a status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends with a one-line message and status 2, Ctrl-C with 130."""
    options = build_parser().parse_args(arguments)
    try:
        status: int | None = options.run(options)
    except ValueError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        return 130
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="draftwing", description="Speculative decoding with EAGLE heads: faster, and exactly the same tokens."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, command in COMMANDS.items():
        command_parser = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command_parser.set_defaults(run=command.run)
        command_parser.add_argument(
            "--json", action="store_true", help="print one JSON object on stdout and nothing else"
        )
        command.add_arguments(command_parser)
    return parser
