"""Cycles recorded once and replayed: CUDA graphs of draft, verify and commit, three launches a cycle.

The steps are those of seats.py. A recording is good for one number of seats, one plan, one kind of sampling,
and contexts up to a bound; it reads and writes the seats' own storage. All recordings share memory. That is safe:
the steps of a cycle are replayed in the order in which they were recorded, and nothing there outlives a cycle.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from draftwing.engine.readback import Array
from draftwing.engine.seats import Seats, Verification
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import TreeShape
from draftwing.target.model import one_line

T = TypeVar("T")
SMALLEST_BOUND = 256
"""Contexts are recorded for up to so many tokens, then for half as much again, twice as much, ..."""
MOST_RECORDINGS = 256
"""Cycles that an engine keeps recorded, each with its results; the one that was used longest ago gives way."""


@dataclass(frozen=True)
class Recorded(Generic[T]):
    """A step that `replay` runs once more; what it computes lies in `result` each time."""

    result: T
    replay: Callable[[], None]


class Recorder(Protocol):
    """How steps are recorded."""

    def warm_up(self, steps: Callable[[], None]) -> None:
        """Run steps as they will be recorded, so that everything that is made once is there."""

    def record(self, step: Callable[[], T]) -> Recorded[T]:
        """Record a step without running it."""

    def forget(self) -> None:
        """All recordings are gone: those that come share no memory with them."""


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory and a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, steps: Callable[[], None]) -> None:
        """Run the steps twice: kernels are chosen and compiled, then whatever turns to the host raises.

        All of it is done when this returns.
        """
        with self._on_stream():
            steps()
            mode = torch.cuda.get_sync_debug_mode()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch says that this mode is a prototype
                    torch.cuda.set_sync_debug_mode("error")
                steps()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        self._stream.synchronize()

    def record(self, step: Callable[[], T]) -> Recorded[T]:
        graph = torch.cuda.CUDAGraph()
        # Our own stream context as well: it puts the caller's stream back even where ending a capture fails.
        with self._on_stream(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = step()
        return Recorded(result, graph.replay)

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:  # decoding may go on without a recording that failed
                current.wait_stream(self._stream)


@dataclass(frozen=True)
class CapturedCycle:
    """A plan's recorded steps."""

    draft: Recorded[DraftTree]
    verify: Recorded[Verification]
    commit: Recorded[None]


Recordings = dict[tuple[object, ...], CapturedCycle | None]
"""An engine's recordings, the one used last at the end; None: it could not be made."""


class CapturedSeats(Seats):
    """The first seats. Their cycles are recorded when first needed, and kept in `recordings` for later ones.

    A cycle begins with `make_ready`, whose time is no cycle's. One that cannot be recorded runs as it is written.
    """

    def __init__(self, seats: Seats, recorder: Recorder, recordings: Recordings) -> None:
        vars(self).update(vars(seats))  # the same seats: their state is shared, not copied
        self._recorder, self._recordings = recorder, recordings
        self._current: CapturedCycle | None = None
        self._has_read = False  # what the last commit kept, as its recording does

    def make_ready(self, plan: TreeShape) -> float:
        """Record a plan's cycle, if none is there for contexts like these; returns the seconds that recording took."""
        context = context_bound(self.bound, self.cache.capacity)
        key = (len(self.lengths), plan, context, self.sampler.work, self.scores_tokens)
        seconds = 0.0
        if key in self._recordings:
            self._current = self._recordings.pop(key)
        else:
            start = idle_since(self.target.device)
            self.prepare(plan)
            if len(self._recordings) >= MOST_RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
            self._current = None  # it would hold memory
            self._current = self._record_if_possible(plan, context)
            seconds = time.perf_counter() - start
        self._recordings[key] = self._current
        return seconds

    def draft(self, plan: TreeShape) -> DraftTree:
        if self._current is None:
            return super().draft(plan)
        self.prepare(plan)
        self._current.draft.replay()
        return self._current.draft.result

    def verify(self, tree: DraftTree) -> Verification:
        if self._current is None:
            return super().verify(tree)
        self._current.verify.replay()
        return self._current.verify.result

    def commit(self, plan: TreeShape, tree: DraftTree, verification: Verification) -> None:
        if self._current is None:
            super().commit(plan, tree, verification)
        else:
            self._current.commit.replay()
        self._has_read = plan.depth > 0 and self._current is not None

    def count(self, num_committed: Array) -> None:
        super().count(num_committed)
        if self._has_read:
            self.mark_read()

    def _record_if_possible(self, plan: TreeShape, context: int) -> CapturedCycle | None:
        """As `record`, if need be with the memory of all other recordings; None, with a warning, if it fails."""
        bound = self.bound
        while True:
            try:
                return self.record(plan, context)
            except RuntimeError as error:
                held = [key for key, cycle in self._recordings.items() if cycle is not None]
                if not (_is_full(error) and held):
                    self.bound = bound
                    warnings.warn(f"a cycle cannot be recorded, so it is slower: {_reason(error)}", stacklevel=2)
                    return None
            for key in held:
                del self._recordings[key]
            self._recorder.forget()

    def record(self, plan: TreeShape, context: int) -> CapturedCycle:
        """Record the steps of a plan as Seats has them, for contexts up to a bound, while no seat commits anything."""

        def commit(tree: DraftTree, verification: Verification) -> None:
            Seats.commit(self, plan, tree, verification)
            if plan.depth:  # while drafts pause, what is committed waits to be read
                self.drafter.catch_up(plan.max_depth + 1)

        def all_steps() -> None:
            self.bound = context
            tree = self.grow(plan)
            commit(tree, Seats.verify(self, tree))

        with self.nobody_running():
            self._recorder.warm_up(all_steps)
            self.bound = context
            tree = self._recorder.record(lambda: self.grow(plan))
            verification = self._recorder.record(lambda: Seats.verify(self, tree.result))
            committed = self._recorder.record(lambda: commit(tree.result, verification.result))
        return CapturedCycle(tree, verification, committed)


def idle_since(device: torch.device) -> float:
    """Now by the clock, once the device has done what it was given: recording must not count the wait for that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def context_bound(num_tokens: int, capacity: int) -> int:
    """The context length that `num_tokens` are recorded for: 256, 384, 512, 768, 1024, ..., or the capacity."""
    bound = SMALLEST_BOUND
    while bound < num_tokens:
        bound += bound // 2 if bound & (bound - 1) == 0 else bound // 3
    return min(bound, capacity)


@torch.inference_mode()
def can_record(seats: Seats, plan: TreeShape, recorder: Recorder) -> bool:
    """Whether a plan's cycles can be recorded; some targets ask the host where to go on (mixtures of experts, say)."""
    if not seats.drafter.is_capturable:
        return False
    try:
        CapturedSeats(seats.part(0, 1), recorder, {}).record(plan, context_bound(1, seats.cache.capacity))
    except RuntimeError as error:
        if _is_full(error):
            raise
        name = type(seats.target.model).__name__
        warnings.warn(f"{name} cannot be captured, so cycles are slower: {_reason(error)}", stacklevel=2)
        return False
    return True


def _is_full(error: RuntimeError) -> bool:
    """Whether memory was full: said by the error, or by the one of which the end of a capture made another."""
    return any(isinstance(cause, torch.OutOfMemoryError) for cause in (error, error.__context__))


def _reason(error: RuntimeError) -> str:
    """Why a recording failed: what was raised first, of which the end of a capture makes another error."""
    return one_line(error.__context__ or error)
