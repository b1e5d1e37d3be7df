"""An evaluation's runs, kept on disk one line each, so that a stopped evaluation goes on where it was."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from draftwing.files import check_unchanged, write_text

logger = logging.getLogger(__name__)
FILE = "runs.jsonl"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One turn of one prompt decoded by one method, `seconds` the median of its repeats and all counts their mean.

    Attributes:
        prompt: its number in the data set; `turn` counts from 1.
        num_cycles: None for engines that do not say; then the fields about acceptance are empty.
        accepted_at, reached_at, stages: as in Statistics, a mean over the repeats.
        identical: whether the output is plain decoding's; None where the two are not comparable.
    """

    data: str
    temperature: float
    prompt: int
    turn: int
    method: str
    name: str
    category: str
    num_prompt_tokens: int
    num_tokens: int
    seconds: float
    num_cycles: float | None
    accepted_at: list[float]
    reached_at: list[float]
    stages: dict[str, float]
    peak_bytes: int | None
    identical: bool | None
    tokens: list[int] | None
    text: str | None

    @property
    def key(self) -> tuple[str, float, int, int, str]:
        """What there is one run of."""
        return self.data, self.temperature, self.prompt, self.turn, self.method


class Journal:
    """The runs so far, in memory and, with a folder, in its `runs.jsonl`, whose first line has the settings.

    A file that is begun anew takes the place of an older one with its first run. Of several lines of one run the last
    counts. A last line that was cut while it was written is dropped.

    Raises:
        ValueError: the folder holds runs of other settings (the differences are named), or another kind of file, or
            is a file itself.
    """

    def __init__(self, settings: Settings, folder: Path | None = None, fresh: bool = False) -> None:
        self.runs: dict[tuple[str, float, int, int, str], Run] = {}
        self._file = None if folder is None else folder / FILE
        self._new_settings: Settings | None = None
        if folder is None or self._file is None:
            return
        if folder.is_file():
            raise ValueError(f"output: expected a folder, {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        lines = [] if fresh or not self._file.is_file() else self._file.read_text(encoding="utf-8").split("\n")
        *whole, cut = lines or [""]
        if lines:
            self._read(self._file, lines, settings)
        if not self.runs:
            self._new_settings = settings
        elif cut:
            os.truncate(self._file, len("".join(line + "\n" for line in whole).encode()))

    def _read(self, file: Path, lines: list[str], settings: Settings) -> None:
        """Take in a file's lines, the last of which is empty or was cut."""
        try:
            before = json.loads(lines[0])["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"output: {file} does not begin with an evaluation's settings") from None
        for number, line in enumerate(lines[1:-1], 2):
            run = _read_run(line, f"{file}, line {number}")
            self.runs[run.key] = run
        if self.runs:
            wanted = {**dict.fromkeys(before), **settings}
            check_unchanged(before, wanted, file, "Name another folder, or start anew with --fresh")
            logger.info("resuming from %s: %d runs are there", file, len(self.runs))

    def add(self, run: Run) -> None:
        """Keep a run, on disk before anything else happens."""
        self.runs[run.key] = run
        if self._file is not None:
            if self._new_settings is not None:
                write_text(self._file, json.dumps({"settings": self._new_settings}) + "\n")
                self._new_settings = None
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(run)) + "\n")
                file.flush()
                os.fsync(file.fileno())


def _read_run(line: str, place: str) -> Run:
    try:
        values = json.loads(line)
        return Run(**{field.name: values[field.name] for field in fields(Run)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"output: {place} is no run: {error}") from None
