"""What a method drafts by: its plan unless one is named, and the options that it has a use for. Needs no torch."""

from draftwing.config import DRAFTLESS_METHODS, EAGLE_METHODS
from draftwing.engine.plan import TreePlan

DEFAULT_PLANS = {
    "plain": "off",
    "ngram": "chain:6",
    "lookahead": "lookahead:15x5x15",
    "eagle1": "eagle1",
    "medusa": "medusa",
}


def default_plan(method: str) -> str:
    """A method's plan unless one is named: the papers' shapes, and trees that size themselves for the others."""
    return DEFAULT_PLANS.get(method, "auto")


def plan_for(method: str, plan: str | TreePlan | None) -> TreePlan | None:
    """The plan that was asked for, or the method's; None for trees that size themselves.

    Raises:
        ValueError: no such plan, or one of another method.
    """
    plan = plan or default_plan(method)
    if plan == "auto" and method in DRAFTLESS_METHODS:  # nothing to size: lookups cost next to nothing
        plan = default_plan(method)
    if plan == "auto":
        return None
    tree_plan = TreePlan.parse(plan) if isinstance(plan, str) else plan
    if tree_plan.depth:
        _check_suits(tree_plan, method)
    return tree_plan


def check_drafting(
    method: str,
    plan: str | TreePlan | None = None,
    ngram: bool | None = None,
    draft_window: int | None = None,
    coupled: bool | None = None,
) -> None:
    """Raise a ValueError for an option of `generate` that a method has no use for, or a plan that is not one."""
    if ngram and method not in EAGLE_METHODS:
        raise ValueError(f"ngram: merges into EAGLE trees; the method is {method}")
    if draft_window is not None and method not in EAGLE_METHODS:
        raise ValueError(f"draft_window: limits what an EAGLE head reads; the method is {method}")
    if coupled is False and method in DRAFTLESS_METHODS:
        raise ValueError(f"coupled: says how a draft's candidates are ranked; the method is {method}")
    plan_for(method, plan)


def _check_suits(plan: TreePlan, method: str) -> None:
    if method == "plain":
        raise ValueError(f"plan: plain drafts nothing, so it takes no plan but off, got {plan}")
    if bool(plan.window) != (method == "lookahead"):
        raise ValueError(
            f"plan: plans lookahead:WxNxG are for the method lookahead, and it takes no other; got {plan} for {method}"
        )
    if method == "ngram" and not plan.is_chain:
        raise ValueError(f"plan: n-gram drafting has one continuation, so it takes chain:DEPTH, got {plan}")
