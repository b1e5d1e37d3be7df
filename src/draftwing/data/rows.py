"""Where training rows come from: the standard library, or a JSONL file."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from draftwing.data.corpus import Corpus, Row, read_stdlib

HELD_OUT_SHARE = 0.02


def read_rows(source: str, max_rows: int | None = None, seed: int = 0) -> Corpus:
    """Read the rows of `stdlib` or of a JSONL file.

    Held out are a file's rows with `"held_out": true`, or if it has none its last 2% (at least one row).

    The training rows come shuffled with `seed`, so that `max_rows` is a fair sample.

    Raises:
        ValueError: the file is missing, empty, or has a malformed line (named by its number).
    """
    corpus = read_stdlib() if source == "stdlib" else _split(list(_read_jsonl(Path(source))), source)
    train = corpus.train.copy()
    random.Random(seed).shuffle(train)
    return Corpus(train[:max_rows], corpus.held_out)


def _split(rows: list[Row], source: str) -> Corpus:
    marked = [row for row in rows if row.get("held_out")]
    if marked:
        return Corpus([row for row in rows if not row.get("held_out")], marked)
    if len(rows) < 2:
        raise ValueError(f"data: {source} has {len(rows)} rows; at least 2 are needed (one is held out)")
    num_held_out = max(1, int(len(rows) * HELD_OUT_SHARE))
    return Corpus(rows[:-num_held_out], rows[-num_held_out:])


def _read_jsonl(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise ValueError(f"data: no such file: {path} (expected `stdlib` or a JSONL file)")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data: {path}, line {number}: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"data: {path}, line {number}: expected an object, got {type(row).__name__}")
            yield row
