"""Trees that size themselves: what pays, what does not, and when drafting pauses."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import auto_plan, costs, sized_plan

from draftwing.engine.readback import CycleFacts, CycleReport
from draftwing.engine.tree_plan import TreePlan
from draftwing.plans.acceptance import EDGES
from draftwing.plans.auto import LESSON, STUDIED_LATER, TRIAL, YOUTH, SizedPlan
from draftwing.plans.lessons import Experience
from draftwing.plans.pauses import (
    INHERITED_LOOKUP_PAUSE,
    INHERITED_PAUSE,
    LONGEST_PAUSE,
    SHORTEST_PAUSE,
    STUDIED,
    LookupPlan,
    LookupTrial,
)
from draftwing.plans.pauses import TRIAL as LOOKUP_TRIAL


def chain_facts(num_accepted: int, depth: int = 4, probability: float = 0.75) -> CycleFacts:
    """A cycle of one row with a chain of draft tokens, of which the first ones were accepted."""
    nodes = np.arange(depth + 1)[None]
    return CycleFacts(
        accepted=nodes <= num_accepted,
        parents=np.maximum(nodes - 1, 0),
        depths=nodes,
        drafted=nodes > 0,
        scores=nodes * np.log(probability),
        log_probs=np.where(nodes > 0, np.log(probability), 0.0),
        max_depth=depth,
    )


def report_of(facts: CycleFacts) -> CycleReport:
    return CycleReport(1, int(facts.accepted.sum()), facts.num_nodes, lambda: facts)


def run_cycles(plan: SizedPlan, num_accepted: int, count: int) -> list[bool]:
    """Whether each of the next cycles drafts; those that do have this many draft tokens accepted."""
    drafts = []
    for _ in range(count):
        drafts.append(plan.next(longest=10).depth > 0)
        if drafts[-1]:
            plan.learn(report_of(chain_facts(num_accepted)))
    return drafts


def test_a_level_is_drafted_while_it_brings_more_than_its_seconds() -> None:
    plan = sized_plan(step=0.1, node=0.01)
    likely, unlikely = torch.log(torch.tensor([[0.6, 0.2]])), torch.log(torch.tensor([[0.02, 0.01]]))
    assert plan.sizing.num_parents(likely, depth=1) > 0
    assert plan.sizing.num_parents(unlikely, depth=1) == 0
    assert sized_plan(step=0.0, node=0.0).sizing.num_parents(unlikely, depth=1) == 2, "what costs nothing pays"


def test_a_plan_knows_what_its_cycles_were_to_take() -> None:
    """Drafting ones and those of a pause, to compare with what they took."""
    plan = sized_plan(plain=1.0, node=0.02, step=0.1)
    assert run_cycles(plan, num_accepted=0, count=1) == [True]
    tree = plan.expected_seconds
    assert tree == pytest.approx(1.0 + 0.02 * 4 + 0.1)  # 5 nodes, and the first level; nothing was asked of others
    drafts = run_cycles(plan, num_accepted=0, count=100)
    assert plan.expected_seconds == pytest.approx(tree * (1 + sum(drafts)) + 1.0 * (100 - sum(drafts)))
    assert 0 < sum(drafts) < 100


def test_a_level_is_as_wide_as_pays() -> None:
    scores = torch.log(torch.tensor([[0.6, 0.2, 0.05, 0.01]]))
    seconds_of_width = costs(step=0.02), dataclasses.replace(costs(), draft_step=[[0.05, 0.5]])
    flat, rising = (
        SizedPlan(seconds, Experience(), TreePlan(4, 6, 24), torch.device("cpu")) for seconds in seconds_of_width
    )
    assert flat.sizing.num_parents(scores, depth=1) == 3, "the fourth node's children are not worth their verification"
    assert rising.sizing.num_parents(scores, depth=1) == 2


def test_nodes_are_kept_while_they_bring_more_than_their_seconds() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.01]]))
    assert sized_plan(node=0.001).sizing.num_nodes(scores, limit=24) == 6
    assert sized_plan(node=0.07).sizing.num_nodes(scores, limit=24) == 4
    assert sized_plan(node=0.9).sizing.num_nodes(scores, limit=24) == 2, "a tree that was drafted is worth one node"
    assert sized_plan(node=0.001).sizing.num_nodes(scores, limit=3) == 3


def test_rows_of_a_batch_share_a_shape_by_their_sum() -> None:
    sure, unsure = [0.9, 0.05], [0.3, 0.2]
    node = 0.3
    assert sized_plan(node=node).sizing.num_nodes(torch.log(torch.tensor([unsure])), limit=9) == 2
    both = torch.log(torch.tensor([sure, unsure]))
    assert sized_plan(node=node).sizing.num_nodes(both, limit=9) == 2
    assert sized_plan(node=0.1).sizing.num_nodes(both, limit=9) == 3


def test_worth_follows_what_was_accepted() -> None:
    plan, log_probs = sized_plan(), torch.log(torch.tensor([[0.75]]))
    before = plan.sizing.worth(log_probs, depth=1)
    assert before.item() == pytest.approx(np.log(0.75)), "nothing learnt yet: the drafter is believed"
    run_cycles(plan, num_accepted=0, count=TRIAL)
    run_cycles(plan, num_accepted=1, count=40)
    after = plan.sizing.worth(log_probs, depth=1), plan.sizing.worth(log_probs, depth=2)
    assert after[1] < after[0] < 0
    assert plan.sizing.worth(torch.tensor([[-torch.inf]]), depth=1).item() == -torch.inf
    assert plan.sizing.worth(torch.tensor([[float(EDGES[-1]) / 2]]), depth=1).item() < 0


def test_a_useless_drafter_is_paused_for_longer_and_longer() -> None:
    experience = Experience()
    drafts = run_cycles(sized_plan(experience), num_accepted=0, count=2000)
    assert drafts[:TRIAL] == [True] * TRIAL
    assert sum(drafts) < 0.03 * len(drafts)
    assert experience.gain < 1
    assert experience.pause.length == LONGEST_PAUSE


def test_the_next_request_starts_where_the_last_one_ended() -> None:
    experience = Experience()
    run_cycles(sized_plan(experience), num_accepted=0, count=6)
    assert not any(run_cycles(sized_plan(experience), num_accepted=0, count=8))


def test_a_long_pause_does_not_outlast_its_generation_by_much() -> None:
    experience = Experience()
    run_cycles(sized_plan(experience), num_accepted=0, count=2000)
    drafts = run_cycles(sized_plan(experience), num_accepted=3, count=LONGEST_PAUSE)
    assert drafts.index(True) <= INHERITED_PAUSE, "the next text may be easy"
    assert all(drafts[INHERITED_PAUSE:])


def test_short_generations_teach_as_a_long_one_does() -> None:
    long, short = Experience(), Experience()
    run_cycles(sized_plan(long), num_accepted=3, count=2 * STUDIED * LESSON)
    for _ in range(4):
        run_cycles(sized_plan(short), num_accepted=3, count=STUDIED * LESSON // 2)
    sized_plan(short)  # the next one begins with what is left over
    assert short.acceptance.as_dict() == long.acceptance.as_dict() != Experience().acceptance.as_dict()


def test_a_good_drafter_is_never_paused_and_one_that_turns_good_is_found_out() -> None:
    assert all(run_cycles(sized_plan(), num_accepted=3, count=200))
    plan = sized_plan()
    run_cycles(plan, num_accepted=0, count=100)
    assert all(run_cycles(plan, num_accepted=3, count=300)[-40:])


def pauses_of(looked_up: list[bool]) -> list[int]:
    """The lengths of the runs of cycles that look nothing up."""
    return [len(list(run)) for looks_up, run in itertools.groupby(looked_up) if not looks_up]


@pytest.mark.parametrize("is_auto", [True, False])
@pytest.mark.parametrize("brings", [True, False])
def test_lookups_are_paused_while_the_draft_knows_as_much(is_auto: bool, brings: bool) -> None:
    trial = LookupTrial()
    tree = TreePlan(4, 6, 24)

    def looked_up(cycles: int) -> list[bool]:
        """Whether each of a generation's cycles looks something up."""
        plan = auto_plan(Experience(lookups=trial), tree, with_lookup=True) if is_auto else LookupPlan(tree, trial)
        facts, found = chain_facts(num_accepted=3), []
        if brings:
            facts = dataclasses.replace(facts, drafted=facts.drafted & (facts.depths < 3))
        for _ in range(cycles):
            found.append(plan.next(num_rows=1, longest=10).looks_up)
            if plan.learns:
                plan.learn(report_of(facts))
        return found

    first = looked_up(200)
    assert first[: STUDIED * LOOKUP_TRIAL] == [True] * (STUDIED * LOOKUP_TRIAL)
    assert all(first) if brings else sum(first) < 60
    assert any(looked_up(INHERITED_LOOKUP_PAUSE + 1)), "the next text may repeat itself"
    if not brings:
        assert max(pauses_of(looked_up(200))) < LONGEST_PAUSE / 4, "and pauses grow from a short one again"
        short = [looked_up(SHORTEST_PAUSE // 2) for _ in range(100)]
        assert sum(map(sum, short)) < 0.6 * 100 * SHORTEST_PAUSE // 2, "short generations come to a verdict together"


def test_later_fewer_cycles_are_looked_at_closely() -> None:
    plan, looks = sized_plan(), []
    for _ in range(200):
        plan.next(longest=10)
        report = report_of(chain_facts(num_accepted=3))
        looks.append(0)

        def facts(report: CycleReport = report) -> CycleFacts:
            looks[-1] = 1
            return report.facts()

        plan.learn(dataclasses.replace(report, facts=facts))
    youth = STUDIED * LESSON * YOUTH
    assert sum(looks[:youth]) == youth // STUDIED
    assert sum(looks[youth:]) == pytest.approx((200 - youth) / STUDIED_LATER, abs=1)


def test_every_tree_has_one_of_the_fixed_shapes_and_the_best_is_found() -> None:
    shapes = ["chain:1", "chain:4", "tree:4x6x24"]
    plan = sized_plan(fixed_shapes=shapes, node=0.05)
    seen = set()
    for _ in range(60):
        cycle = plan.next(longest=10)
        seen.add(str(cycle))
        plan.learn(report_of(chain_facts(num_accepted=4, depth=min(cycle.depth, 4), probability=0.95)))
    assert str(plan.next(longest=10)) == "chain:4"
    assert seen <= set(shapes)
    sizing = plan.next(longest=10).sizing
    assert sizing.num_parents(torch.tensor([[-50.0]]), depth=1) == 1
    assert sizing.num_nodes(torch.tensor([[-50.0]]), limit=7) == 7


def test_a_lookup_does_not_hide_that_a_deeper_shape_would_bring_more() -> None:
    """What is looked up lies deeper than the draft's levels, which says nothing about those beyond them."""
    shapes = ["tree:4x6x24", "chain:2"]
    for lookup_depth in (0, 6):
        plan = sized_plan(fixed_shapes=shapes, largest=TreePlan.chain(2), node=0.001, step=0.001)
        facts = chain_facts(num_accepted=2, depth=2, probability=0.95)
        for _ in range(3):
            plan.next(longest=10)
            plan.learn(report_of(dataclasses.replace(facts, max_depth=max(2, lookup_depth))))
        assert str(plan.next(longest=10)) == "tree:4x6x24"


def test_each_number_of_rows_has_its_own_plan() -> None:
    """Rounded up to a power of two: when a seat is left or taken, costs and lessons are those of the new number."""
    plan, asked = auto_plan(), []
    plan._experience_of = lambda num_rows, sampled: asked.append(num_rows) or Experience()
    for num_rows in (3, 4, 1, 3, 5):
        plan.next(num_rows, longest=10)
        plan.learn(report_of(chain_facts(num_accepted=1)))
    assert asked == [4, 1, 8]


def test_costs_are_linear_between_what_was_measured() -> None:
    measured = costs(plain=1.0, node=0.02, step=0.1)
    assert measured.cycle(TreePlan.off()) == 1.0
    # extend, three further levels, and a pass over nine nodes
    assert measured.cycle(TreePlan.parse("tree:4x4x9")) == pytest.approx(0.1 + 3 * 0.1 + 1.0 + 8 * 0.02)
