"""The command line: one module per command; heavy imports happen when a command runs."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from draftwing.cli import chat, demo, doctor, eval, export, generate, inspect, plan, prepare, serve, train
from draftwing.cli.output import note

MODULES = (demo, chat, generate, serve, eval, plan, inspect, doctor, export, prepare, train)
COMMANDS: dict[str, ModuleType] = {module.__name__.rpartition(".")[2]: module for module in MODULES}
"""Each module has SUMMARY, EXAMPLES, `add_arguments(parser)` and `run(options)`, which may return an exit status."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors look like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")


class _ShowVersion(argparse.Action):
    """`--version`: of draftwing and what it stands on."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(", ".join(f"{name} {version(name)}" for name in ("draftwing", "torch", "transformers")))
        parser.exit()


class _Notes(logging.Handler):
    """What the library logs, as lines on stderr; a progress bar that is shown takes them from there, above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def _noted() -> Iterator[None]:
    """Show what the library logs while a command runs."""
    logger, notes = logging.getLogger("draftwing"), _Notes()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a mistake, or a file that fails, ends with one line and status 2, Ctrl-C with 130.

    A reader that has gone, such as `| head`, ends it without a word, with 141.
    """
    try:
        options = build_parser().parse_args(arguments)
        with _noted():
            status: int | None = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is written when Python ends
        return 141
    except (ValueError, OSError) as error:
        note(f"error: {' '.join(str(error).split())}", "red")  # those of other packages may have several lines
        return 2
    except KeyboardInterrupt:
        note("stopped")
        return 130
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="draftwing", description="Speculative decoding with EAGLE heads: faster, and exactly the same tokens."
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the versions and end")
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
