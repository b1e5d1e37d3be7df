"""What judges the nodes of trees that size themselves, by the tokens that they bring for their seconds.

Decoding turns seconds into tokens. The policy that brings most tokens per second spends a second wherever it brings
more than the rate reached so far (a level, a node), and drafts nothing where that rate is below plain decoding's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftwing.engine.readback import Array, CycleFacts
from draftwing.engine.tree_plan import Bins, Sizing, TreePlan
from draftwing.plans.acceptance import NUM_DEPTHS, CalibratedSize
from draftwing.plans.costs import CycleCosts

RATE_MEMORY = 40.0
"""Cycles over which speculation's rate is averaged."""
SWITCH_GAIN = 1.03
"""What another fixed shape must promise before it replaces the present one."""
FEW_NODES = 16
"""Nodes over which the seconds of one more are averaged where it is not known yet how many there will be."""


@dataclass(frozen=True)
class Prices:
    """Seconds of a cycle's parts at one context, for trees of up to a size.

    Attributes:
        costs: those of the context, from which the prices are taken.
        plain: a cycle without drafts.
        nodes: of the second node, the third, ...
        trees: of a tree of so many nodes and one level.
        few_nodes: of one node, while it is not known how many there will be.
        steps: of a further level of 1, 2, ... nodes.
    """

    costs: CycleCosts
    plain: float
    nodes: Array
    trees: Sequence[float]
    few_nodes: float
    steps: Sequence[float]

    @staticmethod
    def at(context: int, costs: CycleCosts, largest: TreePlan) -> "Prices":
        """The prices at so many committed tokens."""
        costs = costs.at(context)
        trees = costs.trees(range(largest.num_nodes + 1))
        nodes = np.maximum(np.diff(trees[1:]), 0.0)
        few, steps = float(nodes[:FEW_NODES].mean()), costs.steps(range(1, largest.width + 1)).tolist()
        return Prices(costs, plain=costs.plain[0], nodes=nodes, trees=trees.tolist(), few_nodes=few, steps=steps)


class Rate:
    """Tokens of a row per second: plain decoding's, by the costs, and what speculation has brought of late."""

    def __init__(self) -> None:
        self.plain = self._tokens = self._seconds = 0.0

    def expect(self, gain: float, seconds: float) -> None:
        """Begin anew, as if so many seconds had brought this gain over plain decoding."""
        self._tokens, self._seconds = gain * self.plain * seconds, seconds

    def count(self, num_tokens: float, seconds: float) -> None:
        """Count a cycle."""
        fade = 1 - 1 / RATE_MEMORY
        self._tokens = self._tokens * fade + num_tokens
        self._seconds = self._seconds * fade + seconds

    @property
    def gain(self) -> float:
        """Speculation's rate over plain decoding's."""
        return self._tokens / self._seconds / self.plain

    @property
    def required(self) -> float:
        """What a further second must bring."""
        return float(max(self.plain, self._tokens / self._seconds))


class PaidSize(Sizing):
    """The sizing that drafts and keeps what pays; it reads scores while a tree grows, which is free on a CPU.

    Attributes:
        prices: at the present context.
        continuation: P(some child is accepted | the node is), by the children's depth.
        levels_seconds: of the last tree's levels beyond the first.
    """

    prices: Prices
    continuation: Sequence[float]

    def __init__(self, calibrated: CalibratedSize, rate: Rate) -> None:
        self._calibrated, self._rate = calibrated, rate
        self.levels_seconds = 0.0

    def bins(self, depth: int) -> Bins | None:
        """By how often such nodes at `depth` were accepted."""
        return self._calibrated.bins(depth)

    def num_parents(self, scores: torch.Tensor, depth: int) -> int:
        """Of how many nodes at `depth`, with these scores `[B, K]`, the children bring most beyond their seconds."""
        # Numbers of Python: a level is so narrow that arrays would take longer.
        rows, rate, prices = scores.tolist(), self._rate.required, self.prices
        share = self.continuation[min(depth + 1, NUM_DEPTHS) - 1] / len(rows)
        best, best_gain, total = 0, 0.0, 0.0
        for count, (column, seconds) in enumerate(zip(zip(*rows, strict=True), prices.steps, strict=False), 1):
            total += max(share * sum(map(math.exp, column)) - rate * prices.few_nodes, 0.0)
            if total - rate * seconds > best_gain:
                best, best_gain = count, total - rate * seconds
        if best:
            self.levels_seconds += prices.steps[best - 1]
        return best

    def num_nodes(self, scores: torch.Tensor, limit: int) -> int:
        """How many of the candidates with these scores `[B, M]` bring enough for their seconds, the root included."""
        ordered = np.sort(scores.numpy(), axis=1)[:, ::-1][:, : limit - 1]
        tokens = np.exp(ordered).mean(0)
        return 1 + max(1, int((tokens > self._rate.required * self.prices.nodes[: len(tokens)]).sum()))


class FixedShapes:
    """The best of a few shapes, each of which can be captured; at first the largest of all."""

    def __init__(self, shapes: Sequence[TreePlan], largest: TreePlan) -> None:
        self._shapes, self.best = shapes, largest
        self._values: dict[TreePlan, float] = {}

    def weigh(self, facts: CycleFacts, drafted: TreePlan, continuation: Sequence[float], costs: CycleCosts) -> None:
        """Estimate what each shape would have brought in a cycle that `drafted` one, and take that of the best rate."""
        drafted_depth = min(drafted.depth, facts.max_depth)  # a looked-up continuation may lie deeper
        further = continuation[min(drafted_depth, NUM_DEPTHS) - 1]
        for shape in self._shapes:
            brought = _expected_tokens(facts, drafted_depth, shape, further)
            self._values[shape] = brought + (self._values.get(shape, brought) - brought) * (1 - 1 / RATE_MEMORY)
        rates = {shape: (1 + value) / costs.cycle(shape) for shape, value in self._values.items()}
        best = max(rates, key=rates.__getitem__)
        if rates[best] > SWITCH_GAIN * rates[self.best]:
            self.best = best


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
