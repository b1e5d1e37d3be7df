"""A fixed plan in the cycles in which it is faster than plain decoding, by the clock.

For drafts that cost nothing but the target's pass, as n-grams do: a pass over many nodes pays for a single row whose
text repeats itself, and not for a batch. Nothing is measured beforehand, and no token depends on it.
"""

import time
from statistics import fmean, median

from draftwing.engine.plan import TreePlan
from draftwing.engine.readback import CycleReport
from draftwing.plans.pause import INHERITED_LOOKUP_PAUSE, Pause

TRIED = 8
"""Cycles of each kind that a trial compares."""
BELIEVED = 256
"""Cycles until a plan that was faster is tried again."""


class ClockedPlan:
    """Tries the plan and plain decoding in turn, then goes on with the faster of the two for a while."""

    learns = True

    def __init__(self, plan: TreePlan) -> None:
        self.largest = plan
        self._off = TreePlan.off()
        self._pause = Pause()
        self._believed = 0  # cycles left for which the plan is taken to be faster
        self._measured: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
        self._began, self._drafts, self._tokens = 0.0, False, 0

    def begin(self) -> "ClockedPlan":
        """Begin a generation, whose text may be of another kind; returns itself."""
        self._tokens = 0  # the time since the last cycle is nobody's
        self._pause.inherit(INHERITED_LOOKUP_PAUSE)
        return self

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> TreePlan:
        """The plan, or none; the cycle before has ended by now."""
        now = time.perf_counter()
        if self._tokens:
            self._measured[self._drafts].append((now - self._began, self._tokens))
        self._drafts, on_trial = self._choose()
        self._began, self._tokens = now, num_rows if on_trial else 0
        return self.largest if self._drafts else self._off

    def learn(self, report: CycleReport) -> None:
        """Count what a drafted cycle brought."""
        if self._tokens:
            self._tokens = report.num_tokens

    def _choose(self) -> tuple[bool, bool]:
        """Whether to draft, and whether the cycle is part of a trial."""
        if self._believed:
            self._believed -= 1
            return True, False
        if self._pause.goes_on():
            return False, False
        plain, drafted = self._measured[False], self._measured[True]
        if min(len(plain), len(drafted)) < TRIED:
            return len(plain) > len(drafted), True
        pays = _rate(drafted) > _rate(plain)
        plain.clear()
        drafted.clear()
        if not pays:
            self._pause.begin()
            return self._choose()
        self._pause.shorten()
        self._believed = BELIEVED
        return True, False


def _rate(cycles: list[tuple[float, int]]) -> float:
    """Tokens per second; a cycle in which prompts were read besides is an exception that the median leaves out."""
    return fmean(tokens for _, tokens in cycles) / max(median(seconds for seconds, _ in cycles), 1e-9)
