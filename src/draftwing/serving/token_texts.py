"""Single tokens as text and as bytes, and where they stand: for log-probabilities, and of what a tokenizer says."""

from collections.abc import Collection, Sequence
from functools import cache, lru_cache
from typing import Any

from draftwing.engine.stopping import NO_CHARACTER, TextStream, exact_decode

NUM_KEPT = 65536
"""Tokens whose texts are kept."""


class TokenTexts:
    """Looks tokens of one tokenizer up."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, decode = tokenizer, exact_decode(tokenizer)
        self._text = lru_cache(NUM_KEPT)(lambda token: decode([token]))

    def text(self, token: int) -> str:
        """A token alone; bytes that are no whole character are replacement characters."""
        return self._text(token)

    def bytes(self, token: int) -> list[int] | None:
        """A token's UTF-8 bytes, also where these are no whole character; None if the tokenizer does not tell."""
        text = self.text(token)
        if NO_CHARACTER not in text:
            return list(text.encode())
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if len(piece) == 6 and piece.startswith("<0x"):  # byte fallback
            return [int(piece[3:5], 16)]
        of = _bytes_of_characters()
        return [of[character] for character in piece] if all(character in of for character in piece) else None


class Offsets:
    """Where an answer's tokens stand in its text, in characters; to be asked about each in its order.

    Args:
        hidden: tokens that are no text where they are new.
        echoed: the tokens that the answer begins with; `shown` is their text there. A tokenizer may have added some in
            front that are not shown: these stand at the beginning.
    """

    def __init__(self, tokenizer: Any, hidden: Collection[int], echoed: Sequence[int] = (), shown: str = "") -> None:
        self._tokenizer, self._hidden = tokenizer, hidden
        self._echoed, self._shown = echoed, shown
        self._num_asked, self._place = 0, 0

    def next(self, token: int) -> int:
        """Where the next token begins."""
        if not self._num_asked:
            self._begin(token)
        start = max(0, self._place)
        text = self._stream.push(token)
        if self._num_asked < len(self._echoed) or token not in self._hidden:
            self._place += len(text)
        self._num_asked += 1
        return start

    def _begin(self, token: int) -> None:
        self._place = -max(0, exact_decode(self._tokenizer)(list(self._echoed)).find(self._shown))
        self._stream = TextStream(
            self._tokenizer, skip_special_tokens=False, behind=() if self._echoed else [token]
        )  # in front of itself a first token shows a space that a beginning would eat


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary; those from 256 on stand for unprintable ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
