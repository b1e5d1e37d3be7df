"""What one choice changes: rows of one evaluation that differ in nothing else, prompt by prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from draftwing.drafts.kinds import family_of
from draftwing.engine.tree_plan import STATIC_TREES, TreePlan
from draftwing.evaluation.figures import ResultRow, rate_ratio
from draftwing.evaluation.specs import MethodSpec
from draftwing.intervals import Interval

CHOICES = {"ngram": "n-grams merged into the tree", "uncoupled": "drafting without the target's noise"}
"""Options of a method, and what they change."""


@dataclass(frozen=True)
class Ablation:
    """A row `with_it` over a row `without`: ratios of tau and of tokens/s, on the turns that both have."""

    what: str
    data: str
    temperature: float
    with_it: str
    without: str
    acceptance_length_ratio: Interval
    speed_ratio: Interval


def ablations(rows: Sequence[ResultRow], specs: Mapping[str, MethodSpec]) -> list[Ablation]:
    """All pairs of rows of one data set and temperature whose specs differ in one choice.

    `specs` are by row name and have their plans, default ones too; rows without a spec are other engines.
    """
    found = []
    known = [row for row in rows if row.method in specs]
    for one in known:
        for other in known:
            if (one.data, one.temperature) == (other.data, other.temperature):
                what = choice_between(specs[one.method], specs[other.method])
                if what == CHOICES["uncoupled"] and one.temperature == 0:  # there is no noise
                    continue
                cycles, seconds = (rate_ratio(one.runs, other.runs, per) for per in ("num_cycles", "seconds"))
                if what and cycles and seconds:
                    found.append(Ablation(what, one.data, one.temperature, one.method, other.method, cycles, seconds))
    return found


def choice_between(one: MethodSpec, other: MethodSpec) -> str | None:
    """The single choice that `one` has and `other` has not; None if there is no such choice."""
    for option, what in CHOICES.items():
        if option in one.options and replace(one, options=_without(one, option)) == other:
            return what
    if replace(one, plan=None, method="") != replace(other, plan=None, method=""):
        return None
    if one.method != other.method and family_of(one.method) is family_of(other.method):
        if not (_is_dynamic_tree(one) and other.plan in STATIC_TREES):
            return None
        return "dynamic against static tree" if _num_nodes(one) == _num_nodes(other) else None
    if one.method == other.method and _is_fixed_tree(one) and other.is_chain:
        return "tree against chain"
    if one.method == other.method and one.plan == "auto" and _is_fixed_tree(other):
        return "trees that size themselves against fixed ones"
    return None


def _without(spec: MethodSpec, option: str) -> tuple[str, ...]:
    return tuple(name for name in spec.options if name != option)


def _is_fixed_tree(spec: MethodSpec) -> bool:
    return _is_dynamic_tree(spec) or spec.plan in STATIC_TREES


def _is_dynamic_tree(spec: MethodSpec) -> bool:
    return spec.plan is not None and spec.plan.startswith("tree:")


def _num_nodes(spec: MethodSpec) -> int:
    return TreePlan.parse(spec.plan or "off").num_nodes
