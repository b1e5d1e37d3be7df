"""How often a drafter's tokens are accepted, learnt while decoding: what a draft node's score is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from draftwing.engine.readback import Array, Outcomes
from draftwing.engine.tree_plan import Bins, Sizing

EDGES = np.log([0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97])
"""Between the bins of a node's log-probability given its parent."""
NUM_DEPTHS = 3
"""Depths are told apart up to this one; deeper nodes count as it."""
MOST_WORTH = -1e-3
"""Of a corrected log-probability: a certain node is worth less than its parent too."""
TRUST = 2.0
"""Accepted nodes that a bin must have been wrong by before its correction outweighs the drafter's own word."""
MEMORY = 400.0
"""Expected acceptances a bin remembers; older ones fade."""


class CalibratedSize(Sizing):
    """A plan's own shape, with the drafter's probabilities corrected by a table; kept on a device, in one place."""

    def __init__(self, device: torch.device) -> None:
        self._edges = torch.tensor(EDGES, dtype=torch.float32, device=device)
        self._correction = torch.zeros(NUM_DEPTHS, len(EDGES) + 1, dtype=torch.float32, device=device)

    @torch.inference_mode()
    def learn(self, table: "AcceptanceTable") -> None:
        """Correct as this table says from now on."""
        self._correction.copy_(torch.from_numpy(table.correction), non_blocking=True)

    def bins(self, depth: int) -> Bins:
        return Bins(self._edges, self._correction[min(depth, NUM_DEPTHS) - 1], MOST_WORTH)


@dataclass(eq=False)
class AcceptanceTable:
    """P(a node is accepted | its parent is), by what the drafter says of it and by its depth.

    The drafter's log-probability is corrected by log(accepted / expected) of its bin: nothing is changed for a
    calibrated drafter, and bins that were seen seldom are hardly corrected.

    Attributes:
        accepted, expected: nodes `[depths, bins]`.
        extended, parents: accepted nodes by depth, and those that had drafted children by the children's, `[depths]`.
    """

    accepted: Array = field(default_factory=lambda: np.zeros((NUM_DEPTHS, len(EDGES) + 1)))
    expected: Array = field(default_factory=lambda: np.zeros((NUM_DEPTHS, len(EDGES) + 1)))
    extended: Array = field(default_factory=lambda: np.zeros(NUM_DEPTHS))
    parents: Array = field(default_factory=lambda: np.zeros(NUM_DEPTHS))

    @property
    def correction(self) -> Array:
        """What is added to a node's log-probability, `[depths, bins]`."""
        corrected: Array = np.log((self.accepted + TRUST) / (self.expected + TRUST))
        return corrected

    @property
    def continuation(self) -> Array:
        """P(some child is accepted | the node is and has drafted children), by the children's depth."""
        rate: Array = (self.extended + 0.6 * TRUST) / (self.parents + TRUST)
        return rate

    def update(self, outcomes: Outcomes) -> None:
        """Count what became of nodes whose parent was accepted."""
        group = np.minimum(outcomes.depths, NUM_DEPTHS) - 1
        index = group, np.searchsorted(EDGES, outcomes.log_probs)
        np.add.at(self.accepted, index, outcomes.accepted)
        np.add.at(self.expected, index, np.exp(outcomes.log_probs))
        np.add.at(self.extended, group, outcomes.accepted)
        np.add.at(self.parents, np.minimum(outcomes.parent_depths, NUM_DEPTHS - 1), 1.0)
        self._fade(MEMORY)

    def copy(self, memory: float) -> "AcceptanceTable":
        """A table that starts from this one's rates, but trusts them like `memory` expected acceptances at most."""
        table = AcceptanceTable(*(counts.copy() for counts in vars(self).values()))
        table._fade(memory)
        return table

    def _fade(self, memory: float) -> None:
        scale = memory / np.maximum(np.maximum(self.expected, self.accepted), memory)
        self.accepted *= scale
        self.expected *= scale
        scale = memory / np.maximum(self.parents, memory)
        self.extended *= scale
        self.parents *= scale

    def as_dict(self) -> dict[str, list[Any]]:
        """JSON-ready counts."""
        return {name: counts.round(2).tolist() for name, counts in vars(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Sequence[Any]]) -> "AcceptanceTable":
        """The table that `as_dict` described.

        Raises:
            ValueError: counts are missing, or of another shape.
        """
        table = AcceptanceTable()
        for name, mine in vars(table).items():
            try:
                read = np.array(values[name], dtype=float)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"acceptance: malformed counts: {error}") from None
            if read.shape != mine.shape or not (read >= 0).all():
                raise ValueError(f"acceptance: expected counts of shape {mine.shape}, got {read.shape}")
            mine[...] = read
        return table
