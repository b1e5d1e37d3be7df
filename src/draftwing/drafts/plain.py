"""Plain decoding: a tree of one node."""

from draftwing.drafts.family import DrafterOptions, Kind
from draftwing.engine.drafter import NoDrafter
from draftwing.engine.engine import NewDrafter
from draftwing.target.model import TargetModel


class Plain(Kind[None]):
    """The kind of nothing."""

    def drafter(self, draft: None, target: TargetModel, wanted: DrafterOptions) -> NewDrafter:
        return lambda num_seats, num_slots: NoDrafter()
