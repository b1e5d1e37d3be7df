"""An evaluation's runs, kept on disk one line each, so that a stopped evaluation goes on where it was."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = "runs.jsonl"
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One turn of one prompt decoded by one method, `seconds` the median of its repeats and cycles their mean.

    Attributes:
        prompt: its number in the data set; `turn` counts from 1.
        num_cycles: None for engines that do not say; then the fields about acceptance are empty.
        accepted_at, reached_at, stages: as in Statistics; counts are summed over repeats, seconds are their mean.
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
    accepted_at: list[int]
    reached_at: list[int]
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

    A last line that was cut while it was written is dropped.

    Raises:
        ValueError: the folder holds runs of other settings (the first difference is named), or another kind of file.
    """

    def __init__(self, settings: Settings, folder: Path | None = None, fresh: bool = False) -> None:
        self.runs: dict[tuple[str, float, int, int, str], Run] = {}
        self._file = None if folder is None else folder / FILE
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self._file.unlink(missing_ok=True)
        lines = _whole_lines(self._file)
        if lines:
            self._check_settings(lines[0], settings)
            for run in (_read_run(line, self._file, number) for number, line in enumerate(lines[1:], 2)):
                self.runs[run.key] = run
        else:
            self._append({"settings": settings})

    def add(self, run: Run) -> None:
        """Keep a run, on disk before anything else happens."""
        self.runs[run.key] = run
        if self._file is not None:
            self._append(asdict(run))

    def _append(self, values: Mapping[str, Any]) -> None:
        assert self._file is not None
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _check_settings(self, line: str, settings: Settings) -> None:
        try:
            before = json.loads(line)["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"output: {self._file} does not begin with an evaluation's settings") from None
        now = json.loads(json.dumps(settings))
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"output: {self._file} has runs of other settings: {name} was {_shown(before.get(name))} and is "
                    f"{_shown(now.get(name))}; name another folder, or start anew with --fresh"
                )


def _whole_lines(file: Path) -> list[str]:
    """A file's lines; a last one without its end is cut off the file too."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    return whole.decode("utf-8").split("\n")[:-1]


def _read_run(line: str, file: Path, number: int) -> Run:
    try:
        values = json.loads(line)
        return Run(**{field.name: values[field.name] for field in fields(Run)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"output: {file}, line {number} is no run: {error}") from None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
