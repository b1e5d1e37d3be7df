"""Single tokens as text and as bytes, for log-probabilities and for what a tokenizer says of itself."""

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from draftwing.engine.stopping import NO_CHARACTER, exact_decode

NUM_KEPT = 65536
"""Tokens whose texts are kept."""


class TokenTexts:
    """Looks tokens of one tokenizer up."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, decode = tokenizer, exact_decode(tokenizer)
        self._text = lru_cache(NUM_KEPT)(lambda token: decode([token]))

    def each(self, tokens: Sequence[int]) -> list[str]:
        """Each token alone."""
        return [self.text(token) for token in tokens]

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


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary; those from 256 on stand for unprintable ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
