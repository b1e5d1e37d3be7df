"""Files and folders that a cut leaves as they were or has written whole, the user's cache, and JSON that all read."""

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def write_text(path: Path, text: str) -> None:
    """Write a file so that a cut leaves the old one or the new one."""
    partial = _beside(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_tensors(path: Path, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Write a safetensors file so that a cut leaves no half one under its name.

    It is written beside that under a name that the next try overwrites: a shard may have gigabytes.
    """
    from safetensors.torch import save_file

    partial = path.with_name(f"{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    open_to_others(partial)
    partial.replace(path)


def open_to_others(*files: Path) -> None:
    """Give files the mode of other new ones; safetensors makes its files readable for their owner alone."""
    for file in files:
        beside = _beside(file)
        beside.touch()
        file.chmod(beside.stat().st_mode)
        beside.unlink()


UNFINISHED = ".draftwing-partial"


def _beside(goal: Path) -> Path:
    """A new name beside a file or folder, until that is whole; nobody's neighbour has it."""
    return goal.with_name(f".{goal.name}.{secrets.token_hex(4)}{UNFINISHED}")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place once it is complete; a failure leaves neither of the two.

    Only one process at a time may write it: it removes what a process that was killed has left of such a folder.
    """
    partial = _beside(folder)
    for leftover in (folder, *folder.parent.glob(f".{escape(folder.name)}.{'[0-9a-f]' * 8}{UNFINISHED}")):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_unchanged(
    made_with: Mapping[str, Any],
    wanted: Mapping[str, Any],
    place: Path,
    advice: str = "Undo the change, or name another output",
) -> None:
    """Raise a ValueError that lists the wanted settings in which a run differs from what it would continue."""
    wanted = json.loads(json.dumps(wanted))
    differing = sorted(name for name in wanted if made_with.get(name) != wanted[name])
    if differing:
        listed = "; ".join(f"{name} was {made_with.get(name)!r:.120}, is {wanted[name]!r:.120}" for name in differing)
        raise ValueError(f"output: {place} was made with other settings: {listed}. {advice}")


def cache_folder() -> Path:
    """What is kept for later runs lies here: $DRAFTWING_CACHE, or draftwing in the user's cache folder."""
    if folder := os.environ.get("DRAFTWING_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "draftwing"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text. NaN and infinity, for which JSON has no word, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
