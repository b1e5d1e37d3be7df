"""Trees that size themselves: as many levels and nodes as pay, or none, from measured costs and learnt acceptance.

Decoding turns seconds into tokens. The policy that brings most tokens per second spends a second wherever it brings
more than the rate reached so far (a level, a node), and drafts nothing where that rate is below plain decoding's.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from draftwing.engine.engine import bucket
from draftwing.engine.plan import TreePlan
from draftwing.engine.readback import CycleFacts, CycleReport, join_outcomes
from draftwing.plans.acceptance import NUM_DEPTHS, CalibratedSize
from draftwing.plans.costs import CycleCosts
from draftwing.plans.experience import Experience
from draftwing.plans.lookups import STUDIED
from draftwing.plans.pause import INHERITED_PAUSE

REQUEST_MEMORY = 30.0
"""Expected acceptances per bin that a request takes over from those before it."""
RATE_MEMORY = 40.0
"""Cycles over which speculation's rate is averaged."""
TRIAL = 4
"""Cycles that speculation is tried for before it is judged."""
SWITCH_GAIN = 1.03
"""What another fixed shape must promise before it replaces the present one."""
STUDIED_LATER = 8
"""Of so many cycles one is looked at closely, but of STUDIED at first and where lookups are tried."""
YOUTH = 8
"""Lessons for which "at first" lasts."""
LESSON = 4
"""Studied cycles after which what was learnt is put to use."""
FEW_NODES = 16
"""Nodes over which the seconds of one more are averaged where it is not known yet how many there will be."""
CONTEXT_STEP = 64
"""Tokens after which the costs are looked up anew."""
OFF = TreePlan.off()


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
    ) -> None:
        self.largest = largest
        self._costs_of, self._experience_of = costs_of, experience_of
        self._device, self._fixed_shapes = device, fixed_shapes
        self._sized: dict[tuple[int, bool], SizedPlan] = {}

    def next(self, num_rows: int, longest: int, sampled: bool = False) -> TreePlan:
        """The next cycle's plan for so many rows, given the committed tokens of the longest one."""
        key = bucket(num_rows), sampled
        if key not in self._sized:
            costs, experience = self._costs_of(*key), self._experience_of(*key)
            self._sized[key] = SizedPlan(costs, experience, self.largest, self._device, self._fixed_shapes)
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

    `largest` bounds the trees. Without `fixed_shapes`, levels and nodes are decided tree by tree, which reads scores
    while a tree grows: free on a CPU. With them every tree has one of these shapes (`largest` among them), so that each
    can be captured, and growth asks for the worth of nodes alone.
    """

    def __init__(
        self,
        costs: CycleCosts,
        experience: Experience,
        largest: TreePlan,
        device: torch.device,
        fixed_shapes: Sequence[TreePlan] = (),
    ) -> None:
        self.largest = largest
        self._all_costs, self._experience = costs, experience
        self._table = experience.acceptance.copy(REQUEST_MEMORY)
        if experience.sizing is None:
            experience.sizing = CalibratedSize(device)
        self._calibrated = experience.sizing
        self._shapes, self._shape = tuple(fixed_shapes), largest
        self._values: dict[TreePlan, float] = {}
        # What `next` gives for each shape, without and with its lookup: made once, not in every cycle.
        self._sized = {
            (shape, looks_up): dataclasses.replace(
                shape,
                sizing=self._calibrated if fixed_shapes else self,
                lookup_depth=shape.lookup_depth if looks_up else 0,
            )
            for shape in {largest, *fixed_shapes}
            for looks_up in (False, True)
        }
        self._tokens, self._seconds = 0.0, 0.0  # what speculation has brought a row, and cost, of late
        self.expected_seconds = 0.0  # of all cycles, by the costs
        self._costs_until = self._num_cycles = 0
        self._levels_seconds = 0.0  # of the last tree's levels beyond the first
        self._looks_up = False
        self._look_up_costs(0)
        self._use_lessons()
        self._start_trial(experience.gain)
        experience.pause.inherit(INHERITED_PAUSE)
        experience.lookups.begin()

    def next(self, longest: int) -> TreePlan:
        """The next cycle's plan, given the committed tokens of the longest row."""
        if not self._costs_until - CONTEXT_STEP <= longest < self._costs_until:
            self._look_up_costs(longest)
        if self._experience.pause.goes_on():
            self.expected_seconds += self._costs.plain[0]
            return OFF
        self._levels_seconds = self._costs.levels(self._shape) if self._shapes else 0.0
        self._looks_up = self._shape.lookup_depth > 0 and self._experience.lookups.looks_up()
        return self._sized[self._shape, self._looks_up]

    def worth(self, log_probs: torch.Tensor, depth: int) -> torch.Tensor:
        """The drafter's log-probabilities, corrected by how often such nodes at `depth` were accepted."""
        return self._calibrated.worth(log_probs, depth)

    def num_parents(self, scores: torch.Tensor, depth: int) -> int:
        """Of how many nodes at `depth`, with these scores `[B, K]`, the children bring most beyond their seconds."""
        # Numbers of Python: a level is so narrow that arrays would take longer.
        rows, rate = scores.tolist(), self._rate
        share = self._continuation[min(depth + 1, NUM_DEPTHS) - 1] / len(rows)
        best, best_gain, total = 0, 0.0, 0.0
        for count, (column, seconds) in enumerate(zip(zip(*rows, strict=True), self._step_seconds, strict=False), 1):
            total += max(share * sum(map(math.exp, column)) - rate * self._few_seconds, 0.0)
            if total - rate * seconds > best_gain:
                best, best_gain = count, total - rate * seconds
        if best:
            self._levels_seconds += self._step_seconds[best - 1]
        return best

    def num_nodes(self, scores: torch.Tensor, limit: int) -> int:
        """How many of the candidates with these scores `[B, M]` bring enough for their seconds, the root included."""
        ordered = np.sort(scores.numpy(), axis=1)[:, ::-1][:, : limit - 1]
        tokens = np.exp(ordered).mean(0)
        return 1 + max(1, int((tokens > self._rate * self._node_seconds[: len(tokens)]).sum()))

    def learn(self, report: CycleReport) -> None:
        """Take in what became of a cycle's tree; only every few are looked at closely, which takes time."""
        fade = 1 - 1 / RATE_MEMORY
        self._tokens = self._tokens * fade + report.num_tokens / report.num_rows
        expected = self._tree_seconds[report.num_nodes] + self._levels_seconds
        self.expected_seconds += expected
        self._seconds = self._seconds * fade + expected
        self._num_cycles += 1
        is_young = self._experience.num_lessons < YOUTH
        if self._num_cycles % (STUDIED if is_young or self._looks_up else STUDIED_LATER) == 0:
            facts = report.facts()
            self._experience.outcomes.append(facts.outcomes())
            if self._looks_up:
                self._experience.lookups.study(facts)
            if self._shapes:
                self._weigh_shapes(facts)
        if self._num_cycles >= TRIAL:
            self._judge()
        if len(self._experience.outcomes) >= LESSON:
            self._use_lessons()

    @property
    def _rate(self) -> float:
        """Tokens of a row per second that a further second must bring."""
        return float(max(self._plain_rate, self._tokens / self._seconds))

    def _judge(self) -> None:
        experience = self._experience
        experience.gain = self._tokens / self._seconds / self._plain_rate
        if experience.gain < 1:
            experience.pause.begin()
            self._start_trial(1.0)
        elif self._num_cycles > RATE_MEMORY:
            experience.pause.shorten()

    def _start_trial(self, gain: float) -> None:
        """Begin to measure the rate anew, expecting this gain over plain decoding."""
        self._num_cycles = 0
        self._seconds = TRIAL * self._costs.cycle(self._shape)
        self._tokens = gain * self._plain_rate * self._seconds

    def _look_up_costs(self, longest: int) -> None:
        self._costs_until = longest + CONTEXT_STEP
        self._costs = self._all_costs.at(longest)
        self._plain_rate = 1 / self._costs.plain[0]
        nodes = np.arange(1, self.largest.num_nodes + 1)
        verify = np.interp(nodes, self._costs.num_nodes, self._costs.verify[0])
        self._node_seconds = np.maximum(np.diff(verify), 0.0)  # of the second node, the third, ...
        self._tree_seconds = [self._costs.tree(num_nodes, 0.0) for num_nodes in range(self.largest.num_nodes + 1)]
        self._few_seconds = float(self._node_seconds[:FEW_NODES].mean())
        self._step_seconds = [self._costs.step(width) for width in range(1, self.largest.width + 1)]

    def _use_lessons(self) -> None:
        if self._experience.outcomes:
            outcomes = join_outcomes(self._experience.outcomes)
            self._table.update(outcomes)
            self._experience.acceptance.update(outcomes)
            self._experience.outcomes.clear()
            self._experience.num_lessons += 1
        self._calibrated.learn(self._table)
        self._continuation = self._table.continuation.tolist()

    def _weigh_shapes(self, facts: CycleFacts) -> None:
        """Estimate what each shape would have brought, and take the one with the best rate."""
        drafted_depth = min(self._shape.depth, facts.max_depth)  # a looked-up continuation may lie deeper
        continuation = self._continuation[min(drafted_depth, NUM_DEPTHS) - 1]
        for shape in self._shapes:
            brought = _expected_tokens(facts, drafted_depth, shape, continuation)
            self._values[shape] = brought + (self._values.get(shape, brought) - brought) * (1 - 1 / RATE_MEMORY)
        rates = {shape: (1 + value) / self._costs.cycle(shape) for shape, value in self._values.items()}
        best = max(rates, key=rates.__getitem__)
        if rates[best] > SWITCH_GAIN * rates[self._shape]:
            self._shape = best


def _expected_tokens(facts: CycleFacts, drafted_depth: int, shape: TreePlan, continuation: float) -> float:
    """Draft tokens that a row of this shape is expected to have accepted, judged from another tree of `drafted_depth`.

    What the tree shows is summed; what lies beyond it is judged kindly, so that a larger shape gets its trial: nodes
    are as good as the worst one shown, further levels continue as the deepest one does.
    """
    probs = np.where(facts.drafted & (facts.depths <= shape.depth), np.exp(facts.scores), 0.0)[:, 1:]
    ordered = -np.sort(-probs, axis=1)[:, : shape.num_nodes - 1]
    further_nodes = max(0, shape.num_nodes - facts.num_nodes)
    expected = ordered.sum(1) + further_nodes * ordered[:, -1]
    if shape.depth > drafted_depth:
        leaves = np.where(facts.depths[:, 1:] == drafted_depth, probs, 0.0).sum(1)
        expected += leaves * sum(continuation**level for level in range(1, shape.depth - drafted_depth + 1))
    return float(np.minimum(expected, shape.depth).mean())
