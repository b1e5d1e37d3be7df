"""What generations with trees that size themselves teach those that follow: acceptance, gain, pauses."""

from dataclasses import dataclass, field

from draftwing.decoding.acceptance import AcceptanceTable, CalibratedSize
from draftwing.decoding.readback import Outcomes

SHORTEST_PAUSE, LONGEST_PAUSE = 16, 1024
"""Cycles of a pause."""


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
        """Begin a generation: what an earlier one learnt holds for this many cycles at most."""
        self.left = min(self.left, most)

    def begin(self) -> None:
        self.left, self.length = self.length, min(2 * self.length, LONGEST_PAUSE)

    def shorten(self) -> None:
        """Forget that pauses were right: it has paid for a while."""
        self.length = SHORTEST_PAUSE


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
    sizing: CalibratedSize | None = None
    """What judges nodes on the device, for trees of a fixed shape; cycles that were captured read from it."""
    pause: Pause = field(default_factory=Pause)
    lookup_pause: Pause = field(default_factory=Pause)
