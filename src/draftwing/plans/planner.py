"""Which plan a generation gets: the one that was asked for, or trees that size themselves by costs and lessons."""

import time
from collections.abc import Callable, Iterable

from draftwing.drafts.family import Draft
from draftwing.drafts.kinds import default_plan, family_of, new_drafter, plan_for, tree_shapes
from draftwing.engine.captured import Recorder
from draftwing.engine.engine import bucket
from draftwing.engine.options import GenerateOptions
from draftwing.engine.statistics import Statistics
from draftwing.engine.tree_plan import OFF, Plan, TreeShape
from draftwing.plans.auto import AutoPlan
from draftwing.plans.costs import CycleCosts, cached_costs, measure_costs, what_costs_depend_on
from draftwing.plans.lessons import Key, Lessons
from draftwing.plans.pauses import ClockedPlan, LookupPlan, LookupTrial
from draftwing.target.model import TargetModel


class Planner:
    """Plans the generations of one target by one method, and keeps what they teach in `lessons`.

    `new_recorder` makes what records the cycles, if they are recorded.
    """

    def __init__(
        self,
        target: TargetModel,
        draft: Draft | None,
        method: str,
        lessons: Lessons,
        new_recorder: Callable[[], Recorder | None],
    ) -> None:
        self._target, self._draft, self._method = target, draft, method
        self._lessons, self._new_recorder = lessons, new_recorder

    def looks_up(self, settings: GenerateOptions) -> bool:
        """Whether n-grams are merged into the trees."""
        if settings.ngram is not None:
            return settings.ngram
        return "ngram" in family_of(self._method).takes and plan_for(self._method, settings.plan) is None

    def fixed_shape(self, settings: GenerateOptions, max_new_tokens: int) -> TreeShape | None:
        """The largest tree of a plan that is named; None: trees size themselves."""
        tree = self._named_tree(settings, max_new_tokens)
        return tree.with_lookup() if tree is not None and tree.depth and self.looks_up(settings) else tree

    def _named_tree(self, settings: GenerateOptions, max_new_tokens: int) -> TreeShape | None:
        """What is drafted of it, a lookup aside."""
        tree = plan_for(self._method, settings.plan)
        return tree.cut_to(max_new_tokens) if tree is not None and tree.depth else tree

    def plan(self, settings: GenerateOptions, max_new_tokens: int, measured: Iterable[Key] = ()) -> Plan:
        """What gives each cycle its tree; trees are no deeper than there are new tokens.

        Where trees size themselves, the costs of the `measured` batches are measured now, if they are not known.
        """
        with_lookup = self.looks_up(settings)
        tree = self._named_tree(settings, max_new_tokens)
        if tree is None:
            for key in measured:
                self.costs(*key)
            return self._sized(with_lookup)
        if not tree.depth:
            return OFF
        by_itself = (settings.plan or default_plan(self._method)) == "auto"
        if by_itself and family_of(self._method).method(self._method).clocked:
            return self._lessons.clocked.setdefault(tree, ClockedPlan(tree)).begin()
        # A fixed plan's trees depend on its requests alone, not on the generations before: its trial is its own.
        return LookupPlan(tree, LookupTrial()) if with_lookup else tree

    def _sized(self, with_lookup: bool) -> AutoPlan:
        assert self._draft is not None
        shapes, device = tree_shapes(self._draft, self._target), self._target.device
        fixed_shapes = () if device.type == "cpu" else shapes
        known = self._lessons.known_costs, self._lessons.experience
        return AutoPlan(*known, shapes[-1], device, fixed_shapes, with_lookup)

    def watch(self, plan: Plan, key: Key, statistics: Statistics) -> None:
        """Compare with the clock what a generation's plan expects of the costs, if it goes by them."""
        if isinstance(plan, AutoPlan):
            self._lessons.watched[key] = plan, statistics

    def costs(self, batch_size: int, sampled: bool) -> CycleCosts:
        """What a cycle of so many rows costs, from this process, the disk's cache or a measurement."""
        key, lessons = (bucket(batch_size), sampled), self._lessons
        since, is_outdated = lessons.costs_since, lessons.are_outdated(key)
        if is_outdated:
            lessons.renewed.add(key)
            since = time.time()
        if key not in lessons.costs or is_outdated:
            lessons.costs[key] = self._measured(key, since)
        return lessons.costs[key]

    def _measured(self, key: Key, since: float) -> CycleCosts:
        """Costs of the disk's cache, not older than `since`, or a measurement."""
        assert self._draft is not None
        batch_size, sampled = key
        largest = tree_shapes(self._draft, self._target)[-1]
        drafter, recorder = new_drafter(self._method, self._draft, self._target), self._new_recorder()
        known_by = what_costs_depend_on(self._target, self._draft, recorder is not None) | {
            "batch_size": batch_size,
            "largest": str(largest),
            "sampled": sampled,
        }
        return cached_costs(
            known_by,
            lambda: measure_costs(self._target, drafter, batch_size, largest, recorder=recorder, sampled=sampled),
            since,
        )
