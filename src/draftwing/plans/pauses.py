"""Trying what may not pay: pauses from drafting, from lookups and from n-grams, longer while that stays so.

Drafts of n-grams cost nothing but the target's pass: a pass over many nodes pays for a single row whose text repeats
itself, and not for a batch. So the clock judges them: nothing is measured beforehand, and no token depends on it.
"""

import time
from dataclasses import dataclass
from statistics import fmean, median

from draftwing.engine.engine import bucket
from draftwing.engine.readback import CycleFacts, CycleReport
from draftwing.engine.tree_plan import OFF, TreeShape

SHORTEST_PAUSE, LONGEST_PAUSE = 16, 1024
"""Cycles of a pause."""
INHERITED_PAUSE, INHERITED_LOOKUP_PAUSE = 512, 64
"""Cycles of a pause, from drafting and from lookups, that a generation takes over from those before it, at most."""
SHARE = 0.03
"""Share of the tokens that lookups alone must bring: about their share of a cycle's seconds."""
TRIAL = 4
"""Studied cycles that lookups are tried for before they are judged."""
STUDIED = 2
"""Of so many cycles one is looked at closely, which takes time."""
TRIED = 8
"""Cycles of each kind that a trial compares."""
BELIEVED = 256
"""Cycles until a tree that was faster is tried again, if it stays so."""
RECENT = 16
"""Drafted cycles whose tokens say whether it does."""


@dataclass
class Pause:
    """Cycles without something that did not pay; a pause that was right is followed by one twice as long."""

    length: int = SHORTEST_PAUSE
    left: int = 0

    def goes_on(self) -> bool:
        """Whether this cycle is one of the pause's."""
        if self.left == 0:
            return False
        self.left -= 1
        return True

    def inherit(self, most: int) -> None:
        """Begin a generation: its text may be of another kind, so pauses start from this length at most."""
        self.left, self.length = min(self.left, most), min(self.length, most)

    def begin(self) -> None:
        self.left, self.length = self.length, min(2 * self.length, LONGEST_PAUSE)

    def shorten(self) -> None:
        """Forget that pauses were right: it has paid for a while."""
        self.length = SHORTEST_PAUSE


class LookupTrial:
    """Tries lookups for a while, pauses them where they bring little, and tries again.

    Where trees size themselves it outlives a generation, so that short ones come to a verdict together; but the next
    one waits for a short pause only, for its text may be an edit.
    """

    def __init__(self) -> None:
        self.pause = Pause()
        self._num_studied, self._looked_up, self._accepted = 0, 0.0, 0.0

    def begin(self) -> None:
        """Begin a generation."""
        self.pause.inherit(INHERITED_LOOKUP_PAUSE)

    def looks_up(self) -> bool:
        """Whether this cycle looks up."""
        return not self.pause.goes_on()

    def study(self, facts: CycleFacts) -> None:
        """Count what lookups alone brought to a cycle that looked up."""
        self._num_studied += 1
        self._looked_up += float((facts.accepted & ~facts.drafted).sum() - len(facts.depths))  # less the roots
        self._accepted += float(facts.accepted.sum())
        if self._num_studied < TRIAL:
            return
        if self._looked_up < SHARE * self._accepted:
            self.pause.begin()
        else:
            self.pause.shorten()
        self._num_studied, self._looked_up, self._accepted = 0, 0.0, 0.0


class LookupPlan:
    """A fixed tree, with a lookup in the cycles in which that may bring something."""

    def __init__(self, tree: TreeShape, trial: LookupTrial) -> None:
        self.largest = tree.with_lookup()
        self._without = tree
        self._trial = trial
        trial.begin()
        self._looks_up, self._num_lookups = False, 0

    @property
    def learns(self) -> bool:
        """Whether this cycle looks up and is one of those that are studied."""
        return self._looks_up and self._num_lookups % STUDIED == 0

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> TreeShape:
        """The tree with or without its lookup."""
        self._looks_up = self._trial.looks_up()
        self._num_lookups += self._looks_up
        return self.largest if self._looks_up else self._without

    def learn(self, report: CycleReport) -> None:
        """Judge the lookups by what they brought."""
        self._trial.study(report.facts())


class ClockedPlan:
    """A tree in the cycles in which it is faster than none, by a clock for each batch size and kind of sampling."""

    learns = True

    def __init__(self, tree: TreeShape) -> None:
        self.largest = tree
        self._clocks: dict[tuple[int, bool], Clock] = {}
        self._current = Clock()

    def begin(self) -> "ClockedPlan":
        """Begin a generation, whose text may be of another kind; returns itself."""
        for clock in self._clocks.values():
            clock.begin()
        return self

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> TreeShape:
        """The tree, or none; the cycle before has ended by now."""
        clock = self._clocks.setdefault((bucket(num_rows), sampled), Clock())
        if clock is not self._current:
            clock.skip()
            self._current = clock
        return self.largest if clock.drafts() else OFF

    def learn(self, report: CycleReport) -> None:
        """Count what a drafted cycle brought."""
        self._current.learn(report.num_tokens / report.num_rows)


class Clock:
    """Tries drafting and plain decoding in turn, then goes on with the faster of the two while it stays so."""

    def __init__(self) -> None:
        self._pause = Pause()
        self._believed = 0  # cycles left for which drafting is taken to be faster
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._brought: list[float] = []  # tokens of a row in each drafted cycle of a trial
        self._needed = self._recent = 0.0  # tokens that pay for a drafted cycle, and those that came lately
        self._began, self._drafts, self._is_trial = 0.0, False, False

    def begin(self) -> None:
        """Begin a generation."""
        self.skip()
        self._pause.inherit(INHERITED_LOOKUP_PAUSE)

    def skip(self) -> None:
        """Do not count the time since the last cycle: others have used it."""
        self._is_trial = False

    def drafts(self) -> bool:
        """Whether the cycle that begins now drafts."""
        now = time.perf_counter()
        if self._is_trial:
            self._seconds[self._drafts].append(now - self._began)
        self._drafts, self._is_trial = self._choose()
        self._began = now
        return self._drafts

    def learn(self, tokens: float) -> None:
        """Count the tokens that a row had from a drafted cycle."""
        if self._is_trial:
            self._brought.append(tokens)
            return
        self._recent += (tokens - self._recent) / RECENT
        if self._recent < self._needed:
            self._believed = 0
            self._pause.begin()

    def _choose(self) -> tuple[bool, bool]:
        """Whether to draft, and whether the cycle is part of a trial."""
        if self._believed:
            self._believed -= 1
            return True, False
        if self._pause.goes_on():
            return False, False
        plain, drafted = self._seconds[False], self._seconds[True]
        if min(len(plain), len(drafted)) < TRIED:
            return len(plain) > len(drafted), True
        # Medians, for prompts were read in some of the cycles.
        self._needed, self._recent = median(drafted) / max(median(plain), 1e-9), fmean(self._brought)
        for measured in (plain, drafted, self._brought):
            measured.clear()
        if self._recent < self._needed:
            self._pause.begin()
            return self._choose()
        self._pause.shorten()
        self._believed = BELIEVED
        return True, False
