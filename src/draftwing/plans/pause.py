"""Cycles without something that did not pay: longer and longer ones while that stays so."""

from dataclasses import dataclass

SHORTEST_PAUSE, LONGEST_PAUSE = 16, 1024
"""Cycles of a pause."""
INHERITED_PAUSE, INHERITED_LOOKUP_PAUSE = 512, 64
"""Cycles of a pause, from drafting and from lookups, that a generation takes over from those before it, at most."""


@dataclass
class Pause:
    """Cycles without something that did not pay; a pause that was right is followed by one twice as long."""

    length: int = SHORTEST_PAUSE
    left: int = 0

    def goes_on(self) -> bool:
        """Whether this cycle is one of the pause's."""
        if self.left == 0:
            return False
        self.left -= 1
        return True

    def inherit(self, most: int) -> None:
        """Begin a generation: its text may be of another kind, so pauses start from this length at most."""
        self.left, self.length = min(self.left, most), min(self.length, most)

    def begin(self) -> None:
        self.left, self.length = self.length, min(2 * self.length, LONGEST_PAUSE)

    def shorten(self) -> None:
        """Forget that pauses were right: it has paid for a while."""
        self.length = SHORTEST_PAUSE
