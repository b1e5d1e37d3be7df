"""A tree that is drafted while the clock says that it pays."""

from collections.abc import Callable

import pytest

from draftwing.engine.readback import CycleReport
from draftwing.engine.tree_plan import TreePlan
from draftwing.plans import pauses
from draftwing.plans.pauses import BELIEVED, TRIED, ClockedPlan

Cycles = Callable[..., list[bool]]


@pytest.fixture
def plan() -> ClockedPlan:
    return ClockedPlan(TreePlan.parse("chain:4"))


@pytest.fixture
def cycles(plan: ClockedPlan, monkeypatch: pytest.MonkeyPatch) -> Cycles:
    """Runs cycles of ten rows that take `seconds` where they draft and 10 ms where not; returns which ones drafted."""
    now = 0.0
    monkeypatch.setattr(pauses.time, "perf_counter", lambda: now)

    def run(number: int, seconds: float, tokens: int, sampled: bool = False) -> list[bool]:
        nonlocal now
        drafted = []
        for cycle in range(number):
            drafts = plan.next(10, 100, sampled).depth > 0
            drafted.append(drafts)
            if drafts:
                plan.learn(CycleReport(10, tokens, 5, lambda: None))  # type: ignore[arg-type, return-value]
            now += (seconds if drafts else 0.01) + (5.0 if cycle % 7 == 0 else 0)  # prompts are read in some of them
        return drafted

    return run


@pytest.mark.parametrize(("seconds", "tokens", "pays"), [(0.1, 20, False), (0.1, 150, True), (0.011, 12, True)])
def test_the_faster_way_is_taken(cycles: Cycles, seconds: float, tokens: int, pays: bool) -> None:
    drafted = cycles(4 * BELIEVED, seconds, tokens)
    assert sum(drafted[: 2 * TRIED]) == TRIED
    share = sum(drafted) / len(drafted)
    assert share > 0.9 if pays else share < 0.15


def test_greedy_and_sampled_cycles_are_judged_apart(plan: ClockedPlan, cycles: Cycles) -> None:
    greedy, sampled = [], []
    for _ in range(20):
        plan.begin()
        greedy += cycles(64, 0.015, 30)
        plan.begin()
        sampled += cycles(64, 0.015, 11, sampled=True)
    assert sum(greedy) > 0.9 * len(greedy)
    assert sum(sampled) < 0.15 * len(sampled)


def test_it_is_noticed_when_a_text_stops_repeating_itself(cycles: Cycles) -> None:
    assert all(cycles(60, 0.015, 30)[2 * TRIED :])
    drafted = cycles(100, 0.015, 10)
    assert sum(drafted[:20]) > 10 and sum(drafted[40:]) < 20
