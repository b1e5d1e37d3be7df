"""Specs of methods, and which pairs of them differ in one choice."""

import pytest

from draftwing.evaluation.figures import choice_between
from draftwing.evaluation.specs import MethodSpec

METHODS = ("plain", "ngram", "eagle1", "eagle2", "eagle3")


def spec(text: str) -> MethodSpec:
    return MethodSpec.parse(text, METHODS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", MethodSpec("plain")),
        ("eagle3", MethodSpec("eagle3")),
        ("eagle3:auto", MethodSpec("eagle3", plan="auto")),
        ("eagle3@new:tree:4x5x26", MethodSpec("eagle3", "new", "tree:4x5x26")),
        ("eagle2@new+uncoupled", MethodSpec("eagle2", "new", None, ("uncoupled",))),
        ("eagle3:chain:5+ngram+uncoupled", MethodSpec("eagle3", None, "chain:5", ("ngram", "uncoupled"))),
    ],
)
def test_a_spec_is_read_and_written_back(text: str, expected: MethodSpec) -> None:
    assert spec(text) == expected
    assert str(expected) == text


def test_settings_are_options_of_generate() -> None:
    assert spec("eagle3").settings == {"ngram": False}, "a paper's method has its own drafts only"
    assert spec("eagle3:chain:5+ngram+uncoupled").settings == {"plan": "chain:5", "ngram": True, "coupled": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("egle3", "methods: unknown method 'egle3'; did you mean 'eagle3'"),
        ("eagle3+ngrams", "methods: unknown option 'ngrams'; did you mean 'ngram'"),
        ("eagle3:tree:4", "plan: expected"),
        ("eagle3:tree:1x1x60", "plan: 60 nodes asked for"),
        ("plain:chain:2", "plain takes no"),
        ("ngram:tree:2x2x3", "methods: ngram:tree:2x2x3: plan: n-gram drafting has one continuation"),
        ("ngram+uncoupled", r"methods: ngram\+uncoupled: coupled: "),
        ("", "methods: expected METHOD"),
        ("eagle3@:auto", "methods: expected METHOD"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(text)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("eagle3:tree:4x5x26+ngram", "eagle3:tree:4x5x26", "n-grams"),
        ("eagle3:tree:4x5x26+uncoupled", "eagle3:tree:4x5x26", "noise"),
        ("eagle3:tree:4x5x26", "eagle3:chain:5", "tree against chain"),
        ("eagle1:eagle1", "eagle1:chain:5", "tree against chain"),
        ("eagle2:tree:4x5x26", "eagle1:eagle1", "dynamic"),
        ("eagle3:auto", "eagle3:tree:4x5x26", "size themselves"),
        ("eagle2:tree:4x5x20", "eagle1:eagle1", None),  # fewer nodes: two choices
        ("eagle3:tree:4x5x26+ngram", "eagle3:chain:5", None),
        ("eagle3:tree:4x5x26", "eagle2:tree:4x5x26", None),
        ("eagle3@a:tree:4x5x26", "eagle3@b:chain:5", None),
        ("eagle3:chain:5", "eagle3:tree:4x5x26", None),  # the other way round
        ("plain", "plain", None),
    ],
)
def test_pairs_that_differ_in_one_choice(one: str, other: str, expected: str | None) -> None:
    found = choice_between(spec(one), spec(other))
    assert found is None if expected is None else found is not None and expected in found
