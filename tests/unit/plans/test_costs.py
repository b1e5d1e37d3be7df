"""Measured costs: the engine's own stages, kept on disk."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import costs, eagle, ngram

from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.engine.drafter import NoDrafter
from draftwing.engine.request import Seat
from draftwing.engine.seats import Seats
from draftwing.engine.statistics import STAGES, Statistics
from draftwing.engine.tree_plan import TreePlan
from draftwing.files import cache_folder
from draftwing.plans.costs import DAYS_KEPT, CycleCosts, _Cycles, cached_costs, measure_costs
from draftwing.target.model import TargetModel


def test_every_part_of_a_cycle_is_measured(target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
    measured = measure_costs(target, eagle(heads["eagle3"]), batch_size=2, largest=TreePlan(4, 8, 32), num_rounds=3)
    assert 64 < measured.contexts[0] < 128, "the middle of what was measured; this target has 256 positions"
    assert min(measured.plain + measured.extend + measured.fixed) > 0
    assert len(measured.verify[0]) == len(measured.num_nodes)
    assert min(measured.verify[0]) > 0
    assert len(measured.draft_step[0]) == len(measured.widths) == 2


@pytest.mark.parametrize("sampled", [False, True])
def test_they_are_measured_greedily_or_sampled(
    target: TargetModel, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise for every node makes a node dearer."""
    temperatures: set[float] = set()

    admit = Seats.admit

    def note(self: Seats, row: Seat) -> None:
        temperatures.add(row.request.sampling.temperature)
        admit(self, row)

    monkeypatch.setattr(Seats, "admit", note)
    measure_costs(target, ngram, 1, TreePlan(1, 2, 3), num_rounds=1, sampled=sampled)
    assert temperatures == {1.0 if sampled else 0.0}


@pytest.mark.parametrize(("depth", "num_steps"), [(8, 3), (3, 2), (1, 1)])
def test_a_steps_seconds_are_taken_from_levels_that_a_draft_has(
    monkeypatch: pytest.MonkeyPatch, target: TargetModel, depth: int, num_steps: int
) -> None:
    """Medusa's trees end with its heads: deeper plans would spread fewer levels over more steps."""

    class Seconds:
        """In the place of _Cycles: a second for each level that the draft has."""

        def __init__(self, plans: Sequence[TreePlan]) -> None:
            self._plans = plans

        def run(self, generation: Any, rounds: Any) -> None:
            pass

        def medians(self) -> list[dict[str, float]]:
            return [dict.fromkeys(STAGES, 1.0) | {"draft": 1.0 + min(plan.depth, depth)} for plan in self._plans]

    monkeypatch.setattr("draftwing.plans.costs._Cycles", Seconds)
    largest = TreePlan(2, depth, 3)
    measured = measure_costs(target, lambda rows, capacity: NoDrafter(), batch_size=1, largest=largest)
    assert measured.draft_step[0][0] == pytest.approx((min(num_steps + 1, depth) - 1) / num_steps)


class Stopwatch:
    """In the place of a Generation: its cycles take given seconds, all of them drafting.

    As on a GPU they count with the next cycle if nobody waits for the device.
    """

    def __init__(self, seconds: Sequence[float]) -> None:
        self.statistics, self._seconds, self.waits = Statistics(), seconds, True

    def cycles(self) -> Iterator[None]:
        late = 0.0
        for seconds in self._seconds:
            self.statistics.seconds["draft"] += seconds if self.waits else late
            late = seconds
            yield


def medians(*generations: tuple[Sequence[float], Sequence[Sequence[int]]]) -> list[float]:
    """Seconds of two plans' drafts from generations of these seconds, cycle by cycle, and rounds of plans."""
    cycles = _Cycles([TreePlan.chain(1), TreePlan.chain(2)])
    for seconds, rounds in generations:
        cycles.run(Stopwatch(seconds), rounds)  # type: ignore[arg-type]
    return [stages["draft"] for stages in cycles.medians()]


def test_cycles_count_for_their_plans_but_in_the_first_round() -> None:
    assert medians(([100, 100, 2, 1], [[0, 1], [1, 0]]), ([100, 100, 3, 4], [[0, 1], [0, 1]])) == [2, 3]


def test_a_hiccup_in_some_rounds_is_not_kept() -> None:
    rounds = [[0, 1]] * 4
    assert medians(([100, 100, 90, 90, 1, 2, 1, 2], rounds)) == [1, 2]


def test_where_a_tiny_target_has_no_room_the_last_cycle_counts() -> None:
    assert medians(([1, 2, 3], [[0, 1], [1, 0]])) == [3, 3]


def test_between_two_contexts_costs_are_interpolated() -> None:
    near, far = costs(plain=1.0), costs(plain=3.0)
    both = CycleCosts(
        contexts=[0, 100],
        plain=[near.plain[0], far.plain[0]],
        num_nodes=near.num_nodes,
        verify=[near.verify[0], far.verify[0]],
        widths=near.widths,
        draft_step=[near.draft_step[0], far.draft_step[0]],
        extend=[near.extend[0], far.extend[0]],
        fixed=[0.0, 0.0],
    )
    assert both.at(50).plain == [2.0]
    assert both.at(50).verify[0][0] == 2.0
    assert both.at(900).plain == [3.0], "beyond what was measured they are held"


def test_costs_are_measured_once_per_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path))
    measured: list[str] = []

    def measure() -> CycleCosts:
        measured.append("once more")
        return costs()

    for _ in range(2):
        assert cached_costs({"dtype": "float32"}, measure) == costs()
    cached_costs({"dtype": "bfloat16"}, measure)
    assert len(measured) == 2
    for file in (cache_folder() / "costs").iterdir():
        file.write_text("{half a file", encoding="utf-8")
    assert cached_costs({"dtype": "float32"}, measure) == costs(), "a broken file is measured anew"
    for file in (cache_folder() / "costs").iterdir():
        file.write_text(file.read_text(encoding="utf-8").replace('"widths": [', '"widths": [0,'), encoding="utf-8")
    assert cached_costs({"dtype": "float32"}, measure) == costs(), "and so is one whose tables do not fit together"
    assert len(measured) == 4


@pytest.mark.parametrize(
    ("days_ago", "is_believed"), [(0, True), (DAYS_KEPT - 1, True), (DAYS_KEPT + 1, False), (-1, False), (None, False)]
)
def test_costs_are_kept_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days_ago: int | None, is_believed: bool
) -> None:
    """Not for ever, nor from the future, nor where the file does not say when it was measured."""
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path))
    cached_costs({}, lambda: costs(plain=1.0))
    (file,) = (tmp_path / "costs").iterdir()
    record = json.loads(file.read_text(encoding="utf-8"))
    if days_ago is None:
        del record["measured_at"]
    else:
        record["measured_at"] -= days_ago * 86400
    file.write_text(json.dumps(record), encoding="utf-8")
    assert cached_costs({}, lambda: costs(plain=2.0)) == costs(plain=1.0 if is_believed else 2.0)


def test_costs_of_before_a_time_are_measured_anew_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine was busy then; every other model of the process believes what has been measured since."""
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path))
    cached_costs({}, lambda: costs(plain=1.0))
    since = time.time()
    assert cached_costs({}, lambda: costs(plain=2.0), since) == costs(plain=2.0)
    assert cached_costs({}, lambda: costs(plain=3.0), since) == costs(plain=2.0)
    assert cached_costs({}, lambda: costs(plain=3.0)) == costs(plain=2.0)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path / "file"))
    assert cached_costs({}, costs) == costs()
