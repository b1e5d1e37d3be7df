"""POST /v1/responses: OpenAI's newer form of a chat. One message comes of it, and nothing is stored."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import TypedDict

from draftwing.serving.answers import Answer, CachedTokens, Metrics, PredictedTokens, Step, metrics, usage
from draftwing.serving.errors import ApiError
from draftwing.serving.intake import Call
from draftwing.serving.schema import (
    MAX_REGEX_LENGTH,
    FieldError,
    GenerationRequest,
    Messages,
    NamedSchema,
    ResponseFormat,
    Text,
    check_unicode,
    one_of_forms,
)
from draftwing.serving.streams import Identity, event

INPUTS = "a text, or a list of messages with role and content"
ELSEWHERE = {"max_tokens": "max_output_tokens", "response_format": "text.format", "stream_options": "stream"}
"""Fields of the other routes that have another name here."""
NOT_HERE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("previous_response_id", "conversation", "prompt", "reasoning", "include", "background"), ()),
    "store": (False,),
    "truncation": ("disabled",),
}
"""Fields that would need something that is not here, such as a store, with the values that do not."""


class TextFormat(BaseModel):
    """The form that the answer must have; of a `json_schema` the schema stands beside its name."""

    model_config = ConfigDict(strict=True, extra="forbid")

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
                raise FieldError("text", f"a format of type {kind} has a {kind.removeprefix('json_')}, no other has")
        return self


class TextOptions(BaseModel):
    """What the text is like."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: TextFormat | None = None


class ResponseRequest(GenerationRequest):
    """The body of POST /v1/responses."""

    input: Annotated[Text | Messages, one_of_forms(INPUTS), BeforeValidator(check_unicode)] = Field(description=INPUTS)
    instructions: Annotated[str, BeforeValidator(check_unicode)] | None = Field(
        None, description="what the system says, in front of the input"
    )
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextOptions | None = Field(None, description="`format`: as response_format in chats")

    @model_validator(mode="after")
    def _check_fields(self) -> "ResponseRequest":
        for name, other in ELSEWHERE.items():
            if getattr(self, name) is not None:
                raise FieldError(name, f"is called {other} here")
        if self.num_choices > 1:
            raise FieldError("n", "expected 1: a response is one answer")
        return self

    def look_at(self, name: str, value: Any) -> None:
        if name not in NOT_HERE:
            super().look_at(name, value)
        elif value and value not in NOT_HERE[name]:
            raise FieldError(name, "is not supported here; nothing is stored, and a conversation is sent as input")

    @property
    def form(self) -> ResponseFormat | None:
        asked = None if self.text is None else self.text.format
        if asked is None or asked.type == "text":
            return None
        named = None
        if asked.content is not None:
            named = NamedSchema(name=asked.name, schema=asked.content)
        return ResponseFormat(type=asked.type, json_schema=named, regex=asked.regex)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chats have it.

        Raises:
            FieldError: an item that is no message.
        """
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        if any(item.get("type", "message") != "message" for item in given):
            raise FieldError("input", "expected messages alone")
        turns = [{name: item[name] for name in ("role", "content") if name in item} for item in given]
        told = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return told + turns


class OutputText(TypedDict):
    type: str
    text: str
    annotations: list[Any]


class OutputMessage(TypedDict):
    id: str
    type: str
    status: str
    role: str
    content: list[OutputText]


class OutputDetails(PredictedTokens):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseBody(TypedDict):
    """What came of it, and what was asked for."""

    id: str
    object: str
    created_at: int
    status: str
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str
    tools: list[Any]
    top_p: float
    truncation: str
    usage: ResponseUsage | None
    seed: int
    metrics: Metrics | None


class ResponseOutlet:
    """Writes what came of a call in this form; see `streams.Outlet`."""

    def __init__(self, identity: Identity, call: Call) -> None:
        assert isinstance(call.body, ResponseRequest)
        self.name, self._item = f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self._identity, self._call, self._body = identity, call, call.body
        self._created, self._num_events = int(time.time()), 0

    def whole(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        return self._response(self._status(answers[0]), answers)

    def opening(self) -> bytes:
        response = self._response("in_progress")
        item, part = self._message("in_progress"), self._part("")
        return b"".join(
            (
                self._event("created", response=response),
                self._event("in_progress", response=response),
                self._event("output_item.added", output_index=0, item=item | {"content": []}),
                self._event("content_part.added", **self._place, part=part),
            )
        )

    def chunk(self, answer: Answer, step: Step, answers: Sequence[Answer]) -> bytes:
        if not step.text:
            return b""
        return self._event("output_text.delta", **self._place, delta=step.text, logprobs=[])

    def closing(self, answers: Sequence[Answer]) -> bytes:
        text, status = answers[0].text, self._status(answers[0])
        return b"".join(
            (
                self._event("output_text.done", **self._place, text=text, logprobs=[]),
                self._event("content_part.done", **self._place, part=self._part(text)),
                self._event("output_item.done", output_index=0, item=self._message(status, text)),
                self._event(status, response=self._response(status, answers)),
            )
        )

    def failure(self, error: ApiError) -> bytes:
        told = {"code": "server_error", "message": error.message}
        return self._event("failed", response=self._response("failed") | {"error": told})

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        name = f"response.{kind}"
        self._num_events += 1
        return event({"type": name, "sequence_number": self._num_events - 1} | fields, name)

    def _status(self, answer: Answer) -> str:
        return "incomplete" if answer.finish_reason == "length" else "completed"

    def _part(self, text: str) -> OutputText:
        return {"type": "output_text", "text": text, "annotations": []}

    def _message(self, status: str, text: str = "") -> OutputMessage:
        content = [self._part(text)]
        return {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, answers: Sequence[Answer] = ()) -> ResponseBody:
        body = self._body
        asked = None if body.text is None else body.text.format
        return {
            "id": self.name,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self._identity.name,
            "output": [self._message(status, answer.text) for answer in answers],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {
                "format": {"type": "text"} if asked is None else asked.model_dump(by_alias=True, exclude_none=True)
            },
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p or 1.0,
            "truncation": "disabled",
            "usage": self._usage(answers) if answers else None,
            "seed": self._call.seed,
            "metrics": metrics(answers) if answers else None,
        }

    def _usage(self, answers: Sequence[Answer]) -> ResponseUsage:
        figures = usage(self._call, answers)
        return {
            "input_tokens": figures["prompt_tokens"],
            "input_tokens_details": figures["prompt_tokens_details"],
            "output_tokens": figures["completion_tokens"],
            "output_tokens_details": OutputDetails(reasoning_tokens=0, **figures["completion_tokens_details"]),
            "total_tokens": figures["total_tokens"],
        }
