"""Where rows come from, with random access: the standard library, JSONL files, data sets of the Hugging Face hub."""

import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from draftwing.data.corpus import Row, read_stdlib

SHOWN = 200
"""Characters shown of a row."""
HUB = re.compile(r"hub:(?P<repository>[^/:]+/[^/:]+)(/(?P<config>[^/:]+))?(:(?P<split>.+))?")


class Source(Protocol):
    """Rows by index."""

    name: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> Row:
        """The row; a ValueError says what is wrong with it."""

    def line(self, index: int) -> int:
        """Where a person finds the row, counted from 1."""

    def beginning(self, index: int) -> str:
        """What can be shown of a row that cannot be read."""

    def marked(self) -> set[int]:
        """The rows that say of themselves that they are held out."""


@dataclass(frozen=True)
class RowRef:
    """A row that has not been read yet."""

    source: Source
    index: int

    def read(self) -> Row:
        return self.source.read(self.index)

    @property
    def line(self) -> int:
        return self.source.line(self.index)


def open_source(name: str) -> Source:
    """Open `stdlib`, a JSONL file, or `hub:org/name[/config][:split]` (split: train).

    Raises:
        ValueError: no such file, or a data set that cannot be had.
    """
    if name == "stdlib":
        corpus = read_stdlib()
        return ListSource(name, [*corpus.train, *corpus.held_out], len(corpus.train))
    if name.startswith("hub:"):
        return HubSource(name)
    return JsonlSource(name)


class ListSource:
    """Rows in memory; those from `num_train` on are held out."""

    def __init__(self, name: str, rows: Sequence[Row], num_train: int) -> None:
        self.name, self._rows, self._num_train = name, rows, num_train

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Row:
        return self._rows[index]

    def line(self, index: int) -> int:
        return index + 1

    def beginning(self, index: int) -> str:
        return str(self._rows[index])[:SHOWN]

    def marked(self) -> set[int]:
        return set(range(self._num_train, len(self._rows)))


class JsonlSource:
    """A file with a JSON object per line; only where its lines begin is kept in memory. Empty lines are no rows."""

    def __init__(self, name: str) -> None:
        self.name, self._path = name, Path(name)
        if self._path.is_dir():
            raise ValueError(
                f"data: {name} is a folder; a prepared one stands alone, and only heads are trained from it"
            )
        if not self._path.is_file():
            raise ValueError(f"data: no such file: {name} (expected `stdlib`, a JSONL file or hub:org/name)")
        self._starts, self._lines, self._marked = array("q"), array("q"), set[int]()
        position = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    if b'"held_out"' in line and _is_marked(line):
                        self._marked.add(len(self._starts))
                    self._starts.append(position)
                    self._lines.append(number)
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Row:
        try:
            text = self._line(index).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error}") from None
        return parse_row(text)

    def _line(self, index: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            return file.readline()

    def line(self, index: int) -> int:
        return self._lines[index]

    def beginning(self, index: int) -> str:
        return self._line(index).decode(errors="replace").strip()[:SHOWN]

    def marked(self) -> set[int]:
        return self._marked


class HubSource:
    """A data set of the hub, fetched and kept by the package `datasets`."""

    def __init__(self, name: str) -> None:
        self.name = name
        match = HUB.fullmatch(name)
        if match is None:
            raise ValueError(f"data: expected hub:org/name[/config][:split], got {name!r}")
        try:
            from datasets import load_dataset
        except ImportError:
            raise ValueError(f"data: {name} needs the package datasets: pip install 'draftwing[train]'") from None
        try:
            self._rows: Any = load_dataset(match["repository"], match["config"], split=match["split"] or "train")
        except Exception as error:  # the client raises many kinds; the user needs the name and the reason
            raise ValueError(f"data: cannot load {name}: {type(error).__name__}: {error}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Row:
        # Columns that are empty in this row are fields that it does not have.
        return {name: value for name, value in self._rows[index].items() if value is not None}

    def line(self, index: int) -> int:
        return index + 1

    def beginning(self, index: int) -> str:
        return str(self._rows[index])[:SHOWN]

    def marked(self) -> set[int]:
        if "held_out" not in self._rows.column_names:
            return set()
        return {index for index, value in enumerate(self._rows["held_out"]) if value}


def parse_row(text: str) -> Row:
    """The row of a line.

    Raises:
        ValueError: no JSON object, or one with text that is no Unicode.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON object: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    if "\\ud" in text.lower():  # escapes can say half a surrogate pair, which no tokenizer or file takes
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"not Unicode: {error}") from None
    return row


def _is_marked(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and bool(row.get("held_out"))
