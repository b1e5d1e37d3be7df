"""Schemas that llguidance could not take without ending the process: what is refused, and what is not."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("llguidance", reason='pip install "draftwing[serve]"')

from draftwing.serving.structured import MOST_LEVELS, MOST_REFERENCES, Forms, check_pattern, check_schema
from draftwing.target.load import load_tokenizer

Wrap = Callable[[Any], dict[str, Any]]
WRAPS: dict[str, Wrap] = {
    "bare": lambda inner: inner,
    "items": lambda inner: {"type": "array", "items": inner},
    "prefixItems": lambda inner: {"type": "array", "prefixItems": [inner]},
    "allOf": lambda inner: {"allOf": [inner]},
    "anyOf": lambda inner: {"anyOf": [inner, {"type": "null"}]},
    "properties": lambda inner: {"type": "object", "properties": {"a": inner}},
    "additionalProperties": lambda inner: {"type": "object", "additionalProperties": inner},
}


def linked(wrap: Wrap, num_links: int, num_wraps: int = 1, root: str = "#") -> dict[str, Any]:
    """Parts that refer each to the next, from inside so many of a keyword."""
    parts: dict[str, Any] = {f"a/{num_links}": {"type": "integer"}}
    for link in range(num_links):
        part: Any = {"$ref": f"{root}/$defs/a~1{link + 1}"}
        for _ in range(num_wraps):
            part = wrap(part)
        parts[f"a/{link}"] = part
    return {"$defs": parts, "$ref": f"{root}/%24defs/a~10"}


def most(is_fine: Callable[[int], bool]) -> int:
    """The largest number for which it is so, of numbers from 1 on."""
    return next(number for number in range(1, 1000) if not is_fine(number)) - 1


def is_taken(schema: Any) -> bool:
    try:
        check_schema(schema)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def forms() -> Forms:
    return Forms(load_tokenizer("tiny"), 1024, [0])


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("num_wraps", [1, 12])
def test_the_longest_chains_that_are_taken_are_read(forms: Forms, wrap: str, num_wraps: int) -> None:
    """In a thread, as the server reads them; one that is too deep would end this process."""
    num_links = most(lambda number: is_taken(linked(WRAPS[wrap], number, num_wraps)))
    assert 4 < num_links < MOST_REFERENCES
    errors = list[Any]()

    def read() -> None:
        try:
            forms.json(linked(WRAPS[wrap], num_links, num_wraps))
        except ValueError as error:  # of keywords that do not go together; it has been read
            errors.append(error)

    thread = Thread(target=read)
    thread.start()
    thread.join()
    assert not any("expected a schema" in str(error) for error in errors)


@pytest.mark.parametrize(
    "schema",
    [
        linked(WRAPS["items"], 1000),
        linked(WRAPS["bare"], MOST_REFERENCES),
        linked(WRAPS["properties"], 100, 5),
        {"allOf": [{"$ref": "#"}] * (MOST_REFERENCES + 1)},
        linked(WRAPS["items"], 100, 2, root="https://example.com/x") | {"$id": "https://example.com/x"},
        {"properties": {"inner": linked(WRAPS["items"], 100, 3) | {"$id": "https://example.com/x"}}},
    ],
)
def test_deeper_ones_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected a schema"):
        check_schema(schema)


@pytest.mark.parametrize("wrap", [*WRAPS.values()], ids=[*WRAPS])
def test_a_type_that_is_said_twice_is_refused(wrap: Wrap) -> None:
    """Each would be an alternative: with 200 of them the parser gives up in the middle of an answer."""
    check_schema(wrap({"type": ["object", "null"]}))
    with pytest.raises(ValueError, match=r"expected no number below .*, got -1000"):
        check_schema(wrap({"minimum": -(10**400)}))  # no float
    with pytest.raises(ValueError, match="expected different ones in a list of types"):
        check_schema(wrap({"type": ["object"] * 200}))


def test_levels_are_counted_by_where_references_lead() -> None:
    """Once, so that cycles are taken, and many references to one part."""
    tree = {"type": "object", "properties": {"of": {"type": "array", "items": {"$ref": "#"}}}}
    check_schema(tree)
    deep = tree
    for _ in range(MOST_LEVELS // 8):
        deep = {"type": "array", "items": deep}
    check_schema({"anyOf": [{"$ref": "#/$defs/a"}] * 100, "$defs": {"a": deep}})
    check_schema({"$ref": "#/prefixItems/1/x", "prefixItems": [deep, {"x": {}}, deep]})
    others = {f"b{number}": {"type": "array", "items": deep} for number in range(8)}
    with pytest.raises(ValueError, match="levels"):
        check_schema({"anyOf": [{"$ref": f"#/$defs/{name}"} for name in others], "$defs": others})


SLOW = ["a{1000000}", "(a{1000}){1000}", "((a{30,}){,30}){5,30}", r"(\[a{1000}){1000}", "a{1000}" * 30]
SLOW += ["(a{1000}[[a])]){1000}", "(a{1000}[](]){1000}", "(a{1000}[])]){1000}", r"(\)a{1000}){1000}"]
SLOW += ["(?x)(a{1000}#(\n){1000}#)"]
FINE = [r"\p{L}{1000}[{3}(]{1000}", r"\x{41}{99}", "(a{1,50} ){20}", "(a|b*)+"]
FINE += ["[a-f0-9]{8}(-[a-f0-9]{4}){3}-[a-f0-9]{12}"]


@pytest.mark.parametrize("pattern", SLOW)
def test_regular_expressions_that_repeat_too_much_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        check_pattern(pattern)


@pytest.mark.parametrize("pattern", FINE)
def test_others_are_read(forms: Forms, pattern: str) -> None:
    forms.regex(pattern)
