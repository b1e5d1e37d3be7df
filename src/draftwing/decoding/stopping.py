"""When a row stops: end-of-sequence ids, stop strings, a token limit; exact inside an accepted run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class StopRule:
    """A row ends with its first end-of-sequence token, the token that completes a stop string, or the limit.

    That last token is part of the output, as in transformers. `decode` turns token ids into text; stop strings need it.

    Raises:
        ValueError: a limit below 1, a stop string that is empty or none, or stop strings without a tokenizer.
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    decode: Decode | None = None
    is_done: Callable[[Sequence[int]], bool] | None = None
    """A further test of the tokens emitted so far, run after each (slow; custom stopping criteria)."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected an integer of at least 1, got {self.max_new_tokens!r}")
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
            if self.stop_strings and self._completes_stop_string(emitted + new[:count]):
                return count, "stop"
            if self.is_done is not None and self.is_done(emitted + new[:count]):
                return count, "stop"
            if len(emitted) + count >= self.max_new_tokens:
                return count, "length"
        return len(new), None

    def _completes_stop_string(self, tokens: list[int]) -> bool:
        assert self.decode is not None
        # A token holds at least one byte, so this many tokens cover a stop string that ends in the last one.
        reach = max(len(text.encode()) for text in self.stop_strings) + 4
        tail = self.decode(tokens[-reach:])
        return any(text in tail for text in self.stop_strings)


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first stop string."""
    ends = [text.find(stop) for stop in stop_strings]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
