"""What generations with trees that size themselves teach those that follow: acceptance, gain, pauses."""

from dataclasses import dataclass, field

from draftwing.engine.readback import Outcomes
from draftwing.plans.acceptance import AcceptanceTable, CalibratedSize
from draftwing.plans.lookups import LookupTrial
from draftwing.plans.pause import Pause


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
    lookups: LookupTrial = field(default_factory=LookupTrial)
