"""Tools: how models write that they call one, how that is read back, and the form that makes them call one.

A chat template tells the model of its tools, and with its own example in which format to answer.
"""

import json
import math
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typing_extensions import TypedDict

from draftwing.serving.structured import EXACTLY, check_schema
from draftwing.serving.text import overlap


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number of JSON")
    return number


DECODER = json.JSONDecoder(strict=False, parse_float=_finite, parse_constant=_finite)
"""Of what models write: line ends in texts are read, NaN and infinity are not."""
NAMED = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?\s*(?:\[ARGS\]\s*)?(?={)")
"""A function's name in front of its arguments."""
NAME = "NAME"


class CalledFunction(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call as OpenAI's API has it; its arguments are the text of a JSON object."""

    id: str
    type: str
    function: CalledFunction


@dataclass(frozen=True)
class ToolFormat:
    """How some models write calls.

    Attributes:
        signs: what chat templates of these models have in them, and `others` what those of similar ones have.
        marks: texts around and between calls; the first one begins them.
        before, after: what stands around a call's arguments; NAME is its name's place.
        is_bare: an answer that begins with a brace is a call as well.
    """

    signs: tuple[str, ...]
    marks: tuple[str, ...]
    before: str
    after: str
    others: tuple[str, ...] = ()
    is_bare: bool = False

    def suits(self, template: str) -> bool:
        """Whether a chat template is one of these models'."""
        return all(sign in template for sign in self.signs) and not any(sign in template for sign in self.others)

    def start(self, text: str, is_beginning: bool) -> int:
        """Where in an answer's text so far calls begin, or could if more of it came."""
        if is_beginning and (not text.strip() or (self.is_bare and text.lstrip().startswith("{"))):
            return 0
        mark = self.marks[0]
        return place if (place := text.find(mark)) >= 0 else len(text) - overlap(text, mark)

    def read(self, text: str, names: Collection[str]) -> tuple[list[ToolCall], int]:
        """The calls that a text begins with, and where they end: behind them is something else, or an unknown name."""
        calls, end = list[ToolCall](), 0
        place = _behind(text, 0, ",", ";", *self.marks)
        while place < len(text):
            try:
                named = NAMED.match(text, place)
                value, stop = DECODER.raw_decode(text, named.end() if named else place)
                values = [{"name": named[1], "arguments": value}] if named else value
                calls += [_as_call(called, names) for called in (values if isinstance(values, list) else [values])]
            except (ValueError, RecursionError):
                break
            end = _behind(text, stop, *self.marks[1:])
            place = _behind(text, end, ",", ";", *self.marks)
        return calls, (place if place == len(text) else end) if calls else 0

    def split(self, text: str, names: Collection[str], is_beginning: bool) -> tuple[str, list[ToolCall]]:
        """A whole answer's end, from where calls may begin: what of it is said, and the calls."""
        said, calls = "", list[ToolCall]()
        while text:
            place = self.start(text, is_beginning)
            found, end = self.read(text[place:], names)
            calls += found
            # A mark that is only mentioned is said, and so is all that stands around calls.
            step = end or (len(self.marks[0]) if text.startswith(self.marks[0], place) else 1)
            said += text[:place] if found else text[: place + step]
            text, is_beginning = text[place + step :], False
        return said, calls

    def grammar(self, functions: Mapping[str, dict[str, Any]], special: Mapping[str, int]) -> str:
        """One call of one of the functions, by their arguments' schemas, as llguidance's grammars say it.

        `special` are the ids of marks that are special tokens.
        """
        rules = [f"start: {' | '.join(f'call{number}' for number in range(len(functions)))}"]
        for number, (name, schema) in enumerate(functions.items()):
            before = _parts(self.before.replace(NAME, name), special)
            arguments = json.dumps({"type": "object"} | schema | {"x-guidance": EXACTLY})
            rules.append(f"call{number}: {before} %json {arguments} {_parts(self.after, special)}")
        return "\n".join(rules)


FORMATS = {
    "hermes": ToolFormat(
        signs=("<tool_call>", "arguments"),
        others=("<function=", "<arg_key>"),
        marks=("<tool_call>", "</tool_call>"),
        before='<tool_call>\n{"name": "NAME", "arguments": ',
        after="}\n</tool_call>",
    ),
    "llama3_json": ToolFormat(
        signs=("parameters", "ipython"),
        marks=("<|python_tag|>",),
        before='{"name": "NAME", "parameters": ',
        after="}",
        is_bare=True,
    ),
    "mistral_args": ToolFormat(
        signs=("[TOOL_CALLS]", "[ARGS]"), marks=("[TOOL_CALLS]",), before="[TOOL_CALLS]NAME[ARGS]", after=""
    ),
    "mistral": ToolFormat(
        signs=("[TOOL_CALLS]",),
        others=("[ARGS]",),
        marks=("[TOOL_CALLS]",),
        before='[TOOL_CALLS][{"name": "NAME", "arguments": ',
        after="}]",
    ),
}
"""Nous Hermes' and Qwen's, Llama 3's, and Mistral's newer and older ones."""


def format_of(template: str) -> ToolFormat | None:
    """The format of the models that have this chat template; None: it is not known."""
    return next((known for known in FORMATS.values() if known.suits(template)), None)


class CallReader:
    """Takes the calls out of an answer's text while it comes; from where they begin it is held back until the end."""

    def __init__(self, tool_format: ToolFormat, names: Collection[str], most: int | None = None) -> None:
        self._format, self._names, self._most = tool_format, names, most
        self._held, self._has_said = "", False

    def push(self, text: str, is_end: bool) -> tuple[str, list[ToolCall]]:
        """What the text brings: what is said, and at the end the calls. What is no call, but begins so, is said."""
        self._held += text
        if is_end:
            said, calls = self._format.split(self._held, self._names, not self._has_said)
            return "" if calls and not self._has_said and said.isspace() else said, calls[: self._most]
        place = self._format.start(self._held, not self._has_said)
        if self._held[:place].isspace() and not self._has_said:  # blanks that may stand in front of calls
            place = 0
        said, self._held = self._held[:place], self._held[place:]
        self._has_said = self._has_said or bool(said)
        return said, []


def _as_call(value: Any, names: Collection[str]) -> ToolCall:
    """Raises a ValueError for what is no call of a known function."""
    called = value if isinstance(value, dict) else {}
    name, arguments = called.get("name"), called.get("arguments", called.get("parameters"))
    if isinstance(arguments, str):
        arguments = DECODER.decode(arguments)
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        raise ValueError("no call")
    text = json.dumps(arguments, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in text):  # half a pair, which no answer could be sent with
        text = json.dumps(arguments)
    function = CalledFunction(name=name, arguments=text)
    return {"id": secrets.token_hex(5)[:9], "type": "function", "function": function}  # Mistral's templates want 9


def _behind(text: str, place: int, *between: str) -> int:
    """Where what stands between calls ends: blanks, and these texts."""
    while place < len(text):
        known = next((part for part in between if text.startswith(part, place)), "")
        if not known and not text[place].isspace():
            return place
        place += len(known) or 1
    return place


def _parts(text: str, special: Mapping[str, int]) -> str:
    """A text as a sequence of literals and special tokens."""
    pieces = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    return " ".join(f"<[{special[piece]}]>" if piece in special else json.dumps(piece) for piece in pieces if piece)


def schemas(functions: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each function by name, the schema of its arguments.

    Raises:
        ValueError: arguments that are no object, or a schema that cannot be read.
    """
    for function in functions:
        check_schema(function.get("parameters"))
        if (function.get("parameters") or {}).get("type", "object") != "object":
            raise ValueError(f"{function['name']}: expected parameters of the type object")
    return {function["name"]: function.get("parameters") or {} for function in functions}
