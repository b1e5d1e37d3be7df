"""The parent of replicas, with processes in their place that do what a file of their number says; and their figures."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason='pip install "draftwing[serve]"')

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from draftwing.serving import peers, process
from draftwing.serving.peers import Peers, joined
from draftwing.serving.replicas import SIGNALS, Replicas

PARENT = """
import logging, sys, time
from pathlib import Path
from draftwing.serving import replicas
logging.basicConfig(format="%(message)s")
replicas.RETRY_SECONDS = 0.05
replica = replicas.Replicas(int(sys.argv[1])).run()
if isinstance(replica, int):
    sys.exit(replica)
folder = Path(sys.argv[2])
with open(folder / "starts", "a") as starts:
    starts.write(f"{replica.number}\\n")
todo = folder / str(replica.number)
match todo.read_text() if todo.exists() else "":
    case "fail":
        sys.exit(3)
    case "hang":
        time.sleep(60)
replica.tell_ready()
(folder / f"{replica.number}.pid").write_text(str(__import__("os").getpid()))
time.sleep(60)
"""


class Parent:
    """A process with so many replicas; what they are to do, and what they did, lies in a folder."""

    def __init__(self, folder: Path, num_replicas: int) -> None:
        self.folder = folder
        command = [sys.executable, "-c", PARENT, str(num_replicas), str(folder)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def pid(self, number: int) -> int:
        """The process of a replica that is ready."""
        wait_for(lambda: (self.folder / f"{number}.pid").exists())
        wait_for(lambda: (self.folder / f"{number}.pid").read_text())
        return int((self.folder / f"{number}.pid").read_text())

    def kill(self, number: int) -> None:
        """Kill a replica, and forget it."""
        pid = self.pid(number)
        (self.folder / f"{number}.pid").unlink()
        os.kill(pid, signal.SIGKILL)

    def tell(self, number: int, todo: str) -> None:
        (self.folder / str(number)).write_text(todo)

    def starts(self) -> list[int]:
        """The numbers of replicas in the order in which they were started."""
        starts = self.folder / "starts"
        return list(map(int, starts.read_text().split())) if starts.exists() else []

    def end(self) -> tuple[int, str]:
        """The status with which a signal ends it, and what it has said."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


def wait_for(is_so: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], Parent]]:
    parents = list[Parent]()

    def started(num_replicas: int) -> Parent:
        parents.append(Parent(tmp_path, num_replicas))
        return parents[-1]

    yield started
    for parent in parents:
        if parent.process.poll() is None:
            parent.end()


def test_replicas_start_in_order_and_end_together(start: Callable[[int], Parent]) -> None:
    parent = start(3)
    pids = [parent.pid(number) for number in (1, 2, 3)]
    assert parent.starts() == [1, 2, 3]
    status, _ = parent.end()
    assert status == 128 + signal.SIGTERM
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("todo", ["fail", "hang"])
def test_one_that_does_not_come_back_keeps_no_other_from_it(start: Callable[[int], Parent], todo: str) -> None:
    """It is started again and again, and once it can, it comes back as well."""
    parent = start(3)
    parent.pid(3)
    parent.tell(1, todo)
    parent.kill(1)
    wait_for(lambda: parent.starts().count(1) >= (3 if todo == "fail" else 2))
    parent.kill(2)
    parent.pid(2)
    parent.kill(3)
    parent.pid(3)
    if todo == "fail":
        parent.tell(1, "")
        parent.pid(1)
    _, errors = parent.end()
    assert "replica 2" in errors and "has ended (137) and is started anew" in errors


def test_one_that_has_never_started_ends_all(start: Callable[[int], Parent], tmp_path: Path) -> None:
    """Those that run are ended too, and no further ones are started."""
    (tmp_path / "2").write_text("fail")
    parent = start(3)
    parent.process.communicate(timeout=30)
    assert parent.process.returncode == 128 + signal.SIGTERM  # the highest: the first one's
    assert parent.starts() == [1, 2]
    assert not Path(f"/proc/{parent.pid(1)}").exists()


def test_a_signal_while_one_starts_ends_all(start: Callable[[int], Parent], tmp_path: Path) -> None:
    (tmp_path / "1").write_text("hang")
    parent = start(2)
    wait_for(parent.starts)
    status, _ = parent.end()
    assert status == 128 + signal.SIGTERM


@pytest.fixture
def alone() -> Iterator[Replicas]:
    """The parent of one, in this process."""
    replicas = Replicas(1)
    yield replicas
    for door in replicas._doors:
        door.close()


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_signal_that_came_before_a_replica_was_there_reaches_it(
    alone: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork gives a process that sleeps and hears signals."""

    def hear() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    fork = lambda: subprocess.Popen(["sleep", "5"], preexec_fn=hear).pid
    monkeypatch.setattr(os, "fork", fork)
    alone._is_ending = True
    assert alone._start(1) is None
    (pid,) = alone._processes
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_an_orphan_that_ends_is_no_replica(alone: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process of a container is the parent of all that have lost theirs."""
    ended = iter([(77, 0), (0, 0)])
    monkeypatch.setattr(os, "waitpid", lambda pid, options: next(ended))
    assert list(alone._ended()) == []


def page_of(number: int) -> bytes:
    """Figures as a server has them: a counter, a gauge and a histogram."""
    registry = CollectorRegistry()
    Counter("vllm:drafts", "Drafts", ("model_name",), registry=registry).labels("tiny").inc(number)
    Gauge("draftwing_seats", "Seats", registry=registry).set(8)
    Histogram("draftwing_seconds", "Seconds", registry=registry, buckets=(1, 2)).observe(number)
    return generate_latest(registry)


def samples(page: bytes) -> dict[tuple[str, str], float]:
    """A page's figures by name and replica; each family stands there once."""
    families = list(text_string_to_metric_families(page.decode()))
    assert len({family.name for family in families}) == len(families)
    return {(sample.name, sample.labels["replica"]): sample.value for family in families for sample in family.samples}


def test_a_page_of_several_sums_nothing() -> None:
    found = samples(joined({1: page_of(1), 2: b"", 3: page_of(3)}))
    assert [found["vllm:drafts_total", number] for number in "13"] == [1, 3]
    assert [found["draftwing_seconds_sum", number] for number in "13"] == [1, 3]
    assert [found["draftwing_replica_up", number] for number in "123"] == [1, 0, 1]
    assert ("draftwing_seats", "2") not in found


def test_replicas_ask_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer is left out, and one that comes back is there again."""
    monkeypatch.setattr(peers, "SECONDS", 0.2)
    doors = [process.bind("127.0.0.1", 0) for _ in range(3)]
    for door in doors:
        door.listen()
    first, second, third = (Peers(doors, number) for number in (1, 2, 3))
    second.tell(lambda: page_of(2))
    found = samples(first.page(page_of(1)))
    assert [found["draftwing_replica_up", number] for number in "123"] == [1, 1, 0]
    third.tell(lambda: page_of(3))
    found = samples(first.page(page_of(1)))
    assert [found["vllm:drafts_total", number] for number in "123"] == [1, 2, 3]
    for door in doors:
        door.close()
