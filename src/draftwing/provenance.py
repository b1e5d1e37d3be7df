"""Where a figure comes from: versions, hardware, commit, time. Written beside every result."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from draftwing.files import write_text


def provenance() -> dict[str, Any]:
    """A JSON-ready record of what produced a result."""
    is_cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "draftwing": version("draftwing"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": torch.cuda.get_device_name() if is_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def write_record(path: str | Path, rows: object, options: Mapping[str, Any], **more: object) -> None:
    """Write a benchmark's rows (and `more`) as JSON with the options and the provenance that made them.

    Options that are paths are written relative to the working directory, so that a record names no machine's folders.
    """
    settings = {name: os.path.relpath(value) if isinstance(value, Path) else value for name, value in options.items()}
    record = {"rows": rows, **more, "options": settings, "provenance": provenance()}
    write_text(Path(path), json.dumps(record, indent=2) + "\n")


def _commit() -> str | None:
    """The checkout's commit, with a + if files differ from it; None outside of a checkout."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
