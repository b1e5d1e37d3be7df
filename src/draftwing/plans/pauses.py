"""Trying what may not pay: pauses from drafting, from lookups and from n-grams, longer while that stays so.

Drafts of n-grams cost nothing but the target's pass: a pass over many nodes pays for a single row whose text repeats
itself, and not for a batch. So the clock judges them: nothing is measured beforehand, and no token depends on it.
"""

import time
from dataclasses import dataclass
from statistics import fmean, median

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
"""Cycles until a tree that was faster is tried again."""


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
    """Tries a tree and plain decoding in turn, then goes on with the faster of the two for a while."""

    learns = True

    def __init__(self, tree: TreeShape) -> None:
        self.largest = tree
        self._pause = Pause()
        self._believed = 0  # cycles left for which the tree is taken to be faster
        self._measured: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
        self._began, self._drafts, self._tokens = 0.0, False, 0

    def begin(self) -> "ClockedPlan":
        """Begin a generation, whose text may be of another kind; returns itself."""
        self._tokens = 0  # the time since the last cycle is nobody's
        self._pause.inherit(INHERITED_LOOKUP_PAUSE)
        return self

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> TreeShape:
        """The tree, or none; the cycle before has ended by now."""
        now = time.perf_counter()
        if self._tokens:
            self._measured[self._drafts].append((now - self._began, self._tokens))
        self._drafts, on_trial = self._choose()
        self._began, self._tokens = now, num_rows if on_trial else 0
        return self.largest if self._drafts else OFF

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
