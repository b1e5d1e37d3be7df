"""State by seat: parts are views, and rows change places without becoming others."""

import numpy as np
import torch

from draftwing.by_seat import BySeat


class State(BySeat):
    by_seat = ("numbers", "lists", "inner")

    def __init__(self, inner: "State | None" = None) -> None:
        self.numbers = torch.arange(6).reshape(3, 2)
        self.lists = np.empty(3, dtype=object)
        for seat in range(3):
            self.lists[seat] = [seat]
        self.inner = inner


def test_rows_that_change_places_are_the_same_objects() -> None:
    """Who keeps a row's list elsewhere goes on reading it."""
    state = State(State())
    first = state.lists[0]
    state.exchange(0, 2, num_tokens=0)
    assert state.lists[2] is first
    assert state.numbers.tolist() == state.inner.numbers.tolist() == [[4, 5], [2, 3], [0, 1]]
    state.lists[2].append("more")
    assert first == [0, "more"]


def test_a_part_is_a_view() -> None:
    state = State()
    state.part(1, 3).numbers[0] = 7
    assert state.numbers[1].tolist() == [7, 7]
