"""Two answers to a prompt beside each other: tokens, and the drafted tokens that were accepted in each cycle.

Tokens alone say nothing of a draft: an engine that reads it wrong gives the same ones, more slowly. So every cycle that
begins at the same token in both is compared: with the same text before it, it must accept as many drafted tokens.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

ROUNDING = 0.02
"""The share of cycles that may accept another number: engines sum in other orders, and two drafted tokens may tie."""


@dataclass(frozen=True)
class EngineAnswer:
    """New tokens: the first from the pass over the prompt, the others from `cycles`, each with so many of them."""

    tokens: list[int]
    cycles: list[int]


@dataclass(frozen=True)
class Agreement:
    """What of one prompt agreed.

    Attributes:
        prompt: its name.
        num_tokens: how many new tokens are the same in both answers, from the first on.
        parted_at: the index of the first new token that differs; None: none does.
        num_cycles: our cycles; the first token, which the prompt's own pass brings, is in none.
        their_cycles: the engine's, as far as it tells them.
        num_compared: the cycles that begin at the same token in both and end within the text that is the same.
        num_equal: the compared cycles that accepted as many drafted tokens in both.
    """

    prompt: str
    num_tokens: int
    parted_at: int | None
    num_cycles: int
    their_cycles: int
    num_compared: int
    num_equal: int

    @property
    def tokens_agree(self) -> bool:
        return self.parted_at is None


def compare(prompt: str, ours: EngineAnswer, theirs: EngineAnswer, end_tokens: Collection[int] = ()) -> Agreement:
    """Compare two answers; some engines keep the token that ends a text, some do not."""
    mine, other = _without_end(ours.tokens, end_tokens), _without_end(theirs.tokens, end_tokens)
    common = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    parted = None if len(mine) == len(other) == common else common
    our_starts, their_starts = _starts(ours, common), _starts(theirs, common)
    both = our_starts.keys() & their_starts.keys()
    return Agreement(
        prompt=prompt,
        num_tokens=common,
        parted_at=parted,
        num_cycles=len(ours.cycles),
        their_cycles=len(theirs.cycles),
        num_compared=len(both),
        num_equal=sum(our_starts[start] == their_starts[start] for start in both),
    )


def drafts_agree(rows: Sequence[Agreement]) -> bool:
    """Whether so many cycles were equal that only rounding can be between the two."""
    compared, equal = sum(row.num_compared for row in rows), sum(row.num_equal for row in rows)
    return compared > 0 and compared - equal <= ROUNDING * compared


def _without_end(tokens: list[int], end_tokens: Collection[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in end_tokens else tokens


def _starts(answer: EngineAnswer, common: int) -> dict[int, int]:
    """The cycles by the number of tokens before them; those that the end of the common text cuts are left out."""
    starts = accumulate(answer.cycles, initial=1)
    return {start: num for start, num in zip(starts, answer.cycles, strict=False) if start + num < common}
