"""Cycles recorded once and replayed: CUDA graphs of draft, verify and commit, three launches a cycle.

The steps are those of rows.py. A recording is good for one plan, one kind of sampling and contexts up to a bound; it
reads and writes the rows' own storage, so rows must be used again and again: see RowsPool. All recordings of rows share
memory, which is safe because the steps of a cycle are replayed in the order in which they were recorded, and nothing
that lies there outlives a cycle.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch

from draftwing.decoding.plan import TreePlan
from draftwing.decoding.rows import DrafterFactory, Rows, Verification
from draftwing.decoding.sampling import Sampler, SamplingParams
from draftwing.decoding.tree import DraftTree
from draftwing.models.target import TargetModel

T = TypeVar("T")
SMALLEST_BOUND = 256
"""Contexts are recorded for up to so many tokens, then for half as much again, twice as much, ..."""
SMALLEST_CAPACITY = 1024
"""Tokens that rows hold at least, so that short generations share them."""
IDLE_BYTES = 1 << 32
"""Caches of idle rows that a pool keeps, beside those used last."""


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


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory and a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, steps: Callable[[], None]) -> None:
        """Run the steps twice: kernels are chosen and compiled, then whatever turns to the host raises."""
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

    def record(self, step: Callable[[], T]) -> Recorded[T]:
        graph = torch.cuda.CUDAGraph()
        # Our own stream context as well: it puts the caller's stream back even where ending a capture fails.
        with self._on_stream(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = step()
        return Recorded(result, graph.replay)

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                yield
            current.wait_stream(self._stream)


@dataclass(frozen=True)
class CapturedCycle:
    """A plan's recorded steps; none for the commit of a plan without drafts, whose tokens wait to be read."""

    draft: Recorded[DraftTree]
    verify: Recorded[Verification]
    commit: Recorded[None] | None


class CapturedRows(Rows):
    """Rows whose cycles are recorded when they are first needed.

    They go back to their `pool`, if it is still there, when a generation has ended.
    """

    def __init__(
        self,
        target: TargetModel,
        new_drafter: DrafterFactory,
        batch_size: int,
        capacity: int,
        recorder: Recorder,
        pool: "RowsPool | None" = None,
    ) -> None:
        super().__init__(target, new_drafter, batch_size, capacity)
        assert self.drafter.is_capturable
        self._recorder = recorder
        self._pool = None if pool is None else weakref.ref(pool)  # a pool that is dropped frees its rows at once
        self._samplers: list[tuple[int, Sampler]] = []
        self._cycles: dict[tuple[object, ...], CapturedCycle] = {}

    def begin(self, prompts: list[list[int]], params: Sequence[SamplingParams], depth: int, coupled: bool) -> None:
        self._cache.clear()
        self.drafter.reset()
        self._active.fill_(True)
        super().begin(prompts, params, depth, coupled)

    def verify(self, tree: DraftTree, longest: int) -> Verification:
        self._current.verify.replay()
        return self._current.verify.result

    def commit(self, plan: TreePlan, tree: DraftTree, verification: Verification) -> None:
        if self._current.commit is not None:
            self._current.commit.replay()
            return
        # The drafter reads these tokens when drafts go on, so they must outlive the next replay.
        verdict = replace(verification.verdict, tokens=verification.verdict.tokens.clone())
        super().commit(plan, tree, replace(verification, verdict=verdict))

    def release(self) -> None:
        if self._pool is not None and (pool := self._pool()) is not None:
            pool.take_back(self)

    @torch.inference_mode()
    def try_to_record(self) -> None:
        """Record a cycle of one drafted token for nothing.

        Raises:
            RuntimeError: a pass turns to the host and cannot be recorded.
        """
        self.begin([[0, 0]] * self.batch_size, [SamplingParams()] * self.batch_size, 1, coupled=True)
        self._record(TreePlan.chain(1), context_bound(1, self.capacity))

    def _draft(self, plan: TreePlan, longest: int) -> DraftTree:
        if plan.depth:  # what a prompt or cycles without drafts have left; captured cycles leave nothing
            self.drafter.catch_up(longest)
        bound = context_bound(longest, self.capacity)
        # A plan's sizing and the sampler hold tensors that the recording reads.
        key = (plan, plan.sizing, bound, self._sampler, self._rank)
        if key not in self._cycles:
            self._cycles[key] = self._record(plan, bound)
        self._current = self._cycles[key]
        self._current.draft.replay()
        return self._current.draft.result

    def _record(self, plan: TreePlan, bound: int) -> CapturedCycle:
        """Record the steps of a plan for contexts up to `bound`, while no row commits anything."""

        def draft() -> DraftTree:
            return Rows._draft(self, plan, bound)

        def verify(tree: DraftTree) -> Verification:
            return Rows.verify(self, tree, bound)

        def commit(tree: DraftTree, verification: Verification) -> None:
            Rows.commit(self, plan, tree, verification)
            self.drafter.catch_up(bound)

        def all_steps() -> None:
            tree = draft()
            verification = verify(tree)
            if plan.depth:
                commit(tree, verification)

        active = self._active.clone()
        self._active.fill_(False)
        try:
            self._recorder.warm_up(all_steps)
            tree = self._recorder.record(draft)
            verification = self._recorder.record(lambda: verify(tree.result))
            committed = self._recorder.record(lambda: commit(tree.result, verification.result)) if plan.depth else None
        finally:
            self._active.copy_(active)
        return CapturedCycle(tree, verification, committed)

    def _new_sampler(self, params: Sequence[SamplingParams], depth: int) -> Sampler:
        new = super()._new_sampler(params, depth)
        for kept_depth, kept in self._samplers:
            if (kept_depth, kept.work) == (depth, new.work):
                kept.take_over(new)
                return kept
        self._samplers.append((depth, new))
        return new


