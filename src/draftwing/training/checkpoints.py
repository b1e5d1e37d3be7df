"""Checkpoints that a kill cannot spoil, and what a run must have in common with the one that it continues.

A checkpoint counts only with its `recipe.json`, which is written last, by a rename.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftwing.config import TrainConfig
from draftwing.files import check_unchanged, write_text

MARK = "recipe.json"
FREE_KEYS = frozenset(
    ("output", "log_every", "evaluate_every", "evaluate_rows", "save_every", "keep_checkpoints", "report_to")
    + ("decode_prompts", "decode_plan", "compile", "device_map", "shard_target")
    + ("batch_size", "accumulation_steps")
)
"""What a continued run may change: nothing of it changes what is learnt. The rows of an optimizer step may be split
anew, by `batch_size`, `accumulation_steps` and the number of processes, as long as they are as many."""

DEFAULTS: dict[str, Any] = json.loads(
    json.dumps(
        {key.name: key.default for key in dataclasses.fields(TrainConfig) if key.default is not dataclasses.MISSING}
    )
)
"""Of a recipe's keys."""


def settings_of(recipe: Mapping[str, Any], num_processes: int) -> dict[str, Any]:
    """What of a stage's keys decides what is learnt, JSON-ready."""
    kept = {name: value for name, value in recipe.items() if name not in FREE_KEYS}
    kept["rows_per_step"] = recipe["batch_size"] * recipe.get("accumulation_steps", 1) * num_processes
    settings: dict[str, Any] = json.loads(json.dumps(kept))
    return settings


def check_continued(made_with: Mapping[str, Any], wanted: Mapping[str, Any], place: Path) -> None:
    """Raise a ValueError where a run differs from what it would continue, in what that has recorded.

    A recipe's key that it has not is younger than it, which then had the default.
    """
    made_with = DEFAULTS | dict(made_with)
    recorded = {name: value for name, value in wanted.items() if name in made_with}
    check_unchanged(
        made_with, recorded, place, "Undo the change, name another output, or delete the folder to start over"
    )


def newest_checkpoint(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """The newest complete checkpoint under `folder`; None starts anew.

    Raises:
        ValueError: it was made with other settings.
    """
    complete = [path for path in _by_step(folder) if (path / MARK).is_file()]
    if not complete:
        return None
    check_continued(json.loads((complete[-1] / MARK).read_text(encoding="utf-8")), settings, complete[-1])
    return complete[-1]


def complete_checkpoint(checkpoint: Path, settings: Mapping[str, Any], keep: int) -> None:
    """Mark a checkpoint that is written whole, then delete all but the newest `keep` up to it."""
    write_text(checkpoint / MARK, json.dumps(settings, indent=2) + "\n")
    older = _by_step(checkpoint.parent)
    older = older[: older.index(checkpoint) + 1]
    kept = [path for path in older if (path / MARK).is_file()][-keep:]
    for path in older:
        if path not in kept:
            (path / MARK).unlink(missing_ok=True)  # first: what is half deleted must not count
            shutil.rmtree(path)


def discard_checkpoint(folder: Path, step: int) -> None:
    """Let the checkpoint of a step, if there is one, not count any more."""
    (folder / f"checkpoint-{step}" / MARK).unlink(missing_ok=True)


def _by_step(folder: Path) -> list[Path]:
    numbered = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


_NAME = re.compile(r"checkpoint-(\d+)")
