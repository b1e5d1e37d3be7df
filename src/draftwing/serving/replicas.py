"""Several processes behind one port: a parent that loads nothing holds the socket, and starts anew those that die.

The replicas accept at the parent's socket, so that a connection goes to one that has time, and those that wait there
outlive any of them. They are forked from a process that has imported no model, and begin as if they were alone.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALLED = 128
"""A process that a signal has ended has this and the signal's number as its status, as in a shell."""
RETRY_SECONDS = 1.0
"""Between two starts of a replica that dies before it is ready."""


@dataclass(frozen=True)
class Replica:
    """This process is one of them: whether it is the one that says where it is, and how it tells that it is ready."""

    says_start: bool
    tell_ready: Callable[[], object]


ALONE = Replica(True, lambda: None)


class Replicas:
    """The parent's side: `num_replicas` processes, and the signals that they are sent."""

    def __init__(self, num_replicas: int) -> None:
        if not hasattr(os, "fork"):
            raise ValueError("replicas: this system cannot fork processes; expected 1")
        self._pids: dict[int, int] = {}  # which replica a process is
        self._num_replicas, self._is_first = num_replicas, True
        self._is_ending, self._status = False, 0
        self._alive = os.pipe()  # never written to; closed when the parent is gone

    def run(self) -> Replica | int:
        """Keep the replicas running until a signal comes; returns the exit status, and in a replica what it is.

        They start one after another, so that a later one finds what the first has measured, and memory as it is.
        One that does not even start ends all.
        """
        for name in SIGNALS:
            signal.signal(name, self._pass_on)
        for number in range(1, self._num_replicas + 1):
            if self._is_ending:
                break
            replica, failed = self._start(number)
            if replica is not None:
                return replica
            if failed is not None and not self._is_ending:
                if failed > SIGNALLED:  # else it has said why
                    logger.error("replica %d was killed (%d) before it was ready", number, failed)
                self._status = failed or 1
                self._pass_on(signal.SIGTERM)
        while self._pids:
            pid, number, status = self._wait()
            if self._is_ending:
                continue
            logger.warning("replica %d (process %d) has ended (%d) and is started anew", number, pid, status)
            failed = status
            while failed is not None and not self._is_ending:
                replica, failed = self._start(number)
                if replica is not None:
                    return replica
                if failed is not None:
                    time.sleep(RETRY_SECONDS)
        return self._status

    def _start(self, number: int) -> tuple[Replica | None, int | None]:
        """Fork a replica and wait until it is ready, or has died: with which status. In the replica, what it is."""
        read, write = os.pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they come when it is known whose they are
        pid = os.fork()
        if not pid:
            os.close(read)
            self._become_replica()
            return Replica(self._is_first, lambda: os.write(write, b".")), None
        os.close(write)
        if self._is_ending:  # a signal came before it was there to be sent one
            os.kill(pid, signal.SIGTERM)
        self._pids[pid] = number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        is_ready = os.read(read, 1) != b""
        self._is_first = False
        os.close(read)
        return None, None if is_ready else self._wait(pid)[2]

    def _become_replica(self) -> None:
        os.setsid()  # Ctrl-C reaches the parent, which passes it on
        for name in SIGNALS:
            signal.signal(name, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        read, write = self._alive
        os.close(write)
        threading.Thread(target=_end_with_parent, args=(read,), daemon=True).start()

    def _wait(self, which: int = -1) -> tuple[int, int, int]:
        """Wait until a replica has ended: its process, its number, its status. The highest one will be the parent's."""
        pid, how = os.waitpid(which, 0)
        while pid not in self._pids:  # an orphan: the first process of a container is given those of all
            pid, how = os.waitpid(which, 0)
        number, status = self._pids.pop(pid), os.waitstatus_to_exitcode(how)
        status = SIGNALLED - status if status < 0 else status  # as a shell says it
        if self._is_ending:
            self._status = max(self._status, status)
        return pid, number, status

    def _pass_on(self, sig: int, frame: FrameType | None = None) -> None:
        self._is_ending = True
        for pid in tuple(self._pids):
            with suppress(ProcessLookupError):
                os.kill(pid, sig)


def _end_with_parent(alive: int) -> None:
    """Drain, as at a signal, once the parent is gone."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)
