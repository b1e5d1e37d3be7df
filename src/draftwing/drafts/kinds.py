"""The families of drafts, and what follows from a method's name or from a draft at hand. Needs no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from draftwing.drafts.family import NOTHING_ELSE, Draft, DrafterOptions, Family, Kind, Method
from draftwing.embedded import EMBEDDED_DRAFTS, EMBEDDED_TARGETS
from draftwing.engine.tree_plan import TreePlan, TreeShape

if TYPE_CHECKING:
    from draftwing.drafts.fit import Tensors
    from draftwing.drafts.objective import Objective
    from draftwing.engine.engine import NewDrafter
    from draftwing.target.model import TargetModel

_HERE = "draftwing.drafts"
_EAGLE: dict[str, Any] = {
    "takes": ("ngram", "draft_window"),
    "has_head_options": True,
    "has_int8": True,
    "has_doctor": True,
}
PLAIN = "plain"
"""The method that drafts nothing: the reference of all others."""


class Plain(Kind[None]):
    """Nobody guesses."""

    def drafter(self, draft: None, target: "TargetModel", wanted: DrafterOptions) -> "NewDrafter":
        """As `Kind` has it."""
        from draftwing.engine.drafter import NoDrafter

        return lambda num_seats, num_slots: NoDrafter()


FAMILIES = [
    Family("plain decoding", Plain, (Method(PLAIN, "off"),), needs_draft=False, plans="none"),
    Family(
        "n-gram drafting",
        f"{_HERE}.ngram.Ngram",
        (Method("ngram", clocked="chain:6"),),
        needs_draft=False,
        plans="chains",
    ),
    Family(
        "Lookahead decoding",
        f"{_HERE}.lookahead.Lookahead",
        (Method("lookahead", "lookahead:15x5x15"),),
        needs_draft=False,
        plans="columns",
    ),
    Family(
        "an EAGLE-1/2 head",
        f"{_HERE}.eagle.kind.Eagle1",
        (Method("eagle1", "eagle1", "eagle1"), Method("eagle2", embedded="eagle1")),
        objectives={"eagle1": f"{_HERE}.eagle.objective.Eagle1Objective"},
        **_EAGLE,
    ),
    Family(
        "an EAGLE-3 head",
        f"{_HERE}.eagle.kind.Eagle3",
        (Method("eagle3"),),
        objectives={"eagle3": f"{_HERE}.eagle.objective.Eagle3Objective"},
        **_EAGLE,
    ),
    Family(
        "Medusa heads",
        f"{_HERE}.medusa.kind.Medusa",
        (Method("medusa", "medusa", "medusa"),),
        has_int8=True,
        files=("medusa_lm_head.pt",),
        objectives={"medusa": f"{_HERE}.medusa.objective.MedusaObjective"},
    ),
    Family(
        "a language model",
        f"{_HERE}.language_model.LanguageModel",
        (Method("draft_model", embedded="draft"),),
        has_doctor=True,
    ),
]
"""Every family; another one is another entry (docs/add_a_draft.md). Files are offered to them in this order."""

LARGEST_ON_CPU = TreePlan(width=4, depth=8, num_nodes=32)
FIXED_SHAPES = (
    *(TreePlan.chain(2), TreePlan.chain(4)),
    *(TreePlan(4, 4, 16), TreePlan(6, 5, 30), TreePlan(8, 6, 48), TreePlan(10, 8, 60)),
)
"""Where every shape is worth capturing: what `auto` chooses among, the largest last."""


def methods() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(method.name for family in FAMILIES for method in family.methods)


def sized_methods() -> tuple[str, ...]:
    """One method for each kind of draft, whose trees can size themselves."""
    return tuple(family.methods[-1].name for family in FAMILIES if family.needs_draft)


def family_of(method: str) -> Family:
    """The family that a method belongs to.

    Raises:
        ValueError: there is no such method.
    """
    for family in FAMILIES:
        if method in (one.name for one in family.methods):
            return family
    raise ValueError(f"method: expected one of {', '.join(methods())}, got {method!r}")


def head_objectives() -> tuple[str, ...]:
    """The names of a recipe's objectives that train a head."""
    return tuple(name for family in FAMILIES for name in family.objectives)


def objective_named(name: str) -> "Objective":
    """What trains a head by a recipe's objective of this name."""
    return next(family.objective(name) for family in FAMILIES if name in family.objectives)


