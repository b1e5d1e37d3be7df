"""What is learnt of acceptance: counts per bin, corrections, memory."""

import numpy as np
import pytest

from draftwing.engine.readback import CycleFacts, Outcomes
from draftwing.plans.acceptance import MEMORY, AcceptanceTable


def outcomes(accepted: list[bool], probability: float = 0.5, num_cycles: int = 1) -> Outcomes:
    """Trees of a root, its children 1 and 2, and 3 below 1; the drafter gives every node the same probability."""
    rows = np.ones((num_cycles, 1))
    return CycleFacts(
        accepted=rows * np.array([accepted]) > 0,
        parents=(rows * np.array([[0, 0, 0, 1]])).astype(np.int64),
        depths=(rows * np.array([[0, 1, 1, 2]])).astype(np.int64),
        drafted=rows * np.array([[False, True, True, True]]) > 0,
        scores=rows * np.log(probability),
        log_probs=rows * np.full((1, 4), np.log(probability)),
        max_depth=2,
    ).outcomes()


def test_only_nodes_with_an_accepted_parent_count() -> None:
    table = AcceptanceTable()
    table.update(outcomes([True, False, True, False]))
    assert table.accepted.sum() == 1  # node 2
    assert table.expected.sum() == pytest.approx(1.0)  # nodes 1 and 2, half each; 3 never had a chance


def test_a_calibrated_drafter_is_not_corrected() -> None:
    table = AcceptanceTable()
    table.update(outcomes([True, True, False, True], probability=0.5, num_cycles=40))
    corrections = table.correction[table.expected > 0]
    assert corrections[0] == pytest.approx(0.0)  # depth 1: one of two, 40 times


def test_an_overconfident_drafter_is_believed_less_and_less() -> None:
    table, worth = AcceptanceTable(), []
    for _ in range(3):
        table.update(outcomes([True, False, False, False], probability=0.95, num_cycles=10))
        worth.append(table.correction.min())
    assert 0 > worth[0] > worth[1] > worth[2]


def test_what_was_not_seen_is_not_corrected() -> None:
    table = AcceptanceTable()
    table.update(outcomes([True, False, False, False], probability=0.95))
    assert (table.correction[table.expected == 0] == 0).all()


def test_continuation_counts_parents_not_children() -> None:
    table = AcceptanceTable()
    table.update(outcomes([True, False, True, False], num_cycles=1000))
    assert table.continuation[0] == pytest.approx(1.0, abs=0.01)


def test_old_counts_fade_and_a_copy_trusts_less() -> None:
    table = AcceptanceTable()
    for _ in range(20):
        table.update(outcomes([True, True, False, True], num_cycles=100))
    assert table.expected.max() <= MEMORY
    copy = table.copy(memory=10)
    assert copy.expected.max() <= 10
    assert copy.accepted[0].sum() / copy.expected[0].sum() == pytest.approx(1.0)
    assert table.expected.max() == pytest.approx(MEMORY)


def test_counts_survive_json_and_malformed_ones_are_refused() -> None:
    table = AcceptanceTable()
    table.update(outcomes([True, True, False, True]))
    again = AcceptanceTable.from_dict(table.as_dict())
    assert np.array_equal(again.correction, table.correction)
    with pytest.raises(ValueError, match="acceptance: malformed"):
        AcceptanceTable.from_dict({})
    with pytest.raises(ValueError, match="expected counts of shape"):
        AcceptanceTable.from_dict(table.as_dict() | {"parents": [1.0]})
