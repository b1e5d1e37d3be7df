"""Where rows come from, with random access: the standard library, files, data sets of the Hugging Face hub."""

import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from draftwing.data.corpus import Row, read_stdlib
from draftwing.data.messages import read_flag

SHOWN = 200
"""Characters shown of a row."""
HUB = re.compile(r"hub:(?P<repository>[^/:]+/[^/:]+)(/(?P<config>[^/:]+))?(:(?P<split>.+))?")


Source: TypeAlias = "ListSource | JsonlSource"
"""Rows by index."""


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
    """Open `stdlib`, a file (see `open_file`), or `hub:org/name[/config][:split]` (split: train).

    Raises:
        ValueError: no such file, or a data set that cannot be had.
    """
    if name == "stdlib":
        corpus = read_stdlib()
        num_train = len(corpus.train)
        held_out = set(range(num_train, num_train + len(corpus.held_out)))
        return ListSource(name, [*corpus.train, *corpus.held_out], held_out)
    return HubSource(name) if name.startswith("hub:") else open_file(name)


def open_file(name: str) -> Source:
    """Open a file: texts (.txt), one array of rows (.json), or a row per line.

    Texts have empty lines between them; a file without any has a text per line.

    Raises:
        ValueError: no such file, no UTF-8 in a text file, or no array where one begins.
    """
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"data: {name} is a folder; a prepared one stands alone, and only heads are trained from it")
    if not path.is_file():
        raise ValueError(f"data: no such file: {name} (expected `stdlib`, a file or hub:org/name)")
    if path.suffix == ".txt":
        return ListSource(name, *_read_texts(path))
    if path.suffix == ".json" and _begins_array(path):
        rows = _read_array(path)
        return ListSource(name, rows, {index for index, row in enumerate(rows) if is_held_out(row)})
    return JsonlSource(name)


class ListSource:
    """Rows in memory, of which some are held out. `lines` says where each begins; else they are counted."""

    def __init__(self, name: str, rows: Any, held_out: set[int], lines: Sequence[int] = ()) -> None:
        self.name, self._rows, self._held_out, self._lines = name, rows, held_out, lines

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Row:
        """The row; a ValueError says what is wrong with it."""
        row = self._rows[index]
        if not isinstance(row, dict):
            raise ValueError(f"expected an object, got {type(row).__name__}")
        _check_unicode(row)
        return row

    def line(self, index: int) -> int:
        """Where a person finds the row, counted from 1."""
        return self._lines[index] if self._lines else index + 1

    def beginning(self, index: int) -> str:
        """What can be shown of a row that cannot be read."""
        return str(self._rows[index])[:SHOWN]

    def marked(self) -> set[int]:
        """The rows that say of themselves that they are held out."""
        return self._held_out


class JsonlSource:
    """A file with a JSON object per line; only where its lines begin is kept in memory. Empty lines are no rows."""

    def __init__(self, name: str) -> None:
        self.name, self._path = name, Path(name)
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


def load_hub(name: str, extra: str, *what: str | None, **options: Any) -> Any:
    """A data set, fetched and kept by the package `datasets`: its rows.

    Raises:
        ValueError: `datasets`, of the `extra`, is not installed, or the hub has none or cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"data: {name} needs the package datasets: pip install 'draftwing[{extra}]'") from None
    try:
        return load_dataset(*what, **options)
    except Exception as error:  # the client raises many kinds; the user needs the name and the reason
        raise ValueError(f"data: cannot load {name}: {type(error).__name__}: {error}") from error


class HubSource(ListSource):
    """A data set of the hub."""

    def __init__(self, name: str) -> None:
        match = HUB.fullmatch(name)
        if match is None:
            raise ValueError(f"data: expected hub:org/name[/config][:split], got {name!r}")
        table = load_hub(name, "train", match["repository"], match["config"], split=match["split"] or "train")
        super().__init__(name, table, set())

    def read(self, index: int) -> Row:
        row: Row = _without_nulls(self._rows[index])
        return row

    def marked(self) -> set[int]:
        if "held_out" not in self._rows.column_names:
            return set()
        return {index for index, value in enumerate(self._rows["held_out"]) if is_held_out({"held_out": value})}


def _without_nulls(value: Any) -> Any:
    """A value of a table, whose columns and nested fields are those of all rows: null in rows without them."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _read_texts(path: Path) -> tuple[list[Row], set[int], list[int]]:
    """The texts of a file as rows, none of which is marked as held out, and the lines that they begin at."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8: {error}") from None
    filled = [number for number, line in enumerate(lines) if line.strip()]
    begins = [number for index, number in enumerate(filled) if filled[index - 1] != number - 1]
    starts = filled if len(begins) == 1 else begins
    ends = [*starts[1:], len(lines)][: len(starts)]
    rows = [{"text": "\n".join(lines[start:end]).rstrip()} for start, end in zip(starts, ends, strict=True)]
    return rows, set(), [start + 1 for start in starts]


def _begins_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_array(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {path} begins as an array and is no JSON: {error}") from None
    assert isinstance(rows, list)
    return rows


def is_held_out(row: Any) -> bool:
    """Whether a row says so. One that has no flag but something else there is refused when it is read."""
    try:
        return isinstance(row, dict) and read_flag(row, "held_out")
    except ValueError:
        return False


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
    if "\\ud" in text.lower():
        _check_unicode(row)
    return row


def _check_unicode(row: Row) -> None:
    """Refuse half a surrogate pair, which escapes can say and no tokenizer or file takes."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not Unicode: {error}") from None


def _is_marked(line: bytes) -> bool:
    try:
        return is_held_out(json.loads(line))
    except (ValueError, RecursionError):
        return False
