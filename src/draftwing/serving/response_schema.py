"""The body of POST /v1/responses: OpenAI's newer form of a chat. Nothing is stored."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from draftwing.serving.conversations import (
    MESSAGE_SCHEMA,
    TOOLS,
    ConversationRequest,
    Function,
    FunctionName,
    Word,
    check_unicode,
)
from draftwing.serving.schema import (
    MAX_REGEX_LENGTH,
    FieldError,
    Known,
    NamedSchema,
    ResponseFormat,
    Text,
    one_of_forms,
)

INPUTS = "a text, or a list of messages with role and content, function calls and their outputs"
TOOL_CHOICES = 'none, auto, required, or {"type": "function", "name": ...}'
ELSEWHERE = {"max_tokens": "max_output_tokens", "response_format": "text.format"}
"""Fields of the other routes that have another name here."""
NOT_HERE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("previous_response_id", "conversation", "prompt", "background", "reasoning"), ()),
    "include": (["reasoning.encrypted_content"],),
    "store": (False,),
    "truncation": ("disabled",),
}
"""Fields that would need something that is not here, such as a store, with the values that do not."""


def _item_schema(kind: str, *names: str) -> dict[str, Any]:
    texts: dict[str, Any] = {name: {"type": "string"} for name in names}
    properties = {"type": {"const": kind}} | texts
    return {"type": "object", "required": ["type", *names], "properties": properties}


ITEM_SCHEMA = {
    "anyOf": [
        MESSAGE_SCHEMA,
        _item_schema("function_call", "call_id", "name", "arguments"),
        _item_schema("function_call_output", "call_id", "output"),
    ]
}
"""An item of a conversation, as the documentation shows it; an output may be a list of text parts as well."""
Items = Annotated[
    list[dict[str, Any]],
    Field(fail_fast=True, min_length=1, max_length=4096),
    AfterValidator(check_unicode),
    WithJsonSchema({"type": "array", "minItems": 1, "items": ITEM_SCHEMA}),
]


class FlatTool(Function):
    """What the model may call: the function's fields stand beside its type."""

    type: Literal["function"]

    @property
    def function(self) -> Function:
        return self


class NamedFlatTool(FunctionName):
    """The tool that must be called."""

    type: Literal["function"]

    @property
    def function(self) -> FunctionName:
        return self


class TextFormat(Known):
    """The form that the answer must have; of a `json_schema` the schema stands beside its name."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    name: str | None = None
    description: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    regex: Annotated[str, Field(max_length=MAX_REGEX_LENGTH)] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "TextFormat":
        for kind, given in (("json_schema", self.content), ("regex", self.regex)):
            if (given is not None) != (self.type == kind):
                word = kind.removeprefix("json_")
                raise FieldError("text", f"a format of type {kind} has a {word}, no other has")
        return self


class TextOptions(Known):
    """What the text is like."""

    format: TextFormat | None = None


class ResponseRequest(ConversationRequest):
    """The body of POST /v1/responses."""

    PROMPT: ClassVar[str] = "input"
    FORM: ClassVar[str] = "text"

    input: Annotated[Text | Items, one_of_forms(INPUTS), BeforeValidator(check_unicode)] = Field(description=INPUTS)
    instructions: Annotated[str, BeforeValidator(check_unicode)] | None = Field(
        None, description="what the system says, in front of the input"
    )
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(check_unicode)] | None = Field(
        None, description="the answer has it as well"
    )
    text: Annotated[TextOptions, BeforeValidator(check_unicode)] | None = Field(
        None, description="`format`: as response_format in chats"
    )
    tools: Annotated[list[FlatTool], TOOLS, BeforeValidator(check_unicode)] | None = None
    tool_choice: Annotated[Word | NamedFlatTool | None, one_of_forms(TOOL_CHOICES)] = Field(
        None, description=TOOL_CHOICES
    )

    @model_validator(mode="after")
    def _check_fields(self) -> "ResponseRequest":
        for name, other in ELSEWHERE.items():
            if getattr(self, name) is not None:
                raise FieldError(name, f"is called {other} here")
        if self.stream_options is not None and any(
            self.stream_options.model_dump(exclude={"include_obfuscation"}).values()
        ):
            raise FieldError("stream_options", "expected include_obfuscation alone; a last event has the usage")
        if self.num_choices > 1:
            raise FieldError("n", "expected 1: a response is one answer")
        return self

    def look_at(self, name: str, value: Any) -> None:
        if name not in NOT_HERE:
            super().look_at(name, value)
        elif value and value not in NOT_HERE[name]:
            problem = "is not supported here; nothing is stored, and a conversation is sent as input"
            raise FieldError(name, problem)

    @property
    def limit_field(self) -> str:
        return "max_output_tokens"

    @property
    def form(self) -> ResponseFormat | None:
        asked = None if self.text is None else self.text.format
        if asked is None or asked.type == "text":
            return None
        named = None if asked.content is None else NamedSchema(name=asked.name, schema=asked.content)
        return ResponseFormat(type=asked.type, json_schema=named, regex=asked.regex)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chats have it.

        Raises:
            FieldError: an item that is no message, no call and no output of one.
        """
        told = [] if self.instructions is None else [_turn("system", self.instructions)]
        if isinstance(self.input, str):
            return [*told, _turn("user", self.input)]
        return told + _turns(self.input)


def _turn(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _turns(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns of a chat; calls belong to the answer that they follow, as they were made."""
    turns = list[dict[str, Any]]()
    for index, item in enumerate(items):
        kind = item.get("type") or "message"
        if kind == "message":
            turns.append(_turn(item.get("role"), item.get("content")))
            continue
        if kind not in ("function_call", "function_call_output"):
            expected = "expected messages, function calls and their outputs"
            raise FieldError("input", f"item {index} is of type {kind!r:.40}; {expected}")
        if not isinstance(item.get("call_id"), str):
            raise FieldError("input", f"item {index} has no call_id")
        if kind == "function_call_output":
            said = _turn("tool", item.get("output"))
            turns.append(said | {"tool_call_id": item["call_id"]})
            continue
        if not turns or turns[-1]["role"] != "assistant":
            turns.append(_turn("assistant", None))
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item["call_id"], "type": "function", "function": function}
        turns[-1].setdefault("tool_calls", []).append(call)
    return turns
