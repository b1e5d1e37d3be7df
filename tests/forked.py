"""Programs in processes of their own, forked from one that has imported the package: seconds sooner than new ones."""

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import httpx

from draftwing.plans import costs, planner

IMPORTED = ["draftwing.api", "draftwing.cli", "draftwing.prepare.tokens", "draftwing.serving.server"]
IMPORTED += ["draftwing.training.stage", "uvicorn"]
COMMAND = "import sys; from draftwing.__main__ import run; sys.exit(run())"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(IMPORTED)


class Forked:
    """A program that runs: its process, what it has written to files so far, and its exit status at its end.

    `program` is Python; `arguments` stand behind its sys.argv[0]; `said` is what it reads. Or it reads from and writes
    to a `terminal`, a device file.
    """

    def __init__(
        self, program: str, arguments: Sequence[str] = (), said: str = "", terminal: str | None = None
    ) -> None:
        folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder)
        self._out, self._errors = folder / "stdout", folder / "stderr"
        (folder / "stdin").write_text(said, encoding="utf-8")
        for file in (self._out, self._errors):
            file.touch()
        files = [terminal] * 3 if terminal else [folder / name for name in ("stdin", "stdout", "stderr")]
        self._process = _CONTEXT.Process(target=_run, args=(files, program, list(arguments), dict(os.environ)))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        return self._errors.read_text(encoding="utf-8")

    def first_line(self, seconds: float = 120.0) -> str:
        """What it writes first; waits for it."""
        end = time.monotonic() + seconds
        while "\n" not in self.out:
            assert self._process.is_alive() and time.monotonic() < end, self.errors
            time.sleep(0.02)
        return self.out.partition("\n")[0]

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit status: minus a signal's number, if that has ended it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"it still runs: {self.errors}"
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def measure_roughly() -> None:
    """Tests need costs, not good ones: they are measured once, at one context."""
    costs.SECONDS = 0.0
    planner.measure_costs = partial(costs.measure_costs, num_rounds=1, contexts=(64,))  # type: ignore[attr-defined]


def is_up(url: str) -> bool:
    """Whether a server takes requests."""
    try:
        return httpx.get(f"{url}/ready", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def _run(files: list[Path | str], program: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, mode) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        file = os.open(name, mode | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = ["-c", *arguments]
    measure_roughly()
    exec(compile(program, "a program", "exec"), {"__name__": "__main__"})
