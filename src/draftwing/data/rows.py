"""Which rows train and which are held out, and what becomes of rows that cannot be used."""

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from draftwing.data.chat_template import normalise
from draftwing.data.corpus import Row, Splits
from draftwing.data.sources import SHOWN, RowRef, open_source
from draftwing.files import write_text

HELD_OUT_SHARE = 0.02
Made = TypeVar("Made")


@dataclass(frozen=True)
class Reject:
    """A row that could not be used."""

    source: str
    line: int
    reason: str
    row: str
    """Its first characters."""


@dataclass(frozen=True)
class FoundRow:
    """A row and where it was found."""

    source: str
    line: int
    row: Row

    def make(self, make: Callable[[Row], Made]) -> Made | Reject:
        """What `make` makes of it; a ValueError rejects it."""
        try:
            return make(self.row)
        except ValueError as error:
            beginning = json.dumps(self.row, ensure_ascii=False, default=str)[:SHOWN]
            return Reject(self.source, self.line, str(error), beginning)


class Rejects:
    """Rows that could not be used: kept, counted, and written as JSONL to `path` as they come, sorted at the end.

    The first `keep` lines of an existing file are of an earlier part of this run; the others are dropped. Of several
    processes (torchrun's) the first one writes.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        self.path = path
        self._writes = os.environ.get("RANK", "0") == "0"
        self.found: list[Reject] = []
        if self._writes and path.exists():
            kept = read_rejects(path, keep)
            path.unlink()
            for reject in kept:
                self.add(reject)

    def __len__(self) -> int:
        return len(self.found)

    def add(self, reject: Reject) -> None:
        self.found.append(reject)
        if self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_as_line(reject))

    def finish(self, num_rows: int) -> None:
        """Bring them into the order of the sources' lines; rows are read in a random one.

        Raises:
            ValueError: none of `num_rows` rows was good; it has the first reason.
        """
        if self.found != (ordered := sorted(self.found, key=lambda reject: (reject.source, reject.line))):
            self.found = ordered
            if self._writes:
                write_text(self.path, "".join(map(_as_line, ordered)))
        if self.found and len(self) >= num_rows:
            raise ValueError(f"data: {describe(self.found, num_rows, self.path)}")


def _as_line(reject: Reject) -> str:
    text = json.dumps(asdict(reject), ensure_ascii=False)  # half a surrogate pair is written as JSON's escape
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def read_rejects(path: Path, count: int | None = None) -> list[Reject]:
    """The first rejects of a file."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # texts may hold other line breaks, which JSON leaves
    return [Reject(**json.loads(line)) for line in lines[:count]]


def describe(found: Sequence[Reject], num_rows: int, path: Path) -> str:
    """How many rows were rejected, where they are listed, and why the first one was."""
    first = found[0]
    return (
        f"{len(found)} of {num_rows} rows cannot be used, see {path}; "
        f"the first: {first.source}, line {first.line}: {first.reason}"
    )


def select_rows(names: str | Sequence[str], max_rows: int | None = None, seed: int = 0) -> Splits[RowRef]:
    """Choose the rows of one source or several, without reading them.

    Held out are a source's rows with `"held_out": true`, or if it has none its last 2% (at least one row).
    The training rows come shuffled with `seed`, so that `max_rows` is a fair sample.

    Raises:
        ValueError: a source that cannot be opened, or with fewer than two rows.
    """
    names = (names,) if isinstance(names, str) else names
    train: list[RowRef] = []
    held_out: list[RowRef] = []
    for name in names:
        source = open_source(name)
        marked = source.marked()
        if not marked:
            if len(source) < 2:
                for index in range(len(source)):  # a file of another kind may seem to have one
                    list(made_from([RowRef(source, index)], normalise))
                raise ValueError(f"data: {name} has {len(source)} rows; at least 2 are needed (one is held out)")
            marked = set(range(len(source) - max(1, int(len(source) * HELD_OUT_SHARE)), len(source)))
        for index in range(len(source)):
            (held_out if index in marked else train).append(RowRef(source, index))
    random.Random(seed).shuffle(train)
    if len(names) > 1:  # so that its first rows are of all sources
        random.Random(seed).shuffle(held_out)
    return Splits(train[:max_rows], held_out)


def read_rows(
    names: str | Sequence[str],
    max_rows: int | None = None,
    seed: int = 0,
    rejects: Rejects | None = None,
    make: Callable[[Row], Any] = normalise,
) -> Splits[Any]:
    """Read the rows that `select_rows` chooses and keep what `make` makes of each. Unfit ones go to `rejects`.

    Raises:
        ValueError: as `select_rows`; without `rejects`, the first unfit row (named by its line).
    """
    selection = select_rows(names, max_rows, seed)
    train, held_out = (list(made_from(refs, make, rejects)) for refs in (selection.train, selection.held_out))
    if rejects is not None:
        rejects.finish(len(selection.train) + len(selection.held_out))
    return Splits(train, held_out)


def made_from(refs: Iterable[RowRef], make: Callable[[Row], Made], rejects: Rejects | None = None) -> Iterator[Made]:
    """Read rows and make something of each; a ValueError rejects the row, or without `rejects` is passed on."""
    for ref in refs:
        found = find_row(ref)
        result = found if isinstance(found, Reject) else found.make(make)
        if not isinstance(result, Reject):
            yield result
        elif rejects is None:
            raise ValueError(f"data: {result.source}, line {result.line}: {result.reason}")
        else:
            rejects.add(result)


def find_row(ref: RowRef) -> FoundRow | Reject:
    """Read a row, or say why it cannot be read."""
    try:
        return FoundRow(ref.source.name, ref.line, ref.read())
    except ValueError as error:
        return Reject(ref.source.name, ref.line, str(error), ref.source.beginning(ref.index))
