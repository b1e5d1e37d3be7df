"""Where a row stops: exact inside a run of accepted tokens."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation import StopStringCriteria

from draftwing.engine.stopping import StopRule, cut_at_stop, exact_decode


def decode(tokens: list[int]) -> str:
    """One byte a token."""
    return bytes(tokens).decode("utf-8", errors="replace")


def ids(text: str) -> list[int]:
    return list(text.encode())


class TestEndOfSequence:
    def test_inside_a_run_it_is_kept_and_what_follows_is_cut(self) -> None:
        assert StopRule(10, eos_token_ids=(2,)).check([5], [6, 2, 7]) == (2, "eos")

    def test_every_id_of_the_list_counts(self) -> None:
        assert StopRule(10, eos_token_ids=(2, 9)).check([], [6, 9, 2]) == (2, "eos")

    def test_at_the_limit_it_is_still_the_reason(self) -> None:
        assert StopRule(2, eos_token_ids=(2,)).check([5], [2, 7]) == (1, "eos")

    def test_a_run_without_it_goes_on(self) -> None:
        assert StopRule(10, eos_token_ids=(2,)).check([5], [6, 7]) == (2, None)


class TestLimit:
    @pytest.mark.parametrize(
        ("num_emitted", "expected"),
        [(0, (3, None)), (1, (3, None)), (2, (3, "length")), (3, (2, "length")), (4, (1, "length"))],
    )
    def test_is_exact(self, num_emitted: int, expected: tuple[int, str | None]) -> None:
        assert StopRule(5).check([1] * num_emitted, [1, 1, 1]) == expected


class TestStopStrings:
    def test_completed_inside_a_run(self) -> None:
        rule = StopRule(99, stop_strings=("END",), decode=decode)
        assert rule.check(ids("ab"), ids("cENDxy")) == (4, "stop")

    def test_completed_by_the_next_run(self) -> None:
        rule = StopRule(99, stop_strings=("END",), decode=decode)
        assert rule.check([], ids("abEN")) == (4, None)
        assert rule.check(ids("abEN"), ids("Dxy")) == (1, "stop")

    def test_the_first_completed_of_several_wins(self) -> None:
        rule = StopRule(99, stop_strings=("yz", "b"), decode=decode)
        assert rule.check([], ids("abyz")) == (2, "stop")

    def test_a_token_may_hold_more_than_the_string(self) -> None:
        words = {0: "one ", 1: "two\n\nthree"}
        rule = StopRule(99, stop_strings=("\n\n",), decode=lambda tokens: "".join(words[token] for token in tokens))
        assert rule.check([0, 0], [0, 1, 0]) == (2, "stop")

    def test_characters_of_several_bytes(self) -> None:
        """The string has fewer characters than bytes, and here a token is one byte."""
        rule = StopRule(99, stop_strings=("→→→",), decode=decode)
        run = ids("x→→→y")
        assert rule.check([], run) == (len(run) - 1, "stop")

    def test_an_end_of_sequence_token_before_it_wins(self) -> None:
        rule = StopRule(99, eos_token_ids=(ids("b")[0],), stop_strings=("bc",), decode=decode)
        assert rule.check([], ids("abc")) == (2, "eos")


WORDS = ["<s>", "</s>", "▁the", "▁END", "▁cat", "▁", "▁▁", "x", "E", "N", "D", "▁.", ".", "▁→", *"abcdef"]
BYTES = [f"<0x{byte:02X}>" for byte in "→é".encode()]


def sentencepiece(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """Words that begin with their space, and some bytes; the decoder eats the first space."""
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS + BYTES)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoder
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def llama_decoder() -> decoders.Decoder:
    """As in the files of Llama 2 and Mistral."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


DECODERS = [llama_decoder(), decoders.Metaspace(prepend_scheme="first")]


@pytest.mark.parametrize("decoder", DECODERS)
class TestTokenizersThatEatTheFirstSpace:
    def test_a_stop_string_that_begins_with_it_is_seen(self, decoder: decoders.Decoder) -> None:
        tokenizer = sentencepiece(decoder)
        prompt, new = of("<s> ▁the"), of("▁END ▁cat ▁END")
        rule = StopRule(9, stop_strings=(" END",), decode=exact_decode(tokenizer))
        assert rule.check([], new) == (1, "stop")
        assert StopStringCriteria(tokenizer, [" END"])(torch.tensor([prompt + new[:1]]), None)[0]
        assert rule.check([], of("▁cat ▁END")) == (2, "stop")
        assert rule.check([], of("E N D")) == (3, None)  # no space before it
        assert rule.check([], of("▁ E N D")) == (4, "stop")

    def test_what_is_cut_there_is_not_shown(self, decoder: decoders.Decoder) -> None:
        tokenizer = sentencepiece(decoder)
        assert cut_at_stop(of("▁END"), (" END",), tokenizer) == ""
        assert cut_at_stop(of("▁the ▁cat ▁END"), (" END",), tokenizer) == "the cat"
        assert cut_at_stop(of("▁the ▁cat"), (" END",), tokenizer) == "the cat"

    def test_a_short_tail_is_enough(self, decoder: decoders.Decoder) -> None:
        """The rule stops where the text of all new tokens first holds the stop string."""
        tokenizer, chance = sentencepiece(decoder), random.Random(0)
        decode, anchor = exact_decode(tokenizer), of("x")
        for _ in range(150):
            tokens = chance.choices(range(2, len(WORDS)), k=chance.randint(1, 40))
            text = decode(anchor + tokens)[1:]
            start = chance.randrange(len(text)) if text else 0
            stop = text[start : start + chance.randint(1, 6)] or "x"
            ends = (k for k in range(1, len(tokens) + 1) if stop in decode(anchor + tokens[:k])[1:])
            expected = next(((k, "stop") for k in ends), (len(tokens), None))
            assert StopRule(99, stop_strings=(stop,), decode=decode).check([], tokens) == expected, (tokens, stop)


