"""What a process has learnt of a draft: costs, acceptance, gain, pauses, by batch size and kind of sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from draftwing.engine.engine import bucket
from draftwing.engine.readback import Outcomes
from draftwing.engine.statistics import Statistics
from draftwing.engine.tree_plan import TreeShape
from draftwing.plans.acceptance import AcceptanceTable, CalibratedSize
from draftwing.plans.costs import CycleCosts
from draftwing.plans.pauses import ClockedPlan, LookupTrial, Pause
from draftwing.threads import free_cores

if TYPE_CHECKING:
    from draftwing.plans.auto import AutoPlan

MOST_DRIFT, WATCHED_CYCLES = 2.0, 32
"""Of a generation's seconds over what measured costs say, in so many cycles at least, before they are measured anew."""
Key = tuple[int, bool]
"""A batch size, a power of two, and whether one of the rows samples."""


@dataclass
class Experience:
    """What generations have taught those that follow: one for each (head, sampled or greedy, batch size)."""

    acceptance: AcceptanceTable = field(default_factory=AcceptanceTable)
    gain: float = 1.1
    """Speculation's tokens per second over plain decoding's; at first a hope that makes it worth a trial."""
    outcomes: list[Outcomes] = field(default_factory=list)
    """Cycles that no lesson was drawn from yet; a short generation leaves them to the next."""
    num_lessons: int = 0
    """How often outcomes were turned into acceptance."""
    pause: Pause = field(default_factory=Pause)
    lookups: LookupTrial = field(default_factory=LookupTrial)
    _calibrated: CalibratedSize | None = None

    def take_in(self, outcomes: Outcomes) -> None:
        """Draw a lesson from the cycles that wait for it, whose outcomes these are."""
        self.acceptance.update(outcomes)
        self.outcomes.clear()
        self.num_lessons += 1

    def calibrated_on(self, device: torch.device) -> CalibratedSize:
        """What corrects the worth of nodes: always the same tensors, for captured cycles read from them."""
        if self._calibrated is None:
            self._calibrated = CalibratedSize(device)
        return self._calibrated


@dataclass
class Lessons:
    """What trees that size themselves know: a draft's `stored` acceptance counts, and what this process has learnt.

    Costs that were measured before the time `costs_since` are not believed.
    """

    stored: Mapping[str, Any] = field(default_factory=dict)
    costs: dict[Key, CycleCosts] = field(default_factory=dict)
    clocked: dict[TreeShape, ClockedPlan] = field(default_factory=dict)
    """Plans of n-grams with what the clock has said of them."""
    costs_since: float = 0.0
    watched: dict[Key, tuple["AutoPlan", Statistics]] = field(default_factory=dict)
    """The last generation of one row by these costs: what it expected, and what it took."""
    renewed: set[Key] = field(default_factory=set)
    """Costs that were measured anew; once a process is enough."""
    _experience: dict[Key, Experience] = field(default_factory=dict)

    def of_another(self, stored: Mapping[str, Any]) -> "Lessons":
        """Those of another draft or method, for which nothing has been learnt yet."""
        return Lessons(stored, costs_since=self.costs_since)

    def are_outdated(self, key: Key) -> bool:
        """Whether cycles took so much less or more than these costs say that the machine must be another by now.

        It is not another one where other processes make cycles slow: that passes.
        """
        if key not in self.watched:
            return False
        plan, taken = self.watched.pop(key)
        if taken.num_cycles < WATCHED_CYCLES or key in self.renewed or not plan.expected_seconds:
            return False  # also where nothing was drafted, so that no plan was asked
        ratio = (taken.total_seconds - taken.seconds["prefill"]) / plan.expected_seconds
        return ratio < 1 / MOST_DRIFT or (ratio > MOST_DRIFT and not free_cores().are_shared)

    def known_costs(self, batch_size: int, sampled: bool) -> CycleCosts:
        """The known costs of the smallest batch of at least so many rows, if possible of the same sampling.

        As rows end, fewer are left than were measured, and perhaps no sampled one; nothing is measured in the middle of
        a generation.
        """
        enough = [key for key in self.costs if key[0] >= batch_size]
        return self.costs[min(enough, key=lambda key: (key[1] != sampled, key[0]))]

    def experience(self, batch_size: int, sampled: bool) -> Experience:
        """What earlier generations with as many rows, and at first the draft's stored counts, teach the next ones."""
        key = bucket(batch_size), sampled
        if key not in self._experience:
            stored = self.stored.get("sampled" if sampled else "greedy")
            table = AcceptanceTable() if stored is None else AcceptanceTable.from_dict(stored)
            self._experience[key] = Experience(table)
        return self._experience[key]
