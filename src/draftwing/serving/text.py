"""The text of one answer while its tokens arrive: cut at a stop string, of which no beginning is shown before."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from draftwing.engine.stopping import TextStream


class Piece(NamedTuple):
    """Some text of an answer, and whether it was drafted."""

    text: str
    is_drafted: bool


class _Held(NamedTuple):
    text: str
    is_drafted: bool
    is_shown: bool


class AnswerText:
    """Turns tokens into pieces of text, special tokens left out.

    What could be the beginning of a stop string is held back until it is none, or until the answer ends.

    Args:
        stop_strings: the answer is cut in front of the first one, or with `keeps_stop` behind it.
        keeps_special: special tokens are text as well, all of them or these.
        keeps_stop: the stop string, or the token that ended the answer, is part of it.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_strings: Sequence[str] = (),
        keeps_special: bool | Collection[int] = False,
        keeps_stop: bool = False,
    ) -> None:
        self._tokenizer, self._stops, self._keeps_stop = tokenizer, tuple(stop_strings), keeps_stop
        kept = tokenizer.all_special_ids if keeps_special is True else keeps_special or ()
        self._hidden = frozenset[int](tokenizer.all_special_ids) - set(kept)
        self._stream: TextStream | None = None
        self._held: list[_Held] = []

    def push(self, tokens: Sequence[int], num_drafted: int, finish_reason: str | None = None) -> list[Piece]:
        """The pieces that a cycle's tokens complete, the first `num_drafted` of them drafted.

        With a reason (eos, stop, length, ...) the answer ends here and nothing is held back any more.
        """
        num_before = 0  # characters held before the last token
        for index, token in enumerate(tokens):
            num_before = self._num_held()
            is_end = finish_reason == "eos" and index == len(tokens) - 1
            self._take(token, index < num_drafted, is_end)
        if finish_reason is None:
            return self._release(self._num_certain())
        self._hold(self._stream.flush() if self._stream else "", False)
        return self._release(self._end(num_before) if finish_reason == "stop" else self._num_held())

    def _take(self, token: int, is_drafted: bool, is_end: bool) -> None:
        if self._stream is None:  # a first token in front of itself shows a space that a beginning would eat
            self._stream = TextStream(self._tokenizer, skip_special_tokens=False, behind=[token])
        is_shown = self._keeps_stop if is_end else token not in self._hidden
        if not is_shown:
            self._hold(self._stream.flush(), is_drafted)  # bytes that no token will complete
        self._hold(self._stream.push(token), is_drafted, is_shown)

    def _hold(self, text: str, is_drafted: bool, is_shown: bool = True) -> None:
        if text:
            self._held.append(_Held(text, is_drafted, is_shown))

    def _num_held(self) -> int:
        return sum(len(held.text) for held in self._held)

    def _num_certain(self) -> int:
        """Characters that are no beginning of a stop string, whatever follows."""
        if not self._stops:
            return self._num_held()
        text = "".join(held.text for held in self._held)
        return len(text) - max(overlap(text, stop) for stop in self._stops)

    def _end(self, num_before: int) -> int:
        """Where the answer is cut: at the first stop string that ends behind so many characters.

        Earlier ones came before there were `min_tokens`, and did not end the answer.
        """
        text = "".join(held.text for held in self._held)
        firsts = [(text.find(stop, max(0, num_before - len(stop) + 1)), -len(stop)) for stop in self._stops]
        found = [first for first in firsts if first[0] >= 0]
        if not found:
            return len(text)
        start, length = min(found)
        return start - length if self._keeps_stop else start

    def _release(self, count: int) -> list[Piece]:
        pieces = []
        while self._held and count > 0:
            text, is_drafted, is_shown = self._held.pop(0)
            if len(text) > count:
                self._held.insert(0, _Held(text[count:], is_drafted, is_shown))
            if is_shown:
                pieces.append(Piece(text[:count], is_drafted))
            count -= len(text)
        return pieces


def overlap(text: str, stop: str) -> int:
    """The most characters at the text's end that a stop string begins with, fewer than all of them."""
    most = min(len(text), len(stop) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(stop[:length])), 0)
