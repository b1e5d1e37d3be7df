"""Which tokens of a text lie within some of its characters: by offsets, or without them by tokenising prefixes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]
"""Characters from `start` to `stop`, as a slice."""
SHOWN = 40
"""Characters shown of a text in an error."""


def supervised_tokens(text: str, spans: list[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The token ids of `text`, and for each whether it lies whole in one of the spans.

    Raises:
        ValueError: the tokenizer is written in Python, and it cannot be told which tokens are a span's.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        inside = [any(a <= start and end <= b for a, b in spans) for start, end in offsets]
        return encoded["input_ids"], inside
    prefixes = _Prefixes(text, tokenizer)
    inside = [False] * len(prefixes.ids)
    for span in spans:
        first, last = prefixes.tokens_within(*span)
        inside[first:last] = [True] * (last - first)
    return prefixes.ids, inside


@dataclass(frozen=True)
class _Border:
    """A place where tokens meet: so many `tokens` are the first characters up to `position`."""

    position: int
    tokens: int


class _Prefixes:
    """A text's tokens without offsets. Where tokens meet, the ids of the text so far are the first of all its ids."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self._text, self._tokenizer = text, tokenizer
        self.ids = self._encode(text)

    def tokens_within(self, start: int, stop: int) -> tuple[int, int]:
        """The slice of tokens that lie whole between two positions; a token across either of them does not."""
        first, last = self._find(range(start, stop + 1)), self._find(range(stop, start - 1, -1))
        before, after = (
            self._find(range(start, -1, -1)),
            self._find(range(stop, len(self._text) + 1)),
        )
        assert before is not None and after is not None  # the text's own ends
        if first is None or last is None:
            first, last = after, after
        if first.tokens - before.tokens > 1 or after.tokens - last.tokens > 1:
            raise self._error(start, "prefixes of the text have other tokens")
        self._check(first, last)
        return first.tokens, last.tokens

    def _find(self, positions: Iterable[int]) -> _Border | None:
        """The first of the positions at which tokens meet."""
        for position in positions:
            ids = self._encode(self._text[:position])
            if self.ids[: len(ids)] == ids:
                return _Border(position, len(ids))
        return None

    def _check(self, first: _Border, last: _Border) -> None:
        """Raise a ValueError if the tokens do not say, but for spaces, what the text does."""
        try:
            said = self._tokenizer.decode(self.ids[first.tokens : last.tokens])
        except Exception as error:  # a tokenizer is a program: it may do anything
            raise self._error(first.position, f"it cannot decode its own: {error}") from error
        text = self._text[first.position : last.position]
        if "".join(said.split()) != "".join(text.split()):
            raise self._error(first.position, f"they seem to say {said[:SHOWN]!r}")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _error(self, position: int, why: str) -> ValueError:
        text = self._text[position : position + SHOWN]
        return ValueError(
            "tokenizer: it is written in Python and gives no offsets; which tokens are the answer's in "
            f"{text!r} cannot be told: {why}"
        )
