"""What a method drafts by: its plan unless one is named, and the options that it has a use for. Needs no torch."""

from draftwing.drafts.kinds import family_of
from draftwing.engine.plan import NamedTree, TreePlan


def default_plan(method: str) -> str:
    """A method's plan unless one is named: the papers' shapes, and trees that size themselves for the others."""
    return family_of(method).method(method).plan


def plan_for(method: str, plan: str | NamedTree | None) -> NamedTree | None:
    """The plan that was asked for, or the method's; None for trees that size themselves.

    Raises:
        ValueError: no such plan, or one of another method.
    """
    family = family_of(method)
    plan = plan or default_plan(method)
    if plan == "auto" and not family.needs_draft:  # nothing to size; the clock tells when it pays
        plan = default_plan(method)
    if plan == "auto":
        return None
    tree_plan = TreePlan.parse(plan) if isinstance(plan, str) else plan
    if tree_plan.depth:
        family.check_plan(tree_plan, method)
    return tree_plan


def check_drafting(
    method: str,
    plan: str | NamedTree | None = None,
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
