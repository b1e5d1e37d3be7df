"""Streaming text: characters come whole, and the pieces join to what decoding everything gives."""

import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from draftwing.data.prompts import Prompt
from draftwing.engine.generation import Committed
from draftwing.engine.stopping import TextStream
from draftwing.evaluation.side_by_side import LEGEND, print_text, show_completions
from draftwing.serving.token_texts import _bytes_of_characters
from draftwing.training.train_language_model import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges; any character beyond ASCII takes several tokens."""
    return train_tokenizer(["hello there, hello you"] * 4, vocab_size=280)


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    stream = TextStream(tokenizer)
    return [stream.push(token) for token in tokenizer(text).input_ids]


@pytest.mark.parametrize("text", ["hello you", "naïve → 字字 🙂🙂!", "\n\n  tabs\tand spaces ", "e\u0301"])
def test_the_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert "".join(pieces(tokenizer, text)) == text


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, "字") == ["", "", "字"]
    assert pieces(tokenizer, "a🙂") == ["a", "", "", "", "🙂"]


def test_no_piece_holds_a_replacement_character(tokenizer: PreTrainedTokenizerFast) -> None:
    assert not any("\ufffd" in piece for piece in pieces(tokenizer, "→🙂字é"))


class WordTokenizer:
    """Writes a space between words, as SentencePiece decoders do: a word alone has none before it."""

    def decode(self, tokens: list[int], **options: bool) -> str:
        return " ".join(f"w{token}" for token in tokens)


def test_a_decoder_that_joins_words_sees_the_word_before() -> None:
    stream = TextStream(WordTokenizer())
    assert [stream.push(token) for token in (1, 2, 3)] == ["w1", " w2", " w3"]
    stream = TextStream(WordTokenizer(), behind=[7])
    assert [stream.push(token) for token in (1, 2)] == [" w1", " w2"]


def test_special_tokens_are_silent(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "".join(pieces(tokenizer, "a<|end|>b<|user|>")) == "ab"


def test_bytes_that_never_become_a_character_are_shown_in_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer)
    first, second, _ = tokenizer("字").input_ids
    assert [stream.push(first), stream.push(second)] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_bytes_that_are_no_character_do_not_hold_the_stream_forever(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer)
    (continuation,) = tokenizer("字").input_ids[1:2]
    shown = [stream.push(continuation) for _ in range(9)]
    assert shown == ["", "", ""] + ["\ufffd"] * 6  # the last three may still begin a character
    assert stream.push(tokenizer("a").input_ids[0]) == "\ufffd" * 3 + "a"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"\xf0", b"\x80", b"\xe6", "🙂".encode(), "橘".encode(), "é".encode()]), max_size=9)
)
def test_stray_bytes_cost_no_character(tokenizer: PreTrainedTokenizerFast, parts: list[bytes]) -> None:
    """Bytes that are none in front of some that are: the pieces still join to the text."""
    symbol = {byte: character for character, byte in _bytes_of_characters().items()}
    ids = [tokenizer.convert_tokens_to_ids(symbol[byte]) for byte in b"".join(parts)]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_flush_after_whole_characters_has_nothing_left(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer)
    for token in tokenizer("hello").input_ids:
        stream.push(token)
    assert stream.flush() == ""


SAID = "\tx = d[1:sum:2]  # [bold] " + "and so on, " * 20 + "\n"


def test_a_file_gets_the_characters_as_they_are() -> None:
    """No tab, :name: or [name] of generated text means anything, and no line is broken."""
    file = io.StringIO()
    print_text(Console(file=file, width=40), SAID, "green")
    assert file.getvalue() == SAID
    file = io.StringIO()
    print_text(Console(file=file, width=40, force_terminal=True, color_system=None), SAID, "green")
    assert file.getvalue() == SAID.expandtabs()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_demo_says_what_its_colours_mean_where_there_are_some(
    tokenizer: PreTrainedTokenizerFast, is_terminal: bool
) -> None:
    ids: list[int] = tokenizer("hello").input_ids
    figures = SimpleNamespace(num_tokens=len(ids), num_cycles=1, total_seconds=1.0)

    def start(prompts: Sequence[Sequence[int]], **options: Any) -> Any:
        return SimpleNamespace(cycles=lambda: iter([Committed([ids], [1])]), statistics=figures)

    file = io.StringIO()
    console = Console(file=file, force_terminal=is_terminal, width=120)
    show_completions(console, [Prompt("one", "you")], tokenizer, {"plain": start, "eagle3": start})
    assert (LEGEND[1:] in file.getvalue()) == is_terminal
    assert ("\x1b[32m" in file.getvalue()) == is_terminal
