"""Answers in a form, from the embedded models: they have it, and the tokens of decoding without drafts and company."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance", reason='pip install "draftwing[serve]"')

import draftwing
from draftwing.api import SpeculativeModel
from draftwing.engine import grammar as grammar_module
from draftwing.engine.engine import Request, Seat
from draftwing.engine.options import GenerateOptions
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import StopRule
from draftwing.serving.structured import AllowedTokens, Forms
from draftwing.target.load import load_tokenizer

PROMPT = "def read_lines(path):\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["file", "folder", "link"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "is_open": {"type": "boolean"},
    },
    "required": ["kind", "size", "tags", "is_open"],
    "additionalProperties": False,
}
REGEX = r"(return [a-z_]{2,8}|raise [A-Z][a-z]{2,6})(\n[ ]{4}x = [0-9é☃]{1,3}){1,4}"


@pytest.fixture(scope="module")
def model() -> SpeculativeModel:
    return draftwing.load("tiny", draft="tiny", dtype="float32")


@pytest.fixture(scope="module")
def forms(model: SpeculativeModel) -> Forms:
    return Forms(model.tokenizer, model.target.vocab_size, model.target.eos_token_ids)


def has_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == set(SCHEMA["required"])
        and value["kind"] in ("file", "folder", "link")
        and (type(value["size"]) is int and 0 <= value["size"] <= 99)
        and (len(value["tags"]) <= 2 and all(len(tag) <= 6 for tag in value["tags"]))
        and isinstance(value["is_open"], bool)
    )


def requests_of(model: SpeculativeModel, forms: Forms, temperature: float) -> list[Request]:
    """A schema, none, a regular expression, none, the schema again with a penalty."""
    made: list[Request] = []
    schema = forms.json(SCHEMA)
    for row, allowed in enumerate([schema.copy(), None, forms.regex(REGEX), None, schema.copy()]):
        ids = model.tokenizer(PROMPT + "    #" * row)["input_ids"]
        sampling = SamplingParams(temperature, seed=row, frequency_penalty=0.5 * (row == 4))
        stop = StopRule(160 if allowed else 30, tuple(model.target.eos_token_ids))
        made.append(Request(ids, sampling, stop, allowed=allowed))
    return made


def seats_of(model: SpeculativeModel, requests: list[Request], plan: str) -> list[Seat]:
    return list(model.start_requests(requests, GenerateOptions(plan=plan)).run().outputs)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_answers_have_their_form_and_the_loops_tokens(
    model: SpeculativeModel, forms: Forms, temperature: float
) -> None:
    expected = [seats_of(model, [request], "off")[0] for request in requests_of(model, forms, temperature)]
    texts = [model.tokenizer.decode(seat.tokens, skip_special_tokens=True) for seat in expected]
    assert [seat.finish_reason for seat in expected[::2]] == ["eos"] * 3
    assert has_schema(texts[0])
    assert re.fullmatch(REGEX, texts[2])
    assert has_schema(texts[4])
    assert not has_form(texts[1]), "the model does not say such things by itself"
    for plan in ("chain:3", "tree:4x4x16"):
        seats = seats_of(model, requests_of(model, forms, temperature), plan)
        assert [seat.tokens for seat in seats] == [seat.tokens for seat in expected]
        assert any(sum(seat.counts.accepted_at) for seat in seats[::2])


def has_form(text: str) -> bool:
    try:
        return has_schema(text)
    except ValueError:
        return re.fullmatch(REGEX, text) is not None


def ask_the_root_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes of a tree get the mask of the root's prefix."""
    masks = grammar_module.Grammar.masks
    monkeypatch.setattr(
        grammar_module.Grammar, "masks", lambda *arguments: masks(*arguments)[:1].expand(arguments[1].num_nodes, -1)
    )


def go_on_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matcher stands where the node before had brought it."""

    def behind(self: Any, said: tuple[int, ...]) -> Any:
        self._start.try_consume_tokens(list(said[-1:]))
        return self._start

    monkeypatch.setattr(AllowedTokens, "_behind", behind)


@pytest.mark.parametrize("sabotage", [ask_the_root_alone, go_on_in_place])
def test_sabotage_is_noticed(
    model: SpeculativeModel,
    forms: Forms,
    sabotage: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = [seats_of(model, [request], "off")[0].tokens for request in requests_of(model, forms, 0.9)]
    sabotage(monkeypatch)
    try:
        said = [seat.tokens for seat in seats_of(model, requests_of(model, forms, 0.9), "tree:4x4x16")]
    except ValueError as error:  # what was said has the form no longer
        assert "doesn't satisfy" in str(error)
    else:
        assert said != expected


def test_masks_do_not_depend_on_what_was_asked_before(forms: Forms, model: SpeculativeModel) -> None:
    """Forwards, backwards and across; the ends are allowed where a text is whole and nowhere else."""
    ids = model.tokenizer('{"kind": "file",\n "size": 7,\n\t"tags": ["é"], "is_open": false}')["input_ids"]
    ends = list(model.target.eos_token_ids)
    fresh = [forms.json(SCHEMA)(ids[:length]) for length in range(len(ids) + 1)]
    asked = forms.json(SCHEMA)
    for length in [*range(len(ids) + 1), *range(len(ids), -1, -1), 7, 3, len(ids), 5, 5, 0]:
        mask = asked(list(ids[:length]))
        assert torch.equal(mask, fresh[length])
        assert mask[ends].all() if length == len(ids) else not mask[ends].any()
    assert fresh[-1].sum() == len(ends)
    other = model.tokenizer('{"kind": "link"')["input_ids"]
    assert torch.equal(asked(other), forms.json(SCHEMA)(other))
    with pytest.raises(ValueError, match=r"response_format: .*doesn't satisfy"):
        asked(ids[1:])


def test_siblings_do_not_see_each_other(model: SpeculativeModel, forms: Forms, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cousins of a tree by turns, where a matcher that is rolled back gives the masks of the cousin."""
    ids = model.tokenizer('{"kind": "file", "size": 7, "tags": [""')["input_ids"]
    tails = [model.tokenizer(text)["input_ids"] for text in (',\n    "', "]\n    ,", ', "a"', "],", "]")]
    for most_kept in (64, 2):
        monkeypatch.setattr("draftwing.serving.structured.MOST_KEPT", most_kept)
        asked = forms.json(SCHEMA)
        for length in range(4):
            for tail in tails:
                said = ids + tail[:length]
                assert torch.equal(asked(said), forms.json(SCHEMA)(said))


@pytest.mark.parametrize("vocab_size", [4000, 5000])
def test_logits_may_be_fewer_or_more_than_tokens(vocab_size: int) -> None:
    tokenizer = load_tokenizer("tiny")
    mask = Forms(tokenizer, vocab_size, [tokenizer.eos_token_id, 2]).regex("[^a]*")([])
    assert mask.shape == (vocab_size,)
    assert mask[[tokenizer.eos_token_id, 2]].all()
    assert not mask[len(tokenizer) :].any()


def test_a_tokenizer_that_cannot_be_read_is_told() -> None:
    with pytest.raises(ValueError, match="this model's tokenizer cannot be read for it: Only fast"):
        Forms(object(), 100, [1]).regex("a")
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Forms(load_tokenizer("tiny"), 100, []).json({})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftwing.serving.structured.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs llguidance: pip install "draftwing\[serve\]"'):
        Forms(load_tokenizer("tiny"), 100, [1]).regex("a")
