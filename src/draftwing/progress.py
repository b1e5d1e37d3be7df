"""Progress bars, all of one form; on stderr."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(*more: ProgressColumn, count: ProgressColumn | None = None, **options: Any) -> Progress:
    """What is done, a bar, its `count`, the times gone and left, and `more`; `options` of rich's `Progress`."""
    first = (TextColumn("{task.description}"), BarColumn(), count or MofNCompleteColumn())
    options = {"console": Console(stderr=True)} | options
    return Progress(*first, TimeElapsedColumn(), TimeRemainingColumn(), *more, **options)
