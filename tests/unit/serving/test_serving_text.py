"""The text of an answer: the same in any pieces, cut at the first stop string, no beginning of one shown before."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from draftwing.engine.stopping import StopRule, cut_at_stop, exact_decode
from draftwing.serving.text import AnswerText
from draftwing.training.train_language_model import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few merges; any character beyond ASCII takes several tokens."""
    return train_tokenizer(["hello there, hello you"] * 4, vocab_size=280)


def say(text: AnswerText, tokens: list[int], reason: str, size: int = 1) -> list[str]:
    """What an answer shows after each cycle of `size` tokens."""
    shown = []
    for start in range(0, len(tokens), size):
        is_last = start + size >= len(tokens)
        pieces = text.push(tokens[start : start + size], 0, reason if is_last else None)
        shown.append("".join(piece.text for piece in pieces))
    return shown


def test_a_stop_strings_beginning_is_held_back(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("ab#c##end").input_ids[:-2]
    shown = say(AnswerText(tokenizer, ["##e"]), ids, "stop")
    assert shown == ["a", "b", "", "#c", "", "", ""]
    shown = say(AnswerText(tokenizer, ["##e"], keeps_stop=True), ids, "stop")
    assert "".join(shown) == "ab#c##e"


def test_what_was_held_back_is_shown_where_no_stop_string_came(tokenizer: PreTrainedTokenizerFast) -> None:
    shown = say(AnswerText(tokenizer, ["##e"]), tokenizer("ab##").input_ids, "length")
    assert shown == ["a", "b", "", "##"]


def test_the_end_of_sequence_token_is_shown_on_request_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a<|end|>").input_ids
    assert "".join(say(AnswerText(tokenizer), ids, "eos")) == "a"
    assert "".join(say(AnswerText(tokenizer, keeps_special=True), ids, "eos")) == "a"
    assert "".join(say(AnswerText(tokenizer, keeps_special=True, keeps_stop=True), ids, "eos")) == "a<|end|>"
    assert "".join(say(AnswerText(tokenizer), tokenizer("ab").input_ids, "eos")) == "a"  # a stop token's id


def test_half_a_character_before_a_special_token_is_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    half, *_ = tokenizer("字").input_ids
    (end,) = tokenizer("<|end|>").input_ids
    assert "".join(say(AnswerText(tokenizer), [half, end], "eos")) == "\ufffd"


def test_pieces_say_what_was_drafted(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = AnswerText(tokenizer).push(tokenizer("abc").input_ids, 2, "length")
    assert pieces == [("a", True), ("b", True), ("c", False)]


WORDS = ["a", "b", "##", "#", "字", "é", "\n", "<|end|>", "hello", " you", "🙂"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
    st.lists(st.text("ab#é字\n ", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_a_stream_is_what_cutting_all_of_it_gives(
    tokenizer: PreTrainedTokenizerFast, words: list[str], stops: list[str], size: int
) -> None:
    """The engine says where the answer ends; in any pieces its text is the one that `generate` cuts."""
    ids: list[int] = tokenizer("".join(words)).input_ids
    rule = StopRule(100, stop_strings=tuple(stops), decode=exact_decode(tokenizer))
    count, reason = rule.check([], ids)
    shown = say(AnswerText(tokenizer, stops), ids[:count], reason or "length", size)
    assert "".join(shown) == cut_at_stop(ids[:count], stops, tokenizer)
    # Nothing that was shown is a stop string's beginning in the end: of the text that stops are looked for in, where
    # special tokens stand between the others.
    read = say(AnswerText(tokenizer, stops, keeps_special=True), ids[:count], reason or "length", size)
    for end in range(1, len(read)):
        assert not any(stop in "".join(read[:end]) for stop in stops)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_stop_string_before_the_least_tokens_does_not_count(tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    """However its tokens came, the answer ends at the second one."""
    ids = tokenizer("a#b#").input_ids
    assert "".join(say(AnswerText(tokenizer, ["#"]), ids, "stop", size)) == "a#b"
