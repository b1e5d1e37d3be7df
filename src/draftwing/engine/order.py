"""Which seat lies where: those that run, then those whose prompts are read, then texts that are kept, and free ones.

A cycle runs over a view of the first seats, so seats change places as others come and go. The text of one that has
left stays where it is, if it may, until its place is needed: a later prompt that begins alike need not be read again.
"""

from collections.abc import Sequence

from draftwing.engine.request import Seat
from draftwing.engine.seats import Seats

LEAST_SHARED = 16
"""Tokens of a prompt that another seat must have read before they are taken over."""
COMPARED = 256
"""Tokens of two texts that are compared at once."""


class Order:
    """The seats by what they do, and the moves that keep those in a row which are decoded or read together.

    With `keeps`, seats that have left lend their texts; those that were used least recently give way first.
    """

    def __init__(self, seats: Seats, num_seats: int, keeps: bool) -> None:
        self.running: list[Seat] = []
        self.reading: list[Seat] = []
        self.kept: list[Seat] = []
        self._at: list[Seat | None] = [None] * num_seats
        self._seats, self._keeps = seats, keeps

    @property
    def held(self) -> tuple[Seat, ...]:
        """Seats of requests that have not ended, where they lie."""
        return *self.running, *self.reading

    @property
    def num_free(self) -> int:
        """Seats that no request holds."""
        return len(self._at) - len(self.running) - len(self.reading)

    def lender(self, prompt: Sequence[int]) -> tuple[Seat | None, int]:
        """The seat that has read most of a prompt's beginning, and how many tokens of it; None, 0 if that is little."""
        lender, most = None, LEAST_SHARED - 1
        for seat in (*self.held, *self.kept):
            num_read = int(self._seats.lengths[seat.index])
            if num_read > most:  # else it cannot lend more
                num_shared = min(shared(prompt, [*seat.request.prompt, *seat.tokens]), num_read)
                lender, most = max((lender, most), (seat, num_shared), key=lambda pair: pair[1])
        return lender, most if lender is not None else 0

    def will_lend(self, prompt: Sequence[int]) -> bool:
        """Whether a seat that is reading its prompt will have read more of this one's beginning than any has now."""
        later = max((shared(prompt, seat.request.prompt) for seat in self.reading), default=0)
        return later - self.lender(prompt)[1] >= LEAST_SHARED

    def place_for(self, lender: Seat | None, num_shared: int) -> int:
        """The place for the next request: cleared, or the lender's own if it may go on there.

        It may if the request continues all but a few tokens of a kept text, or if no other place is left.
        """
        goal = len(self.held)
        if lender in self.kept:
            assert lender is not None
            self.kept.remove(lender)
            num_read = min(int(self._seats.lengths[lender.index]), len(lender.request.prompt) + len(lender.tokens) - 1)
            if num_shared > num_read - LEAST_SHARED or self.num_free == 1:
                self._move(lender, goal)
                self._at[goal] = None
                return goal
            self.kept.append(lender)  # it was used now
        self._make_room(goal)
        self._seats.vacate(goal)
        return goal

    def enter(self, seat: Seat) -> None:
        """Let a seat's prompt be read."""
        self._at[seat.index] = seat
        self.reading.append(seat)

    def leave(self, gone: set[Seat]) -> None:
        """Take seats out of the rows; their texts are kept, or they are cleared."""
        for seat in sorted(gone, key=lambda seat: seat.index):
            self._keep_or_clear(seat)
        for seat in sorted(gone.intersection(self.running), key=lambda seat: -seat.index):
            place, last = seat.index, self.running.pop()
            if last is not seat:
                self._move(last, place)
                self.running[place] = last
        self.reading = [seat for seat in self.reading if seat not in gone]
        for index, seat in enumerate(self.reading, len(self.running)):  # once, however many have gone
            self._move(seat, index)

    def _keep_or_clear(self, seat: Seat) -> None:
        if self._keeps and self._seats.lengths[seat.index] >= LEAST_SHARED:
            self._seats.settle(seat.index)
            self.kept.append(seat)
        else:
            self._seats.vacate(seat.index)
            self._at[seat.index] = None

    def _make_room(self, goal: int) -> None:
        """Move a text that is kept at a place to a free one, or to that of the least recently used, which is lost."""
        occupant = self._at[goal]
        if occupant is None:
            return
        if None not in self._at[goal:]:
            oldest = self.kept.pop(0)
            self._at[oldest.index] = None
        if self._at[goal] is not None:
            self._move(occupant, self._at.index(None, goal))

    def _move(self, seat: Seat, goal: int) -> None:
        """Let a seat go on in another place; what lies there, of no running row, gets its own."""
        place = seat.index
        if place == goal:
            return
        self._seats.go_on(place, goal)
        self._at[goal], self._at[place] = seat, self._at[goal]
        seat.index = goal
        if (other := self._at[place]) is not None:
            other.index = place


def shared(prompt: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens a prompt can have from one who has read all of a text.

    Drafters have read the token behind as well, so that it must be the same too; and at least one token is left to
    read, for the drafter's last output.
    """
    return min(num_same(prompt, text) - 1, len(prompt) - 2, len(text) - 1)


def num_same(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    same, most = 0, min(len(first), len(second))
    while same < most:  # chunk by chunk: comparing slices takes no step of Python for each token
        ours, theirs = (list(text[same : same + COMPARED]) for text in (first, second))
        if ours[: len(theirs)] != theirs[: len(ours)]:
            return same + next(index for index, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        same += COMPARED
    return most
