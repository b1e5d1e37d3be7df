"""Another engine as a process: what it is asked, its log, and one clear error where it ends, hangs or is not there."""

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, TypeVar

from draftwing.checks.agreement import EngineAnswer

Found = TypeVar("Found")
POLL_SECONDS, GONE_SECONDS, KILL_SECONDS = 0.1, 0.5, 10
"""Between two looks; until a process that broke off its answer is gone; until one that is asked to end is killed."""
LAST_LINES = 4
"""Of an engine's log, in the error that tells how it ended."""
ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end this process at once, without ending what it has started."""


@dataclass(frozen=True)
class EngineTask:
    """Prompts to decode greedily in float32 with chains of `depth` drafted tokens.

    Attributes:
        folder: the exported draft.
        target: the target's folder, or its hub id.
        target_gguf: the target's GGUF file, for an engine that runs it.
        method: ours, of the draft's family.
        prompts: token ids.
        num_tokens: at most so many new ones of each prompt.
        seconds: how long the engine may take for its start, and for each answer.
    """

    folder: Path
    target: str
    target_gguf: Path | None
    method: str
    prompts: list[list[int]]
    num_tokens: int
    depth: int
    seconds: float

    @property
    def capacity(self) -> int:
        """Tokens of the longest text, with what is drafted beyond its end."""
        return max(map(len, self.prompts)) + self.num_tokens + self.depth + 1


@dataclass(frozen=True)
class EngineSession:
    """An engine that has started: its version, and an answer to each prompt as it comes."""

    version: str
    answers: Iterator[EngineAnswer]


class EngineProcess:
    """A command that runs within the `with` block, in a process group of its own.

    It also ends where SIGTERM or SIGHUP ends this process, unless somebody else handles these signals.

    Args:
        name: in errors.
        seconds: how long each `until` waits.
        environment: variables beside those of this process.
    """

    def __init__(
        self, name: str, command: Sequence[str | Path], seconds: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.seconds = name, seconds
        self._command = list(map(str, command))
        self._environment = {**os.environ, **(environment or {})}
        self._handled: list[signal.Signals] = []

    def __enter__(self) -> "EngineProcess":
        """Start the process.

        Raises:
            ValueError: it cannot be started.
        """
        handle, log = tempfile.mkstemp(prefix=f"draftwing-{self.name}-".lower().replace(" ", "-"), suffix=".log")
        self.log = Path(log)
        self._handle_signals()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        except OSError as error:
            self._leave_signals()
            self.log.unlink()
            raise ValueError(f"check: cannot start {self._command[0]}: {error.strerror or error}") from None
        finally:
            os.close(handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process with all that it has started; its log stays where it failed."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._leave_signals()
        if kind is None or issubclass(kind, SystemExit | KeyboardInterrupt):
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
                raise ValueError(self.failure("is gone"))
            if time.monotonic() > deadline:
                raise ValueError(self.failure(f"did not answer within {self.seconds:g} s (--check-seconds)"))
            time.sleep(POLL_SECONDS)

    def failure(self, what: str) -> str:
        """An error's text: what happened, the last lines of the engine's log, and where all of it is.

        Where the process is gone, that is what happened.
        """
        with suppress(subprocess.TimeoutExpired):
            what = f"ended with status {self._process.wait(GONE_SECONDS)}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()][-LAST_LINES:]
        return f"check: {self.name} {what}; its last lines: {' | '.join(said) or 'none'} (log: {self.log})"

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _handle_signals(self) -> None:
        """Leave the `with` block where a signal would end this process; only a main thread can ask for that."""
        if threading.current_thread() is threading.main_thread():
            self._handled = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
        for number in self._handled:
            signal.signal(number, _leave)

    def _leave_signals(self) -> None:
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
