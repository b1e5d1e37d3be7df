"""When looked-up continuations compete for a tree's nodes: as long as they bring what the draft does not."""

from dataclasses import replace

from draftwing.engine.plan import TreePlan
from draftwing.engine.readback import CycleFacts, CycleReport
from draftwing.plans.pause import INHERITED_LOOKUP_PAUSE, Pause

SHARE = 0.03
"""Share of the tokens that lookups alone must bring: about their share of a cycle's seconds."""
TRIAL = 4
"""Studied cycles that lookups are tried for before they are judged."""
STUDIED = 2
"""Of so many cycles one is looked at closely, which takes time."""


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
    """A fixed plan, with a lookup in the cycles in which that may bring something."""

    def __init__(self, plan: TreePlan, trial: LookupTrial) -> None:
        self.largest = plan.with_lookup()
        self._without = replace(plan, lookup_depth=0)
        self._trial = trial
        trial.begin()
        self._looks_up, self._num_lookups = False, 0

    @property
    def learns(self) -> bool:
        """Whether this cycle looks up and is one of those that are studied."""
        return self._looks_up and self._num_lookups % STUDIED == 0

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> TreePlan:
        """The plan with or without its lookup."""
        self._looks_up = self._trial.looks_up()
        self._num_lookups += self._looks_up
        return self.largest if self._looks_up else self._without

    def learn(self, report: CycleReport) -> None:
        """Judge the lookups by what they brought."""
        self._trial.study(report.facts())
