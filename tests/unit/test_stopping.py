"""Where a row stops: exact inside a run of accepted tokens."""

from collections.abc import Sequence

import pytest

from draftwing.decoding.stopping import StopRule, cut_at_stop


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


def test_is_done_sees_every_token_of_a_run_in_turn() -> None:
    seen: list[list[int]] = []

    def is_done(tokens: Sequence[int]) -> bool:
        seen.append(list(tokens))
        return len(tokens) == 3

    assert StopRule(10, is_done=is_done).check([1], [2, 3, 4]) == (2, "stop")
    assert seen == [[1, 2], [1, 2, 3]]


class TestErrors:
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
    [("one two", (), "one two"), ("one two", ("x",), "one two"), ("a;b,c", (",", ";"), "a"), (";a", (";",), "")],
)
def test_cut_at_stop(text: str, stops: tuple[str, ...], cut: str) -> None:
    assert cut_at_stop(text, stops) == cut
