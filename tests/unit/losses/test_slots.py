"""Which slots are supervised, and by which."""

import torch

from draftwing.losses.slots import SupervisedSlots, document_positions


def students(loss_mask: list[int], positions: list[int] | None = None, steps: int = 1) -> list[list[int]]:
    """The slots that each step supervises in one row."""
    mask = torch.tensor([loss_mask], dtype=torch.bool)
    where = torch.arange(len(loss_mask)) if positions is None else torch.tensor(positions)
    slots = SupervisedSlots.of(mask, where[None])
    return [slots.student(step)[slots.valid(steps)[:, step]].tolist() for step in range(steps)]


def test_the_example_of_its_docstring() -> None:
    """Tokens: user, hi, assistant, yes, sir, end, padding."""
    assert students([0, 0, 0, 1, 1, 1, 0], steps=3) == [[1, 2, 3], [0, 1, 2], [0, 1]]


def test_two_turns() -> None:
    assert students([0, 0, 1, 1, 0, 0, 0, 1, 1]) == [[0, 1, 5, 6]]


def test_the_last_two_slots_have_nothing_to_predict() -> None:
    assert students([1, 1, 1, 1, 1]) == [[0, 1, 2]]


def test_no_step_crosses_a_document() -> None:
    assert students([1] * 7, positions=[0, 1, 2, 0, 1, 2, 3], steps=3) == [[0, 3, 4], [3], []]


def test_rows_do_not_touch() -> None:
    slots = SupervisedSlots.of(torch.ones(2, 3, dtype=torch.bool), torch.arange(3).expand(2, 3))
    assert slots.teacher.tolist() == [1, 4]
    assert slots.student(0).tolist() == [0, 3]


def test_positions_restart_with_each_document() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0]])
    assert document_positions(ids, ids).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
