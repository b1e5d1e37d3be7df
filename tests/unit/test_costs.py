"""Measured costs: the engine's own stages, kept on disk."""

from pathlib import Path
from typing import Any

import pytest
from conftest import costs, eagle

from draftwing.checkpoint.load import DraftNetwork
from draftwing.decoding.costs import CycleCosts, _fastest, cache_folder, cached_costs, measure_costs
from draftwing.decoding.drafters import NoDrafter
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.statistics import STAGES
from draftwing.models.target import TargetModel


def test_every_part_of_a_cycle_is_measured(target: TargetModel, heads: dict[str, DraftNetwork]) -> None:
    measured = measure_costs(target, eagle(heads["eagle3"]), batch_size=2, largest=TreePlan(4, 8, 32), cycles=3)
    assert measured.contexts == [64]  # this target has 256 positions
    assert min(measured.plain + measured.extend + measured.fixed) > 0
    assert len(measured.verify[0]) == len(measured.num_nodes)
    assert min(measured.verify[0]) > 0
    assert len(measured.draft_step[0]) == len(measured.widths) == 2


@pytest.mark.parametrize(("depth", "num_steps"), [(8, 3), (3, 2), (1, 1)])
def test_a_steps_seconds_are_taken_from_levels_that_a_draft_has(
    monkeypatch: pytest.MonkeyPatch, target: TargetModel, depth: int, num_steps: int
) -> None:
    """Medusa's trees end with its heads: deeper plans would spread fewer levels over more steps."""

    def stage_seconds(*arguments: Any) -> list[dict[str, float]]:
        plans = arguments[1]
        return [dict.fromkeys(STAGES, 1.0) | {"draft": 1.0 + min(plan.depth, depth)} for plan in plans]

    monkeypatch.setattr("draftwing.decoding.costs._stage_seconds", stage_seconds)
    largest = TreePlan(2, depth, 3)
    measured = measure_costs(target, lambda rows, capacity: NoDrafter(), batch_size=1, largest=largest)
    assert measured.draft_step[0][0] == pytest.approx((min(num_steps + 1, depth) - 1) / num_steps)


def test_a_hiccup_in_one_round_is_not_kept() -> None:
    quick, slow = dict.fromkeys(STAGES, 1.0), dict.fromkeys(STAGES, 9.0)
    first_round, second_round = [quick, slow | {"draft": 0.5}], [slow, quick]
    assert _fastest([*first_round, *second_round], num_plans=2) == [quick, quick | {"draft": 0.5}]


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


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path / "file"))
    assert cached_costs({}, costs) == costs()
