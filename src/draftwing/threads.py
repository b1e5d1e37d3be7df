"""How many threads torch's operations run on, and how long they wait for each other: cores may be shared.

A product that is split over threads ends when the slowest has its part. A thread whose core another process has taken
is late by the scheduler's slices, milliseconds, at each of a pass's hundreds of operations, while the others spin and
take the cores from the process they wait for. So no more threads are used than there are free cores, looked at anew a
few times a second, and a thread waits in a loop for a moment only. What the user has set is never changed.

Packed products have the same bits on any number of threads (tests/lossless/test_bits.py), torch's own do not: there
the number stays what it is through a generation, and training leaves it alone.
"""

import math
import os
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""The variables by which a user chooses the number of threads."""
SPINS = 10_000
"""How often a thread of libgomp looks for work or for the others before it sleeps, some 0.2 ms: longer than the steps
between two products of a pass, far shorter than a scheduler's slice. libgomp's own 300,000 are longer than a slice."""
WAITED_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""The variables that say how long libgomp's threads wait in a loop; it reads them when torch is loaded."""
LOOK_SECONDS = 0.25
"""Between two looks at what is free: Linux counts in hundredths of a second."""
ROUNDING = 0.25
"""Of a core that others may use before a thread gives it up."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's threads spin for a moment only, unless the user has said how long, or torch is loaded already."""
    if "torch" not in sys.modules and not any(name in environment for name in WAITED_BY):
        environment["GOMP_SPINCOUNT"] = str(SPINS)


def choose_threads(number: int) -> None:
    """Use so many threads, as a user's choice: in this process and those that it starts."""
    os.environ["OMP_NUM_THREADS"] = str(number)
    if "torch" in sys.modules:  # which has read the variable already
        import torch

        torch.set_num_threads(number)


@contextmanager
def fitting_threads(fitting: int | None = None) -> Iterator[None]:
    """Run with `fitting` of torch's threads, by default as many as `num_threads` says now."""
    import torch

    number, fitting = torch.get_num_threads(), fitting or num_threads()
    if fitting == number:
        yield
        return
    torch.set_num_threads(fitting)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def num_threads() -> int:
    """No more of torch's threads than there are free cores, if their number is torch's own choice."""
    import torch

    number: int = torch.get_num_threads()
    return number if _is_chosen(number) else min(number, free_cores().whole())


class FreeCores:
    """The cores that other processes have left free between one look and the next; all where the system does not say.

    `stat` is Linux's /proc/stat, `limit` the file that says what share of the time a container may use.
    """

    def __init__(self, stat: Path = Path("/proc/stat"), limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
        self._stat, self._cpus = stat, {f"cpu{number}" for number in _allowed_cpus()}
        self._most = min(float(len(self._cpus)), _share(limit))
        self._free = self._most
        self._before = self._now()

    @property
    def are_shared(self) -> bool:
        """Whether others use so much of them that a thread is given up."""
        return self.look() < self._most - ROUNDING

    def whole(self) -> int:
        """How many threads fit, at least one."""
        return max(1, math.floor(self.look() + ROUNDING))

    def look(self) -> float:
        """How many were free between the last two looks, which are LOOK_SECONDS apart or more."""
        if time.perf_counter() - self._before[0] >= LOOK_SECONDS:
            before, self._before = self._before, self._now()
            seconds, busy, own = (now - then for now, then in zip(self._before, before, strict=True))
            self._free = min(self._most, len(self._cpus) - max(0.0, busy - own) / seconds)
        return self._free

    def _now(self) -> tuple[float, float, float]:
        """The time, and for how long our cores have been busy and this process has used any."""
        return time.perf_counter(), self.busy_seconds(), time.process_time()

    def busy_seconds(self) -> float:
        """Of all processes, and of the hypervisor, which calls it stolen; no system but Linux says."""
        try:
            lines = self._stat.read_text(encoding="ascii").splitlines()
        except OSError:
            return 0.0
        counts = [line.split() for line in lines if line.partition(" ")[0] in self._cpus]
        # The columns: name, user, nice, system, idle, waiting for a disk, two kinds of interrupts, stolen.
        ticks = sum(int(cpu[column]) for cpu in counts for column in (1, 2, 3, 6, 7, 8))
        return ticks / os.sysconf("SC_CLK_TCK")


@cache
def free_cores() -> FreeCores:
    """This process's; whoever asks early lets it know more by the time that it counts."""
    return FreeCores()


def _is_chosen(number: int) -> bool:
    """Whether a user has set the number: by a variable, or by one that torch does not choose by itself."""
    return any(name in os.environ for name in CHOSEN_BY) or number not in _torch_chooses()


@cache
def _torch_chooses() -> set[int]:
    """The numbers that torch chooses by itself: the cores that this process may use, twins counted or not."""
    allowed = _allowed_cpus()
    cores = set()
    for number in allowed:
        twins = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        cores.add(twins.read_text(encoding="ascii") if twins.is_file() else str(number))
    return {len(allowed), len(cores)}


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _share(limit: Path) -> float:
    """Cores' worth of time that a container may use, from its `quota period`."""
    try:
        quota, period = limit.read_text(encoding="ascii").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
