"""The speculation methods by name: which draft each one uses, and who grows its trees."""

from draftwing.config import METHODS
from draftwing.drafts.drafting import default_plan
from draftwing.drafts.eagle.drafter import EagleDrafter
from draftwing.drafts.eagle.eagle3 import Eagle3Model
from draftwing.drafts.language_model import DraftModelDrafter
from draftwing.drafts.load import Draft
from draftwing.drafts.lookahead import LookaheadDrafter
from draftwing.drafts.medusa.drafter import MedusaDrafter
from draftwing.drafts.medusa.network import MedusaModel
from draftwing.drafts.ngram import NgramDrafter
from draftwing.engine.drafter import Drafter, NoDrafter
from draftwing.engine.engine import NewDrafter
from draftwing.engine.plan import TreePlan
from draftwing.target.model import TargetModel

SUITABLE_DRAFTS = {
    "eagle1": "tiny-eagle1",
    "eagle2": "tiny-eagle1",
    "medusa": "tiny-medusa",
    "draft_model": "tiny-draft",
}
LARGEST_ON_CPU = TreePlan(width=4, depth=8, num_nodes=32)
FIXED_SHAPES = tuple(
    map(TreePlan.parse, ("chain:2", "chain:4", "tree:4x4x16", "tree:6x5x30", "tree:8x6x48", "tree:10x8x60"))
)
"""Where every shape is worth capturing: what `auto` chooses among, the largest last."""


def resolve_method(method: str | None, draft: Draft | None) -> str:
    """The method to decode with, checked against the draft at hand."""
    if method is not None and method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method in ("ngram", "lookahead"):
        return method
    if draft is None:
        if method not in (None, "plain"):
            raise ValueError(f"method: {method} needs a draft head or a draft model")
        return "plain"
    kind, methods = _methods_of(draft)
    if method not in (None, "plain", *methods):
        raise ValueError(f"method: {method} cannot use this draft, which is {kind}")
    return method or methods[0]


def serves(method: str, draft: Draft | None) -> bool:
    """Whether a method can decode with this draft, or without any."""
    try:
        resolve_method(method, draft)
    except ValueError:
        return False
    return True


def _methods_of(draft: Draft) -> tuple[str, tuple[str, ...]]:
    """What a draft is, and the methods that use it, the default first."""
    if isinstance(draft, TargetModel):
        return "a language model", ("draft_model",)
    if isinstance(draft, MedusaModel):
        return "Medusa heads", ("medusa",)
    if isinstance(draft, Eagle3Model):
        return "an EAGLE-3 head", ("eagle3",)
    return "an EAGLE-1/2 head", ("eagle2", "eagle1")


def suitable_draft(draft: str, method: str | None) -> str:
    """The embedded draft that suits the method, if `draft` is `tiny`; other names are left as they are."""
    return SUITABLE_DRAFTS.get(method or "", draft) if draft == "tiny" else draft


def tree_shapes(draft: Draft, target: TargetModel) -> tuple[TreePlan, ...]:
    """The shapes that trees which size themselves have, or on a CPU their bound; the largest last."""
    shapes = (LARGEST_ON_CPU,) if target.device.type == "cpu" else FIXED_SHAPES
    if isinstance(draft, MedusaModel):
        shapes = tuple(shape.cut_to(len(draft)) for shape in shapes)
    num_tokens = min(draft.vocab_size, target.vocab_size) if isinstance(draft, TargetModel) else len(draft.vocab)
    return tuple(dict.fromkeys(shape.at_most(num_tokens) for shape in shapes))


def new_drafter(
    method: str,
    draft: Draft | None,
    target: TargetModel,
    with_lookup: bool = False,
    window: int | None = None,
    plan: TreePlan | None = None,
) -> NewDrafter:
    """What makes a method's drafter; `with_lookup` and `window` are for EAGLE heads, `plan` for Lookahead decoding."""
    device = target.device

    def new(num_seats: int, num_slots: int) -> Drafter:
        if method == "ngram":
            return NgramDrafter(num_seats, num_slots, device)
        if method == "lookahead":
            return LookaheadDrafter(plan or TreePlan.parse(default_plan(method)), num_seats, num_slots, device)
        if draft is None or method == "plain":
            return NoDrafter()
        if isinstance(draft, TargetModel):
            return DraftModelDrafter(draft, target.vocab_size, num_seats, num_slots)
        if isinstance(draft, MedusaModel):
            return MedusaDrafter(draft, num_seats, target.dtype, device)
        ngram = NgramDrafter(num_seats, num_slots, device) if with_lookup else None
        return EagleDrafter(draft, num_seats, num_slots, ngram, window)

    return new
