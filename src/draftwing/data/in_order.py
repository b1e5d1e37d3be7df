"""Several tasks at a time, results in the order of the tasks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def map_in_order(
    executor: Executor, function: Callable[[Task], Result], tasks: Iterable[Task], ahead: int
) -> Iterator[Result]:
    """Run `function` on tasks, at most `ahead` of which are begun before their results are taken.

    Stopping early (an exception, Ctrl-C) cancels what has not begun.
    """
    pending: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            if len(pending) >= ahead:
                yield pending.popleft().result()
            pending.append(executor.submit(function, task))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
