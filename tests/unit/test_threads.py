"""Threads: as many as others leave cores for, never other than the user set, and back to what they were."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Forked

from draftwing import threads
from draftwing.threads import CHOSEN_BY, LOOK_SECONDS, WAITED_BY, FreeCores, fitting_threads, num_threads, wait_briefly

CORES = 4


class Machine:
    """CORES cores, of which this process and others use some; it tells the time and writes its own /proc/stat."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.stat, self.limit = folder / "stat", folder / "cpu.max"
        self.now = self.own = self.others = self.stolen = 0.0
        self._write()
        monkeypatch.setattr(threads.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(threads.time, "process_time", lambda: self.own)
        monkeypatch.setattr(threads, "_allowed_cpus", lambda: set(range(CORES)))
        monkeypatch.setattr(threads.os, "sysconf", lambda name: 100)

    def run(self, own: float, others: float, seconds: float = 1.0, stolen: float = 0.0) -> None:
        """Let time pass in which so many cores are used."""
        self.now += seconds
        self.own, self.others, self.stolen = (
            total + seconds * cores for total, cores in ((self.own, own), (self.others, others), (self.stolen, stolen))
        )
        self._write()

    def _write(self) -> None:
        """Shared out over the cores; another machine's core, which counts for nothing, is busy all the time."""
        busy, stolen = (round(100 * (self.own + self.others) / CORES), round(100 * self.stolen / CORES))
        cores = [f"cpu{number} {busy} 0 0 77 88 0 0 {stolen} 99 0" for number in range(CORES)]
        everybody = "cpu  999999 0 0 0 0 0 0 0 0 0"
        lines = [everybody, *cores, f"cpu{CORES} {round(100 * self.now)} 0 0 0 0 0 0 0 0 0", "intr 1 2 3", ""]
        self.stat.write_text("\n".join(lines), encoding="ascii")

    def free_cores(self) -> FreeCores:
        return FreeCores(self.stat, self.limit)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.mark.parametrize(("others", "fitting"), [(0, 4), (0.2, 4), (0.5, 3), (1, 3), (2.5, 1), (3, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("own", [0, 1, 4])
def test_as_many_threads_as_others_leave_cores(machine: Machine, others: float, fitting: int, own: float) -> None:
    """However many this process uses itself, of what is left."""
    free = machine.free_cores()
    machine.run(own=min(own, CORES - others), others=others)
    assert free.look() == pytest.approx(CORES - others, abs=0.05)
    assert free.whole() == fitting
    assert free.are_shared == (others > 0.25)


def test_two_that_share_all_cores_both_give_way_and_come_back(machine: Machine) -> None:
    free = machine.free_cores()
    machine.run(own=CORES / 2, others=CORES / 2)  # another one like this, with as many threads
    assert free.whole() == CORES / 2
    machine.run(own=CORES / 2, others=0)  # it has ended
    assert free.whole() == CORES


def test_what_a_hypervisor_takes_is_not_free(machine: Machine) -> None:
    free = machine.free_cores()
    machine.run(own=1, others=0, stolen=2)
    assert free.whole() == 2


def test_a_container_has_its_share(machine: Machine) -> None:
    machine.limit.write_text("150000 100000\n", encoding="ascii")
    free = machine.free_cores()
    assert free.look() == 1.5
    machine.run(own=1, others=0)
    assert free.whole() == 1
    machine.limit.write_text("max 100000\n", encoding="ascii")
    assert machine.free_cores().whole() == CORES


def test_looks_are_some_time_apart(machine: Machine) -> None:
    free = machine.free_cores()
    machine.run(own=0, others=3, seconds=LOOK_SECONDS / 2)
    assert free.whole() == CORES, "too soon to say"
    machine.run(own=0, others=3, seconds=LOOK_SECONDS / 2)
    assert free.whole() == 1


def test_where_the_system_does_not_say_all_are_free(machine: Machine) -> None:
    machine.stat.unlink()
    free = machine.free_cores()
    machine.now += 10
    assert free.whole() == CORES


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch, as_many_threads_afterwards: None) -> None:
    """Torch chose two threads by itself, and one core is free."""
    torch.set_num_threads(2)
    for name in CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_torch_chooses", lambda: {2})
    monkeypatch.setattr(FreeCores, "look", lambda self: 1.1)


def test_the_number_is_what_it_was_afterwards(crowded: None) -> None:
    with fitting_threads():
        assert torch.get_num_threads() == num_threads() == 1
        with fitting_threads():
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyboardInterrupt), fitting_threads():
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("variable", CHOSEN_BY)
def test_a_users_variable_is_obeyed(crowded: None, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "2")
    with fitting_threads():
        assert torch.get_num_threads() == num_threads() == 2


def test_a_users_call_is_obeyed(crowded: None) -> None:
    torch.set_num_threads(3)
    with fitting_threads():
        assert torch.get_num_threads() == num_threads() == 3


def test_a_free_machine_changes_nothing(crowded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FreeCores, "look", lambda self: 1.9)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda number: pytest.fail("nothing is to be set"))
        with fitting_threads():
            pass


def test_torch_chooses_what_is_said_that_it_chooses() -> None:
    """In a process of its own, as this one's number is set."""
    code = "import os, torch; from draftwing.threads import _torch_chooses as c; print(torch.get_num_threads() in c())"
    assert in_process(code, OMP_NUM_THREADS=None) == "True"
    assert in_process("import draftwing.threads as t; print(t.num_threads())", OMP_NUM_THREADS="1") == "1"


def test_how_long_threads_spin_is_said_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import {}; import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert in_process(code.format("draftwing")) == str(threads.SPINS)
    with_torch = "sys; sys.modules['torch'] = sys; import draftwing"  # as good as the real one, which takes seconds
    assert in_process(code.format(with_torch)) == "None", "too late"
    assert in_process(code.format("draftwing"), GOMP_SPINCOUNT="7") == "7"
    assert in_process(code.format("draftwing"), OMP_WAIT_POLICY="ACTIVE") == "None"
    environment = dict.fromkeys(WAITED_BY, "x")
    wait_briefly(environment)
    assert environment == dict.fromkeys(WAITED_BY, "x")


def test_threads_are_an_option() -> None:
    commands = (["demo"], ["train", "recipe"], ["generate", "--target", "x", "--prompt", "y"])
    code = "from draftwing.cli import build_parser\nimport os, torch\n"
    code += f"for number, command in enumerate({commands}, 2):\n"
    code += "    build_parser().parse_args([*command, '--threads', str(number)])\n"
    code += "    print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"
    program = Forked(code)
    assert program.wait() == 0, program.errors
    assert program.out.splitlines() == ["2 2", "3 3", "4 4"]


def in_process(code: str, **variables: str | None) -> str:
    """What a new process prints that runs this code, with these variables and without those about waiting."""
    environment = {name: value for name, value in threads.os.environ.items() if name not in WAITED_BY}
    environment |= {"PYTHONPATH": ":".join(filter(None, sys.path))}
    for name, value in variables.items():
        environment.pop(name, None)
        environment |= {} if value is None else {name: value}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()
