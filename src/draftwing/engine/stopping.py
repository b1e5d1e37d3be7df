"""When a row stops: end-of-sequence ids, stop strings, a token limit; exact inside an accepted run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

Decode = Callable[[list[int]], str]
NO_CHARACTER = "\ufffd"
"""What stands in decoded text for bytes that are no whole character."""


def exact_decode(tokenizer: Any) -> Decode:
    """Decodes every token as it is: special ones too, and no space is cleaned away."""
    return partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class StopRule:
    """A row ends with its first end-of-sequence token, the token that completes a stop string, or the limit.

    That last token is part of the output, as in transformers. `decode` turns token ids into text; stop strings need it.
    None of the first `min_new_tokens` completes a stop string or is an end-of-sequence token: such are never chosen.

    Raises:
        ValueError: a limit below 1 or below that minimum, a stop string that is empty or none, or stop strings without
            a tokenizer.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    decode: Decode | None = None
    is_done: Callable[[Sequence[int]], bool] | None = None
    """A further test of the tokens emitted so far, run after each (slow; custom stopping criteria)."""
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected an integer of at least 1, got {self.max_new_tokens!r}")
        least, most = self.min_new_tokens, self.max_new_tokens
        if not isinstance(least, int) or isinstance(least, bool) or not 0 <= least <= most:
            raise ValueError(f"min_new_tokens: expected an integer from 0 to max_new_tokens ({most}), got {least!r}")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop: expected strings that are not empty, got {text!r}")
        if self.stop_strings and self.decode is None:
            raise ValueError("stop: stop strings need a tokenizer")

    def check(self, emitted: list[int], new: list[int]) -> tuple[int, str | None]:
        """How many of the `new` tokens to emit after those `emitted`, and the reason if the row ends there."""
        for count, token in enumerate(new, 1):
            if token in self.eos_token_ids:
                return count, "eos"
            is_long_enough = len(emitted) + count > self.min_new_tokens
            if self.stop_strings and is_long_enough and self._completes_stop_string(emitted + new[:count]):
                return count, "stop"
            if self.is_done is not None and self.is_done(emitted + new[:count]):
                return count, "stop"
            if len(emitted) + count >= self.max_new_tokens:
                return count, "length"
        return len(new), None

    def _completes_stop_string(self, tokens: list[int]) -> bool:
        assert self.decode is not None
        longest = max(map(len, self.stop_strings))
        reach = longest + 4
        while reach < len(tokens) and not self._reads(tokens[-reach:-1], longest):
            reach *= 2
        tail, num_known = text_behind(tokens[-reach:], self.decode), _num_known(tokens[-reach:], self.decode)
        return any((start := tail.rfind(text)) >= 0 and start + len(text) > num_known for text in self.stop_strings)

    def _reads(self, tokens: list[int], longest: int) -> bool:
        """Whether tokens before the last one are enough for a stop string that ends in that.

        Tokens may have no text, and their first one may stand within a character, so that its bytes are read as none.
        """
        assert self.decode is not None
        text = self.decode(tokens)
        return len(text) > longest and not text.startswith(NO_CHARACTER)


def text_behind(tokens: list[int], decode: Decode) -> str:
    """The text of tokens that follow others: with the space that tokenizers like SentencePiece's eat at a beginning.

    The first token in front of itself shows it. Bytes that make a character together are left as they are.
    """
    first, text, doubled = decode(tokens[:1]), decode(tokens), decode(tokens[:1] + tokens)
    is_clear = doubled.startswith(first) and doubled.endswith(text)
    return doubled[len(first) :] if is_clear else text


def _num_known(tokens: list[int], decode: Decode) -> int:
    """Characters before the last token; one whose bytes were not all there is new."""
    return len(text_behind(tokens[:-1], decode).rstrip(NO_CHARACTER))


def cut_at_stop(tokens: list[int], stop_strings: Sequence[str], tokenizer: Any) -> str:
    """The text of new tokens before the stop string that the last one completes, without special tokens.

    Others before it, within a least number of tokens, have ended nothing.
    """
    decode = exact_decode(tokenizer)
    text, num_known = text_behind(tokens, decode), _num_known(tokens, decode)
    ends = [end for stop in stop_strings if (end := text.find(stop, max(0, num_known - len(stop) + 1))) >= 0]
    if not ends:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))
    kept = text[len(text) - len(decode(tokens)) : min(ends)]
    for token in tokenizer.all_special_ids:
        kept = kept.replace(decode([token]), "")
    return kept


MAX_TOKENS_PER_CHARACTER = 4
"""A UTF-8 character has at most four bytes: those that are none by then are shown, but for some that may begin one."""


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
        end = len(self._tokens)
        if text.endswith(NO_CHARACTER):
            if end - self._read < MAX_TOKENS_PER_CHARACTER:
                return ""
            text, end = self._certain_part(text)
        self._start, self._read = self._read, end
        return text[len(before) :]

    def _certain_part(self, text: str) -> tuple[str, int]:
        """The text before last tokens that may begin another character, and where these begin.

        All of it where they cannot be told apart.
        """
        num_tokens = len(self._tokens)
        for end in range(num_tokens - MAX_TOKENS_PER_CHARACTER + 1, num_tokens):
            certain = self._decode(self._tokens[self._start : end])
            if certain + self._decode(self._tokens[end:]) == text:
                return certain, end
        return text, num_tokens

    def flush(self) -> str:
        """The text still held back, once no token follows."""
        before = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        self._start = self._read = len(self._tokens)
        return text[len(before) :]
