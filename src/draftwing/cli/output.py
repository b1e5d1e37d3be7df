"""Where commands print: consoles that wrap at a terminal's width alone, and lines on stderr for people.

rich is imported when something is printed with it: a help text or a mistake should not wait for it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNBOUNDED = 100_000
"""Columns of what is not a terminal: no line is as long."""


def new_console(stderr: bool = False) -> "Console":
    """Standard output or stderr; in a file or a pipe every line is as long as it is, whatever COLUMNS says."""
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            """Let `main` end the command, where rich would."""
            raise BrokenPipeError

    console = PipedConsole(stderr=stderr, highlight=False, emoji=False)
    if not console.file.isatty():
        console.width = UNBOUNDED
    return console


def print_facts(table: "Table") -> None:
    """A table of names and texts; outside a terminal a line for each, as long as it is."""
    from rich.text import Text

    console = new_console()
    if console.width < UNBOUNDED:
        console.print(table)
        return
    print(Text.from_markup(str(table.title)))
    for name, text in zip(*(column.cells for column in table.columns), strict=True):
        print(f"{Text.from_markup(str(name))}: {Text.from_markup(str(text))}")


def headline(console: "Console", title: str) -> None:
    """A line across a terminal with a title in it."""
    if console.width < UNBOUNDED:
        console.rule(title)
    else:
        console.print(f"--- {title} ---", markup=False)


def note(text: str, style: str = "") -> None:
    """A line on stderr."""
    if sys.stderr.isatty():
        new_console(stderr=True).print(text, style=style, markup=False, soft_wrap=True)
    else:
        print(text, file=sys.stderr)


def say_saved(*files: str | Path) -> None:
    """The last line of a command that writes: where it is."""
    note(f"saved to {', '.join(map(str, files))}")
