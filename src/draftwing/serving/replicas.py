"""Several processes behind one port: a parent that loads nothing holds the socket, and starts anew those that die.

The replicas accept at the parent's socket, so that a connection goes to one whose event loop is free, and those that
wait there outlive any of them. They are forked from a process that has imported no model, and begin as if they were
alone.
"""

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from socket import socket
from types import FrameType

from draftwing.serving.peers import Peers
from draftwing.serving.process import bind

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALLED = 128
"""A process that a signal has ended has this and the signal's number as its status, as in a shell."""
RETRY_SECONDS = 1.0
"""Between two starts of a replica that dies before it is ready."""


@dataclass(frozen=True)
class Replica:
    """This process is one of them.

    Attributes:
        says_start: it is the one that says where it is.
        tell_ready: how it tells the parent that it is ready.
        peers: how it knows the others' figures; None: there are no others.
        number: from 1 on.
    """

    says_start: bool
    tell_ready: Callable[[], object]
    peers: Peers | None = None
    number: int = 1


ALONE = Replica(True, lambda: None)


@dataclass
class _Process:
    """A replica as its parent sees it: `news` is read once, when it is ready or has died."""

    pid: int
    number: int
    news: int | None
    is_ready: bool = False


class Replicas:
    """The parent's side: `num_replicas` processes, and the signals that they are sent.

    At the first one the parent closes its `listener`: replicas that drain accept nothing, and nobody is to wait there.
    """

    def __init__(self, num_replicas: int, listener: socket | None = None) -> None:
        if not hasattr(os, "fork"):
            raise ValueError("replicas: this system cannot fork processes; expected 1")
        self._listener = listener
        self._doors = [bind("127.0.0.1", 0) for _ in range(num_replicas)]
        for door in self._doors:  # the parent's, so that one that is started anew has its place again
            door.listen()
        self._processes: dict[int, _Process] = {}  # by their ids
        self._due = {1: 0.0}  # when a replica is to be started, by its number
        self._known = set[int]()  # those that have been ready once
        self._is_ending, self._status = False, 0
        self._alive = os.pipe()  # never written to; closed when the parent is gone
        self._woken = os.pipe()  # written to by signals

    def run(self) -> Replica | int:
        """Keep the replicas running until a signal comes; returns the exit status, and in a replica what it is.

        They start one after another: so the later ones find the costs that the first has measured, and see how much
        memory is left. If a replica fails before its first start is complete, all end. Later, one that dies is started
        anew, every second if need be; the others are not affected.
        """
        self._hear_signals()
        while self._processes or (self._due and not self._is_ending):
            for number in self._take_due():
                if (replica := self._start(number)) is not None:
                    return replica
            for process in self._wait():
                self._read_news(process)
            for process, status in self._ended():
                self._note_end(process, status)
        return self._status

    def _hear_signals(self) -> None:
        os.set_blocking(self._woken[1], False)
        signal.set_wakeup_fd(self._woken[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for name in SIGNALS:
            signal.signal(name, self._pass_on)

    def _take_due(self) -> list[int]:
        if self._is_ending:
            return []
        now = time.monotonic()
        due = [number for number, when in self._due.items() if when <= now]
        for number in due:
            del self._due[number]
        return due

    def _start(self, number: int) -> Replica | None:
        """Fork a replica; in it, what it is. One that has run, and cannot be forked just now, is tried again."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they come when it is known whose they are
        try:
            pid, news, tells = _fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if number not in self._known:
                raise
            logger.warning("replica %d cannot be started (%s), and is tried again", number, error.strerror)
            self._due[number] = time.monotonic() + RETRY_SECONDS
            return None
        if not pid:
            os.close(news)
            self._become_replica()
            peers = Peers(self._doors, number) if len(self._doors) > 1 else None
            return Replica(not self._known, partial(_tell_ready, tells), peers, number)
        os.close(tells)
        self._processes[pid] = _Process(pid, number, news)
        if self._is_ending:  # a signal came before it was there to be sent one
            os.kill(pid, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return None

    def _become_replica(self) -> None:
        os.setsid()  # Ctrl-C reaches the parent, which passes it on
        signal.set_wakeup_fd(-1)
        for name in (*SIGNALS, signal.SIGCHLD):
            signal.signal(name, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        others = [other.news for other in self._processes.values() if other.news is not None]
        for descriptor in (*others, *self._woken, self._alive[1]):
            os.close(descriptor)
        threading.Thread(target=_end_with_parent, args=(self._alive[0],), daemon=True).start()

    def _wait(self) -> list[_Process]:
        """Wait until something happens or is due; returns those that have news."""
        by_news = {process.news: process for process in self._processes.values() if process.news is not None}
        seconds = None
        if self._due and not self._is_ending:
            seconds = max(0.0, min(self._due.values()) - time.monotonic())
        told, _, _ = select.select([*by_news, self._woken[0]], [], [], seconds)
        if self._woken[0] in told:
            os.read(self._woken[0], 2**12)
        return [by_news[news] for news in told if news in by_news]

    def _read_news(self, process: _Process) -> None:
        """One is ready, so that the next may start; or has died, which its parent will be told."""
        assert process.news is not None
        os.set_blocking(process.news, False)  # a child of one that has died may hold the other end
        with suppress(BlockingIOError):
            process.is_ready = os.read(process.news, 1) != b""
        os.close(process.news)
        process.news = None
        if process.is_ready and process.number not in self._known:
            self._known.add(process.number)
            if process.number < len(self._doors):
                self._due[process.number + 1] = 0.0

    def _ended(self) -> Iterator[tuple[_Process, int]]:
        """The replicas that have ended, with their statuses; a container's first process is told of orphans too."""
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, how = found
                if (process := self._processes.pop(pid, None)) is not None:
                    status = os.waitstatus_to_exitcode(how)
                    yield process, SIGNALLED - status if status < 0 else status  # as a shell says it

    def _note_end(self, process: _Process, status: int) -> None:
        """Start it anew, soon; or end all, if it has never been ready. The highest status will be the parent's."""
        if process.news is not None:  # what it said last
            self._read_news(process)
        if self._is_ending:
            self._status = max(self._status, status)
        elif process.number not in self._known:
            if status > SIGNALLED:  # else it has said why
                logger.error("replica %d was killed (%d) before it was ready", process.number, status)
            self._status = status or 1
            self._pass_on(signal.SIGTERM)
        else:
            said = "replica %d (process %d) has ended (%d) and is started anew"
            logger.warning(said, process.number, process.pid, status)
            wait = 0.0 if process.is_ready else RETRY_SECONDS
            self._due[process.number] = time.monotonic() + wait

    def _pass_on(self, sig: int, frame: FrameType | None = None) -> None:
        self._is_ending = True
        if self._listener is not None:
            self._listener.close()
        for pid in tuple(self._processes):
            with suppress(ProcessLookupError):
                os.kill(pid, sig)


def _fork() -> tuple[int, int, int]:
    """Fork, with a pipe between both: the process, or 0 in the new one, and the pipe's ends."""
    news, tells = os.pipe()
    try:
        return os.fork(), news, tells
    except OSError:
        os.close(news)
        os.close(tells)
        raise


def _tell_ready(tells: int) -> None:
    os.write(tells, b".")
    os.close(tells)


def _end_with_parent(alive: int) -> None:
    """Drain, as at a signal, once the parent is gone."""
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)
