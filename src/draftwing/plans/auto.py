"""Trees that size themselves: as many levels and nodes as pay, or none, from measured costs and learnt acceptance."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from draftwing.engine.engine import bucket
from draftwing.engine.readback import CycleReport, join_outcomes
from draftwing.engine.tree_plan import OFF, TreePlan, TreeShape
from draftwing.plans.costs import CycleCosts
from draftwing.plans.lessons import Experience
from draftwing.plans.pauses import INHERITED_PAUSE, STUDIED
from draftwing.plans.sizing import RATE_MEMORY, FixedShapes, PaidSize, Prices, Rate

REQUEST_MEMORY = 30.0
"""Expected acceptances per bin that a request takes over from those before it."""
TRIAL = 4
"""Cycles that speculation is tried for before it is judged."""
STUDIED_LATER = 8
"""Of so many cycles one is looked at closely, but of STUDIED at first and where lookups are tried."""
YOUTH = 8
"""Lessons for which "at first" lasts."""
LESSON = 4
"""Studied cycles after which what was learnt is put to use."""
CONTEXT_STEP = 64
"""Tokens after which the costs are looked up anew."""


class AutoPlan:
    """Plans the cycles of an engine by how many rows they have, and learns from each.

    For each number of rows, rounded up to a power of two, and for whether one of them samples, there is a SizedPlan;
    `costs_of` and `experience_of` give what it knows. The other arguments are those of SizedPlan.
    """

    learns = True

    def __init__(
        self,
        costs_of: Callable[[int, bool], CycleCosts],
        experience_of: Callable[[int, bool], Experience],
        largest: TreePlan,
        device: torch.device,
        fixed_shapes: Sequence[TreePlan] = (),
        with_lookup: bool = False,
    ) -> None:
        self.largest: TreeShape = largest.with_lookup() if with_lookup else largest
        self._costs_of, self._experience_of = costs_of, experience_of
        self._shaping = largest, device, fixed_shapes, with_lookup
        self._sized: dict[tuple[int, bool], SizedPlan] = {}

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> TreeShape:
        """The next cycle's tree for so many rows, given the committed tokens of the longest one."""
        key = bucket(num_rows), sampled
        if key not in self._sized:
            self._sized[key] = SizedPlan(self._costs_of(*key), self._experience_of(*key), *self._shaping)
        self._current = self._sized[key]
        return self._current.next(longest)

    @property
    def expected_seconds(self) -> float:
        """Of all cycles, by the costs."""
        return sum(plan.expected_seconds for plan in self._sized.values())

    def learn(self, report: CycleReport) -> None:
        """Take in what became of a cycle's tree."""
        self._current.learn(report)


class SizedPlan:
    """Plans the cycles of one number of rows or a few less, and learns from each.

    `largest` bounds the trees. Without `fixed_shapes`, levels and nodes are decided tree by tree. With them every tree
    has one of these shapes (`largest` among them), so that each can be captured, and growth asks for the worth of nodes
    alone. `with_lookup`: continuations from the text compete for the nodes, while that brings something.
    """

    def __init__(
        self,
        costs: CycleCosts,
        experience: Experience,
        largest: TreePlan,
        device: torch.device,
        fixed_shapes: Sequence[TreePlan] = (),
        with_lookup: bool = False,
    ) -> None:
        self._costs, self._experience, self._largest = costs, experience, largest
        self._table = experience.acceptance.copy(REQUEST_MEMORY)
        self._calibrated = experience.calibrated_on(device)
        self._rate = Rate()
        self.sizing = PaidSize(self._calibrated, self._rate)
        self._has_fixed_shapes = bool(fixed_shapes)
        self._shapes = FixedShapes(fixed_shapes, largest)
        sizing = self._calibrated if fixed_shapes else self.sizing
        self._trees = {shape: replace(shape, sizing=sizing) for shape in {largest, *fixed_shapes}}
        self._with_lookup = {shape: tree.with_lookup() for shape, tree in self._trees.items() if with_lookup}
        self.expected_seconds = 0.0  # of all cycles, by the costs
        self._prices_until = self._num_cycles = 0
        self._looks_up = False
        self._look_up_prices(0)
        self._use_lessons()
        self._start_trial(experience.gain)
        experience.pause.inherit(INHERITED_PAUSE)
        experience.lookups.begin()

    def next(self, longest: int) -> TreeShape:
        """The next cycle's tree, given the committed tokens of the longest row."""
        if not self._prices_until - CONTEXT_STEP <= longest < self._prices_until:
            self._look_up_prices(longest)
        prices, self._shape = self.sizing.prices, self._shapes.best
        if self._experience.pause.goes_on():
            self.expected_seconds += prices.plain
            return OFF
        self.sizing.levels_seconds = prices.costs.levels(self._shape) if self._has_fixed_shapes else 0.0
        self._looks_up = bool(self._with_lookup) and self._experience.lookups.looks_up()
        return self._with_lookup[self._shape] if self._looks_up else self._trees[self._shape]

    def learn(self, report: CycleReport) -> None:
        """Take in what became of a cycle's tree; every few are looked at closely, which takes time and may wait."""
        expected = self.sizing.prices.trees[report.num_nodes] + self.sizing.levels_seconds
        self.expected_seconds += expected
        self._rate.count(report.num_tokens / report.num_rows, expected)
        self._num_cycles += 1
        is_young = self._experience.num_lessons < YOUTH
        if self._num_cycles % (STUDIED if is_young or self._looks_up else STUDIED_LATER) == 0:
            report.defer(partial(self._study, report, self._shape, self._looks_up))
        if self._num_cycles >= TRIAL:
            self._judge()

    def _study(self, report: CycleReport, shape: TreePlan, looked_up: bool) -> None:
        """Look closely at what became of the nodes of a tree of this shape."""
        facts = report.facts()
        self._experience.outcomes.append(facts.outcomes())
        if looked_up:
            self._experience.lookups.study(facts)
        if self._has_fixed_shapes:
            self._shapes.weigh(facts, shape, self.sizing.continuation, self.sizing.prices.costs)
        if len(self._experience.outcomes) >= LESSON:
            self._use_lessons()

    def _judge(self) -> None:
        experience = self._experience
        experience.gain = self._rate.gain
        if experience.gain < 1:
            experience.pause.begin()
            self._start_trial(1.0)
        elif self._num_cycles > RATE_MEMORY:
            experience.pause.shorten()

    def _start_trial(self, gain: float) -> None:
        """Begin to measure the rate anew, expecting this gain over plain decoding."""
        self._num_cycles = 0
        self._rate.expect(gain, TRIAL * self.sizing.prices.costs.cycle(self._shapes.best))

    def _look_up_prices(self, longest: int) -> None:
        self._prices_until = longest + CONTEXT_STEP
        self.sizing.prices = Prices.at(longest, self._costs, self._largest)
        self._rate.plain = 1 / self.sizing.prices.plain

    def _use_lessons(self) -> None:
        if self._experience.outcomes:
            outcomes = join_outcomes(self._experience.outcomes)
            self._table.update(outcomes)
            self._experience.take_in(outcomes)
        self._calibrated.learn(self._table)
        self.sizing.continuation = self._table.continuation.tolist()
