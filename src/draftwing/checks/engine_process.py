"""Another engine as a process: its output in a log file, and one clear error where it ends, hangs or is not there."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

Found = TypeVar("Found")
POLL_SECONDS, KILL_SECONDS = 0.1, 10
LAST_LINES = 4
"""Of an engine's log, in the error that tells how it ended."""


class EngineProcess:
    """A command in a process group of its own, which ends with the `with` block.

    Args:
        name: in errors.
        seconds: how long each `until` waits.
        environment: variables beside those of this process.

    Raises:
        ValueError: it cannot be started.
    """

    def __init__(
        self, name: str, command: Sequence[str | Path], seconds: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.seconds = name, seconds
        handle, log = tempfile.mkstemp(prefix=f"draftwing-{name}-".lower().replace(" ", "-"), suffix=".log")
        self.log = Path(log)
        try:
            self._process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            self.log.unlink()
            raise ValueError(f"check: cannot start {command[0]}: {error.strerror or error}") from None
        finally:
            os.close(handle)

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process with all that it has started; its log stays where it failed."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if kind is None:
            self.log.unlink(missing_ok=True)

    def until(self, look: Callable[[], Found | None]) -> Found:
        """What `look` finds, as soon as it finds something.

        Raises:
            ValueError: the engine ended before, or nothing was found in time.
        """
        deadline = time.monotonic() + self.seconds
        while True:
            status = self._process.poll()
            if (found := look()) is not None:
                return found
            if status is not None:
                raise ValueError(self.failure(f"ended with status {status}"))
            if time.monotonic() > deadline:
                raise ValueError(self.failure(f"did not answer within {self.seconds:g} s (--check-seconds)"))
            time.sleep(POLL_SECONDS)

    def failure(self, what: str) -> str:
        """An error's text: what happened, the last lines of the engine's log, and where all of it is."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()][-LAST_LINES:]
        return f"check: {self.name} {what}; its last lines: {' | '.join(said) or 'none'} (log: {self.log})"

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