def family_of_draft(draft: Draft) -> Family:
    """The family of a draft that is loaded."""
    found = next((family for family in FAMILIES if family.needs_draft and family.kind.owns(draft)), None)
    if found is None:
        raise ValueError(f"draft: expected {drafts_in_words()}, got {type(draft).__name__}")
    return found


def family_of_files(values: Mapping[str, Any], tensors: "Tensors") -> Family:
    """The family of a draft's files. Those that nobody knows go to the first, whose reader says what is missing."""
    loaded = [family for family in FAMILIES if family.needs_draft]
    return next((family for family in loaded if family.kind.owns_files(values, tensors)), loaded[0])


def drafts_in_words() -> str:
    """Everything that can be loaded as a draft."""
    *others, last = (family.name for family in FAMILIES if family.needs_draft)
    return f"{', '.join(others)} or {last}"


def resolve_method(method: str | None, draft: Draft | None) -> str:
    """The method to decode with, checked against the draft at hand."""
    if method is not None and not family_of(method).needs_draft:
        return method
    if draft is None:
        if method is not None:
            raise ValueError(f"method: {method} needs a draft head or a draft model")
        return PLAIN
    family = family_of_draft(draft)
    if method not in (None, *(one.name for one in family.methods)):
        raise ValueError(f"method: {method} cannot use this draft, which is {family.name}")
    return method or family.methods[-1].name


def serves(method: str, draft: Draft | None) -> bool:
    """Whether a method can decode with this draft, or without any."""
    try:
        resolve_method(method, draft)
    except ValueError:
        return False
    return True


def suitable_draft(draft: str, method: str | None) -> str:
    """The embedded draft that suits the method, if `draft` is a target's name; other names are left as they are.

    Raises:
        ValueError: that target has no draft for this method.
    """
    if draft not in EMBEDDED_TARGETS or method is None:
        return draft
    part = family_of(method).method(method).embedded
    name = f"{draft}-{part}" if part else draft
    if name not in EMBEDDED_DRAFTS:
        raise ValueError(f"draft: {draft} has no draft for the method {method}")
    return name


def tree_shapes(draft: Draft, target: "TargetModel") -> tuple[TreePlan, ...]:
    """The shapes that trees which size themselves have, or on a CPU their bound; the largest last."""
    kind = family_of_draft(draft).kind
    shapes: tuple[TreePlan, ...] = (LARGEST_ON_CPU,) if target.device.type == "cpu" else FIXED_SHAPES
    if (max_depth := kind.max_depth(draft)) is not None:
        shapes = tuple(shape.cut_to(max_depth) for shape in shapes)
    return tuple(dict.fromkeys(shape.at_most(kind.num_tokens(draft, target)) for shape in shapes))


def new_drafter(
    method: str, draft: Draft | None, target: "TargetModel", wanted: DrafterOptions = NOTHING_ELSE
) -> "NewDrafter":
    """What makes a method's drafters."""
    return family_of(method).kind.drafter(draft, target, wanted)


def default_plan(method: str) -> str:
    """A method's plan unless one is named: the papers' shapes, and trees that size themselves for the others."""
    return family_of(method).method(method).plan


def plan_for(method: str, plan: str | TreeShape | None) -> TreeShape | None:
    """The plan that was asked for, or the method's; None for trees that size themselves.

    Raises:
        ValueError: no such plan, or one of another method.
    """
    family = family_of(method)
    plan = plan or default_plan(method)
    if plan == "auto" and not family.needs_draft:
        plan = family.method(method).clocked or default_plan(method)
    if plan == "auto":
        return None
    tree_plan = TreePlan.parse(plan) if isinstance(plan, str) else plan
    if tree_plan.depth:
        family.check_plan(tree_plan, method)
    return tree_plan


def check_drafting(
    method: str,
    plan: str | TreeShape | None = None,
    ngram: bool | None = None,
    draft_window: int | None = None,
    coupled: bool | None = None,
) -> None:
    """Raise a ValueError for an option of `generate` that a method has no use for, or a plan that is not one."""
    family = family_of(method)
    if ngram and "ngram" not in family.takes:
        raise ValueError(f"ngram: merges into EAGLE trees; the method is {method}")
    if draft_window is not None and "draft_window" not in family.takes:
        raise ValueError(f"draft_window: limits what an EAGLE head reads; the method is {method}")
    if coupled is False and not family.needs_draft:
        raise ValueError(f"coupled: says how a draft's candidates are ranked; the method is {method}")
    plan_for(method, plan)
