"""The parent of replicas, with a process that sleeps in a replica's place."""

import os
import signal
import subprocess

import pytest

from draftwing.serving.replicas import SIGNALS, Replicas


def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork gives a process that sleeps, hears signals, and is never ready."""

    def hear() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    monkeypatch.setattr(os, "fork", lambda: subprocess.Popen(["sleep", "5"], preexec_fn=hear).pid)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_signal_that_came_before_a_replica_was_there_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    forked(monkeypatch)
    replicas = Replicas(2)
    replicas._is_ending = True
    assert replicas._start(1) == (None, 128 + signal.SIGTERM)


def test_an_orphan_that_ends_is_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a container is the parent of all that have lost theirs."""
    replicas, ended = Replicas(1), iter([(77, 0), (5, 9)])
    replicas._pids[5] = 1
    monkeypatch.setattr(os, "waitpid", lambda pid, options: next(ended))
    assert replicas._wait() == (5, 1, 128 + 9)
