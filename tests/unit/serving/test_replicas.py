"""The parent of replicas, with processes in their place that do what a file of their number says; and their figures."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='pip install "draftwing[serve]"')

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from draftwing.serving import peers, process
from draftwing.serving.peers import Peers, joined
from draftwing.serving.replicas import SIGNALS, Replicas, _Process

PARENT = """
import logging, os, sys, time
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
(folder / f"{replica.number}.pid").write_text(str(os.getpid()))
replica.tell_ready()
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


def is_there(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


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
    assert not any(map(is_there, pids))


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
    assert not is_there(parent.pid(1))


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


def test_one_that_cannot_be_forked_is_tried_again(alone: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it has run; nothing of the try is left. At first it is an error."""

    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    free = os.dup(0)
    os.close(free)
    with pytest.raises(OSError, match="unavailable"):
        alone._start(1)
    alone._known.add(1)
    alone._due.clear()
    assert alone._start(1) is None
    assert alone._due[1] > time.monotonic()
    assert not alone._processes
    after = os.dup(0)
    os.close(after)
    assert after == free, "both ends of the pipe are closed"
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_pipe_that_a_grandchild_holds_keeps_nobody_waiting(alone: Replicas) -> None:
    news, tells = os.pipe()
    process = _Process(1, 1, news)
    alone._note_end(process, 1)
    os.close(tells)
    assert not process.is_ready
    assert process.news is None


def test_a_signal_closes_the_parents_socket() -> None:
    """Replicas that drain accept nothing, so that who comes is refused."""
    with process.bind("127.0.0.1", 0) as listener:
        replicas = Replicas(1, listener)
        replicas._pass_on(signal.SIGTERM)
        assert listener.fileno() == -1
    for door in replicas._doors:
        door.close()


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


@pytest.fixture
def doors() -> Iterator[list[socket.socket]]:
    """Of two replicas."""
    doors = [process.bind("127.0.0.1", 0) for _ in range(2)]
    for door in doors:
        door.listen()
    yield doors
    for door in doors:
        door.close()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_a_page_that_is_cut_is_none(doors: list[socket.socket], share: float) -> None:
    whole = page_of(2)
    cut = whole[: int(len(whole) * share)]
    told = Thread(target=lambda: send_slowly(doors[1], [cut]))
    told.start()
    found = samples(Peers(doors, 1).page(page_of(1)))
    told.join()
    assert found["draftwing_replica_up", "2"] == 0
    assert {replica for _, replica in found} == {"1", "2"}
    assert [name for name, replica in found if replica == "2"] == ["draftwing_replica_up"]


def test_a_page_that_drips_is_waited_for_once(doors: list[socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SECONDS", 0.2)
    parts = [b"#\n"] * 12
    told = Thread(target=lambda: send_slowly(doors[1], parts))
    told.start()
    assert Peers(doors, 1)._ask(2) == b""
    told.join()
    assert parts, "it was left before it had said all"


def send_slowly(door: socket.socket, parts: list[bytes]) -> None:
    """Answer one asker so, with 0.05 seconds between the parts, until it leaves."""
    asker, _ = door.accept()
    with asker, suppress(OSError):
        while parts:
            asker.sendall(parts.pop())
            if parts:
                time.sleep(0.05)


def test_figures_that_fail_once_are_told_the_next_time(
    doors: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SECONDS", 0.3)
    pages = [page_of(2), None]  # from the end; None fails

    def page() -> bytes:
        found = pages.pop()
        if found is None:
            raise KeyError("figures")
        return found

    first, second = (Peers(doors, number) for number in (1, 2))
    second.tell(page)
    ups = [samples(first.page(page_of(1)))["draftwing_replica_up", "2"] for _ in range(2)]
    assert ups == [0, 1]


class Engine:
    """In a scheduler's place: drains until it is told that it has."""

    def __init__(self) -> None:
        self.is_alive, self.has_drained = True, Event()

    def drain(self, seconds: float) -> None:
        self.has_drained.wait(seconds)

    def stop(self) -> None:
        pass


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def is_answered(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, 0.2) as asked:
            asked.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return asked.recv(12) == b"HTTP/1.1 200"
    except OSError:
        return False


@pytest.mark.parametrize("has_others", [True, False])
def test_one_whose_engine_has_failed_ends_where_others_serve(has_others: bool) -> None:
    """With a status that says so; one that is alone stays, and says it in /health."""
    engine, listener, statuses = Engine(), process.bind("127.0.0.1", 0), list[int]()
    address = listener.getsockname()
    serving = Thread(
        target=lambda: statuses.append(process.serve(hello, engine, listener, 5, has_others)),  # type: ignore[arg-type]
        daemon=True,
    )
    serving.start()
    wait_for(lambda: is_answered(address))
    engine.is_alive = False
    serving.join(10 if has_others else 0.5)
    assert statuses == ([1] if has_others else [])
    assert is_answered(address) is not has_others


@pytest.mark.parametrize("has_others", [True, False])
def test_one_that_drains_leaves_new_connections_to_others(has_others: bool) -> None:
    """Those wait at the socket, which the parent has as well, for one that accepts."""
    engine, listener = Engine(), process.bind("127.0.0.1", 0)
    parents, address = listener.dup(), listener.getsockname()
    config = uvicorn.Config(hello, log_config=None)
    server = process._DrainingServer(config, engine, 5, has_others)  # type: ignore[arg-type]
    serving = Thread(target=server.run, args=([listener],))
    serving.start()
    wait_for(lambda: is_answered(address))
    server.handle_exit(signal.SIGTERM, None)
    if has_others:
        wait_for(lambda: listener.fileno() == -1)
        with socket.create_connection(address, 1):
            parents.accept()[0].close()
    else:
        assert is_answered(address)
    engine.has_drained.set()
    serving.join(10)
    assert not serving.is_alive()
    parents.close()
