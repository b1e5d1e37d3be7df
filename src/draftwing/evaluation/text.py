"""Token ids to text while they arrive."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

MAX_TOKENS_PER_CHARACTER = 4
"""A UTF-8 character has at most four bytes; bytes that are none by then are shown as they are."""


class TextStream:
    """Turns tokens into text one by one, holding back characters whose bytes are incomplete.

    `behind` are tokens in front of the first one, for decoders that eat the space at a text's beginning.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True, behind: Sequence[int] = ()) -> None:
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        self._decode: Callable[[list[int]], str] = partial(tokenizer.decode, **options)
        self._tokens = list(behind)
        self._start = 0  # decoding begins here, one piece earlier than unread text, for the context that joins words
        self._read = len(self._tokens)

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
