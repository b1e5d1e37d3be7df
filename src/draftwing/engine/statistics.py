"""What a generation did: cycles, acceptance, and where the seconds went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

STAGES = ("prefill", "draft", "verify", "commit", "host")


@dataclass
class CycleCounts:
    """What cycles brought, to one row or to several.

    Attributes:
        num_cycles: cycles in which a row was still generating, summed over rows.
        num_drafted: tokens that the target was asked about beside plain decoding's.
        num_tokens: tokens emitted; cut ones are neither returned nor counted, here and by depth.
        accepted_at: `[d]` cycles that emitted an accepted node of depth d + 1; `reached_at` those that emitted a token
            at that depth, accepted or the bonus, of a plan at least d + 1 deep. So num_tokens is the sum of
            `accepted_at` and the cycles whose bonus token was emitted.
    """

    num_cycles: int = 0
    num_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    reached_at: list[int] = field(default_factory=list)
    num_drafted: int = 0

    @property
    def acceptance_length(self) -> float:
        """tau: tokens per cycle, the bonus token included; 1.0 is no gain."""
        return self.num_tokens / self.num_cycles if self.num_cycles else 0.0

    @property
    def acceptance_rate(self) -> list[float]:
        """P(accepted at depth d + 1 | its parent was accepted), conditional."""
        pairs = zip(self.accepted_at, self.reached_at, strict=True)
        return [accepted / reached if reached else 0.0 for accepted, reached in pairs]

    @property
    def num_accepted(self) -> int:
        """Drafted tokens that were emitted."""
        return sum(self.accepted_at)

    @property
    def histogram(self) -> list[int]:
        """`[j]` cycles that emitted j drafted tokens."""
        at_least = [self.num_cycles, *self.accepted_at, 0]
        return [count - more for count, more in pairwise(at_least)]

    def count_cycle(self, num_accepted: int, depth: int, num_emitted: int, num_drafted: int = 0) -> None:
        """Record one row's cycle, of which the text's end may have cut the last tokens."""
        self.num_cycles += 1
        self.num_drafted += num_drafted
        self.num_tokens += num_emitted
        self._deepen(depth)
        for level in range(min(depth, num_emitted)):
            self.reached_at[level] += level <= num_accepted
            self.accepted_at[level] += level < num_accepted

    def _deepen(self, depth: int) -> None:
        missing = depth - len(self.accepted_at)
        self.accepted_at += [0] * missing
        self.reached_at += [0] * missing


@dataclass
class Statistics(CycleCounts):
    """Counts over all rows of one generation, and its `seconds` by stage.

    The stages are prefill, draft, verify, commit, host (reading tokens back, stop checks).
    What recording cycles took (captured.py) is no stage's, but `recording_seconds`.
    `rounding_problem` says why a token may differ from plain decoding's where logits nearly tie; None: it cannot.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    recording_seconds: float = 0.0
    rounding_problem: str | None = None

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.total_seconds if self.num_tokens else 0.0

    def merge(self, other: "Statistics") -> None:
        """Add another generation's counts to this one's."""
        self.num_cycles += other.num_cycles
        self.num_drafted += other.num_drafted
        self.num_tokens += other.num_tokens
        self.recording_seconds += other.recording_seconds
        self.rounding_problem = self.rounding_problem or other.rounding_problem
        self._deepen(len(other.accepted_at))
        for level, (accepted, reached) in enumerate(zip(other.accepted_at, other.reached_at, strict=True)):
            self.accepted_at[level] += accepted
            self.reached_at[level] += reached
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready figures."""
        return {
            "num_cycles": self.num_cycles,
            "num_tokens": self.num_tokens,
            "acceptance_length": self.acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "seconds": dict(self.seconds),
            "recording_seconds": self.recording_seconds,
            "rounding_problem": self.rounding_problem,
        }


class StageClock:
    """Adds the time of each stage to a Statistics; on a GPU by events, so that nothing waits for the device.

    There the stage `host` gets what all stages took on the host less what they took on the device, so that the sum of
    the stages is the time that passed.
    """

    def __init__(self, statistics: Statistics, device: torch.device) -> None:
        self._statistics, self._device = statistics, device
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._host_seconds = 0.0  # in stages, not settled yet; a caller's time between two cycles is not ours

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        if self._device.type != "cuda":
            yield
            self._statistics.seconds[name] += time.perf_counter() - start
            return
        begun = self._record()
        yield
        if name != "host":  # its share is what `settle` leaves over
            self._events.append((name, begun, self._record()))
        self._host_seconds += time.perf_counter() - start

    def settle(self, wait: bool = False) -> None:
        """End a cycle: count the stages that the device has done, or with `wait` all of them.

        A device that is still at the last stage is not waited for otherwise; that stage counts with the next cycle.
        """
        if wait and self._events:
            before = time.perf_counter()
            self._events[-1][2].synchronize()
            self._host_seconds += time.perf_counter() - before
        seconds = self._statistics.seconds
        unfinished: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        for name, start, end in self._events:
            if unfinished or not end.query():
                unfinished.append((name, start, end))
                continue
            on_device = start.elapsed_time(end) / 1000
            seconds[name] += on_device
            self._host_seconds -= on_device
        seconds["host"] += max(0.0, self._host_seconds)
        self._events, self._host_seconds = unfinished, min(0.0, self._host_seconds)

    def _record(self) -> torch.cuda.Event:
        """An event of the device's own stream; the current device may be another."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