def context_bound(num_tokens: int, capacity: int) -> int:
    """The context length that `num_tokens` are recorded for: 256, 384, 512, 768, 1024, ..., or the capacity."""
    bound = SMALLEST_BOUND
    while bound < num_tokens:
        bound += bound // 2 if bound & (bound - 1) == 0 else bound // 3
    return min(bound, capacity)


class RowsPool:
    """Captured rows, lent to one generation at a time, so that recordings serve those that come later.

    `take` is a NewRows. Rows are lent again for as many rows with the same capacity (a power of two); it is for one
    target and one way of drafting.
    """

    def __init__(self, new_recorder: Callable[[torch.device], Recorder] = CudaRecorder) -> None:
        self._new_recorder = new_recorder
        self._idle: list[CapturedRows] = []
        self._can_record: bool | None = None

    def take(self, target: TargetModel, new_drafter: DrafterFactory, batch_size: int, capacity: int) -> Rows:
        """Rows for a generation; they come back when it is over."""
        capacity = max(SMALLEST_CAPACITY, 1 << (capacity - 1).bit_length())
        for rows in self._idle:
            if (rows.batch_size, rows.capacity) == (batch_size, capacity):
                self._idle.remove(rows)
                return rows
        if self._can_record is None:
            self._can_record = self._try(target, new_drafter)
        if not self._can_record:
            return Rows(target, new_drafter, batch_size, capacity)
        return self._new(target, new_drafter, batch_size, capacity)

    def _new(self, target: TargetModel, new_drafter: DrafterFactory, batch_size: int, capacity: int) -> CapturedRows:
        return CapturedRows(target, new_drafter, batch_size, capacity, self._new_recorder(target.device), self)

    def take_back(self, rows: CapturedRows) -> None:
        """Keep rows for later generations, within IDLE_BYTES."""
        self._idle.append(rows)
        while len(self._idle) > 1 and sum(rows.num_bytes for rows in self._idle) > IDLE_BYTES:
            self._idle.pop(0)

    def _try(self, target: TargetModel, new_drafter: DrafterFactory) -> bool:
        """Whether cycles can be recorded; some targets ask the host where to go on (mixtures of experts, say)."""
        if not new_drafter(1, SMALLEST_CAPACITY).is_capturable:
            return False
        try:
            self._new(target, new_drafter, 1, SMALLEST_CAPACITY).try_to_record()
        except RuntimeError as error:
            reason = str(error.__context__ or error).splitlines()[0]
            name = type(target.model).__name__
            warnings.warn(f"{name} cannot be captured, so cycles are slower: {reason}", stacklevel=2)
            return False
        return True