def of(words: str) -> list[int]:
    return [(WORDS + BYTES).index(word) for word in words.split(" ")]


class TestTextOfTokens:
    def test_characters_in_bytes_that_another_run_of_them_precedes(self) -> None:
        """A decoder of byte pieces reads a run that begins within a character as no character at all."""
        arrow, accent = list(range(len(WORDS), len(WORDS) + 3)), list(range(len(WORDS) + 3, len(WORDS) + 5))
        rule = StopRule(99, stop_strings=("→→",), decode=exact_decode(sentencepiece(llama_decoder())))
        assert rule.check([], arrow * 2) == (6, "stop")
        for count in range(1, 12):
            emitted = accent * count + arrow
            assert rule.check(emitted, arrow) == (3, "stop")

    def test_tokens_without_text_do_not_hide_it(self) -> None:
        """Ids of a padded vocabulary, which the tokenizer does not know."""
        rule = StopRule(99, stop_strings=("END",), decode=exact_decode(sentencepiece(llama_decoder())))
        emitted = [*of("x"), *of("E"), *[900] * 40, *of("N")]
        assert rule.check(emitted, of("D x")) == (1, "stop")

    def test_it_is_the_new_tokens_own(self) -> None:
        """A prompt that ends in half of the stop string is no half of it."""
        rule = StopRule(99, stop_strings=("END",), decode=decode)
        assert rule.check([], ids("D")) == (1, None)

    def test_special_tokens_count(self) -> None:
        tokenizer = sentencepiece(llama_decoder())
        rule = StopRule(99, stop_strings=("</s>",), decode=exact_decode(tokenizer))
        assert rule.check([], of("▁cat </s> ▁the")) == (2, "stop")
        assert cut_at_stop(of("<s> ▁cat </s>"), ("</s>",), tokenizer) == " cat"

    def test_spaces_are_not_cleaned_away(self) -> None:
        backend = Tokenizer(models.WordPiece({"[UNK]": 0, "yes": 1, ".": 2}, unk_token="[UNK]"))
        backend.decoder = decoders.WordPiece(cleanup=False)
        cleaning: Any = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
        assert cleaning.decode([1, 2]) == "yes."
        assert StopRule(9, stop_strings=(" .",), decode=exact_decode(cleaning)).check([], [1, 2]) == (2, "stop")


def test_is_done_sees_every_token_of_a_run_in_turn() -> None:
    seen: list[list[int]] = []

    def is_done(tokens: Sequence[int]) -> bool:
        seen.append(list(tokens))
        return len(tokens) == 3

    assert StopRule(10, is_done=is_done).check([1], [2, 3, 4]) == (2, "stop")
    assert seen == [[1, 2], [1, 2, 3]]


def test_a_stop_string_counts_behind_so_many_tokens() -> None:
    rule = StopRule(
        9, stop_strings=("a",), decode=lambda tokens: "".join("abc"[token] for token in tokens), min_new_tokens=2
    )
    assert rule.check([], [0, 1]) == (2, None)
    assert rule.check([0], [1, 0]) == (2, "stop")


def test_a_stop_string_that_came_too_early_does_not_count_later() -> None:
    """However cycles are split: it counts where it ends, and there it was too early."""
    rule = StopRule(9, stop_strings=("ab",), decode=lambda tokens: "".join("abc"[t] for t in tokens), min_new_tokens=2)
    assert rule.check([], [0, 1, 2, 2]) == (4, None)
    assert rule.check([0, 1], [2, 0, 1, 2]) == (3, "stop")


class TestErrors:
    @pytest.mark.parametrize("least", [-1, 4, True, 0.5])
    def test_a_minimum_that_is_none(self, least: int) -> None:
        with pytest.raises(
            ValueError, match=r"min_new_tokens: expected an integer from 0 to max_new_tokens \(3\), got"
        ):
            StopRule(3, min_new_tokens=least)

    def test_limit_below_1(self) -> None:
        with pytest.raises(ValueError, match="max_new_tokens: expected an integer of at least 1, got 0"):
            StopRule(0)

    def test_empty_stop_string(self) -> None:
        with pytest.raises(ValueError, match="stop: expected strings that are not empty, got ''"):
            StopRule(1, stop_strings=("a", ""), decode=decode)

    def test_stop_strings_without_a_tokenizer(self) -> None:
        with pytest.raises(ValueError, match="stop: stop strings need a tokenizer"):
            StopRule(1, stop_strings=("a",))


@pytest.mark.parametrize(
    ("text", "stops", "cut"),
    [
        ("one two", (), "one two"),
        ("one two", ("x",), "one two"),
        ("a;", (",", ";"), "a"),
        (";", (";",), ""),
        ("a,b;;", (";;", ";"), "a,b"),  # the first one did not end it, within a least number of tokens
        ("a.bb.", (".",), "a.bb"),
        ("a.bb", (".",), "a.bb"),
    ],
)
def test_cut_at_stop(text: str, stops: tuple[str, ...], cut: str) -> None:
    class Bytes:
        all_special_ids: list[int] = []

        def decode(self, tokens: list[int], **options: bool) -> str:
            return decode(tokens)

    assert cut_at_stop(ids(text), stops, Bytes()) == cut
