"""Token ids to text while they arrive."""

from typing import Any

MAX_TOKENS_PER_CHARACTER = 4
"""A UTF-8 character has at most four bytes; bytes that are none by then are shown as they are."""


class TextStream:
    """Turns tokens into text one by one, holding back characters whose bytes are incomplete."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # decoding begins here, one piece earlier than unread text, for the context that joins words
        self._read = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        if text.endswith("\ufffd") and len(self._tokens) - self._read < MAX_TOKENS_PER_CHARACTER:
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def flush(self) -> str:
        """The text still held back, once no token follows."""
        before = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        self._start = self._read = len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
