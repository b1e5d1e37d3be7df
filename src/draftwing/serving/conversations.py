"""Bodies with a conversation: its messages, and the functions that an answer may call."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    WithJsonSchema,
    model_validator,
)

from draftwing.serving.schema import (
    Body,
    FieldError,
    GenerationRequest,
    Logprobs,
    Strict,
    Text,
    one_of_forms,
)

MAX_TOOLS = 128
TOOL_CHOICES = 'none, auto, required, or {"type": "function", "function": {"name": ...}}'


def check_unicode(value: Any) -> Any:
    """A value whose every string is Unicode: half a surrogate pair, which JSON can spell, is none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        raise ValueError("expected Unicode texts, not nested too deeply") from None
    return value


MESSAGE_SCHEMA = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    },
                },
            ]
        },
    },
}
"""A turn, as the documentation shows it; data/messages.py reads some more forms."""
Messages = Annotated[
    list[dict[str, Any]],
    Field(
        fail_fast=True,
        min_length=1,
        max_length=4096,
        description="turns: role, and content as a text or a list of text parts",
    ),
    AfterValidator(check_unicode),
    WithJsonSchema({"type": "array", "minItems": 1, "items": MESSAGE_SCHEMA}),
]


class Function(Strict):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(None, description="schemas are kept where a call is required, and not otherwise")


class Tool(Strict):
    """What the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """One of the functions."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


TOOLS = Field(
    fail_fast=True,
    max_length=MAX_TOOLS,
    description="functions that the model may call; the chat template tells it of them",
)
Word = Literal["none", "auto", "required"]


class Offer(BaseModel):
    """What a body says of functions that may be called; chats and responses write it in their own forms."""

    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = Field(None, description="false: of several calls the first one alone")

    @model_validator(mode="after")
    def _check_tool_choice(self) -> "Offer":
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise FieldError("tools", "expected functions of different names")
        if self.must_call and not names:
            raise FieldError("tool_choice", "only with tools")
        if self.chosen is not None and self.chosen not in names:
            raise FieldError("tool_choice", f"expected the name of one of the tools, {', '.join(names)}")
        return self

    @property
    def offered(self) -> list[Function]:
        """The functions that the model is told of."""
        return [] if self.tool_choice == "none" else [tool.function for tool in self.tools or ()]

    @property
    def told(self) -> tuple[dict[str, Any], ...]:
        """What the chat template tells the model of them."""
        unsaid = {"strict", "type"}
        return tuple(
            {"type": "function", "function": each.model_dump(exclude_none=True, exclude=unsaid)}
            for each in self.offered
        )

    @property
    def must_call(self) -> bool:
        """Whether the answer is to be a call."""
        return self.tool_choice not in (None, "none", "auto")

    @property
    def chosen(self) -> str | None:
        """The function that must be called, where it is named."""
        choice = self.tool_choice
        return None if choice is None or isinstance(choice, str) else str(choice.function.name)

    @property
    def callable(self) -> list[Function]:
        """The functions of which one must be called, if one must."""
        return [each for each in self.offered if self.chosen in (None, each.name)]


class ConversationRequest(Offer, GenerationRequest):
    """What chats and responses have in common: an answer that may call functions."""

    PROMPT: ClassVar[str] = "messages"

    @model_validator(mode="after")
    def _check_calls(self) -> "ConversationRequest":
        if self.form is not None and self.offered:
            raise FieldError(self.FORM, "not with tools that may be called")
        if self.must_call:
            self.check_ends("a tool call that is required")
        return self


class ChatTools(Offer):
    """Tools in the form of chats."""

    tools: Annotated[list[Tool], TOOLS, BeforeValidator(check_unicode)] | None = None
    tool_choice: Annotated[Word | NamedTool | None, one_of_forms(TOOL_CHOICES)] = Field(None, description=TOOL_CHOICES)


class ChatRequest(ChatTools, ConversationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="counts instead of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = Field(None, description="so many most probable tokens; needs logprobs")

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_fields(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "only with logprobs")
        if self.max_tokens == 0:
            raise FieldError("max_tokens", "expected at least 1")
        return self


class TokenizeRequest(ChatTools, Body):
    """The body of POST /tokenize: a `prompt`, or `messages` (and `tools`) through the chat template."""

    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="of a prompt; default: true")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_source(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "expected either a prompt or messages")
        if self.tools and self.messages is None:
            raise FieldError("tools", "only with messages")
        return self
