"""What POST /v1/responses answers: a message and the calls that come of it, as one body or as events."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import TypedDict

from draftwing.serving.answers import (
    Answer,
    CachedTokens,
    Metrics,
    PredictedTokens,
    Step,
    metrics,
    usage,
)
from draftwing.serving.errors import ApiError
from draftwing.serving.intake import Call
from draftwing.serving.response_schema import ResponseRequest
from draftwing.serving.streams import Identity, event
from draftwing.serving.tools import ToolCall


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


class OutputCall(TypedDict):
    id: str
    type: str
    status: str
    call_id: str
    name: str
    arguments: str


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
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
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
        self._has_message = False  # has begun in the stream

    def whole(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        return self._response(self._status(answers[0]), answers)

    def opening(self) -> bytes:
        response = self._response("in_progress")
        kinds = ("created", "in_progress")
        return b"".join(self._event(kind, response=response) for kind in kinds)

    def chunk(self, answer: Answer, step: Step, answers: Sequence[Answer]) -> bytes:
        if not step.text:
            return b""
        begun = self._begin_message()  # first: events are numbered as they are made
        return begun + self._event("output_text.delta", **self._place, delta=step.text, logprobs=[])

    def closing(self, answers: Sequence[Answer]) -> bytes:
        status, parts = self._status(answers[0]), list[bytes]()
        for place, item in enumerate(self._output(answers[0])):
            is_message = item["id"] == self._item
            parts.append(self._end_message(answers[0].text, item) if is_message else self._call_events(item, place))
        return b"".join(parts) + self._event(status, response=self._response(status, answers))

    def _begin_message(self) -> bytes:
        """The events in front of a message's text, once."""
        if self._has_message:
            return b""
        self._has_message = True
        item = self._message("in_progress") | {"content": []}
        added = self._event("output_item.added", output_index=0, item=item)
        return added + self._event("content_part.added", **self._place, part=self._part(""))

    def _end_message(self, text: str, item: Mapping[str, Any]) -> bytes:
        return (
            self._begin_message()
            + self._event("output_text.done", **self._place, text=text, logprobs=[])
            + self._event("content_part.done", **self._place, part=self._part(text))
            + self._event("output_item.done", output_index=0, item=item)
        )

    def _call_events(self, item: Mapping[str, Any], place: int) -> bytes:
        """The events of a call, which is known as a whole."""
        begun = {**item, "status": "in_progress", "arguments": ""}
        where, arguments = {"item_id": item["id"], "output_index": place}, item["arguments"]
        kind, name = "function_call_arguments", item["name"]
        return (
            self._event("output_item.added", output_index=place, item=begun)
            + self._event(f"{kind}.delta", **where, delta=arguments)
            + self._event(f"{kind}.done", **where, name=name, arguments=arguments)
            + self._event("output_item.done", output_index=place, item=item)
        )

    def failure(self, error: ApiError) -> bytes:
        told = {"code": "invalid_prompt" if error.status == 400 else "server_error", "message": error.message}
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

    def _call_item(self, call: ToolCall) -> OutputCall:
        return {
            "id": f"fc_{call['id']}",
            "type": "function_call",
            "status": "completed",
            "call_id": call["id"],
            **call["function"],
        }

    def _output(self, answer: Answer) -> list[OutputMessage | OutputCall]:
        """The message, which calls may stand in place of, and the calls."""
        is_silent = answer.calls and not answer.text
        said = [] if is_silent else [self._message(self._status(answer), answer.text)]
        return [*said, *map(self._call_item, answer.calls)]

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
            "metadata": body.metadata or {},
            "model": self._identity.name,
            "output": [item for answer in answers for item in self._output(answer)],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {
                "format": {"type": "text"} if asked is None else asked.model_dump(by_alias=True, exclude_none=True)
            },
            "tool_choice": self._choice(),
            "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": body.top_p or 1.0,
            "truncation": "disabled",
            "usage": self._usage(answers) if answers else None,
            "seed": self._call.seed,
            "metrics": metrics(answers) if answers else None,
        }

    def _choice(self) -> str | dict[str, str]:
        choice = self._body.tool_choice
        chosen = self._body.chosen
        if chosen is not None:
            return {"type": "function", "name": chosen}
        return "auto" if choice is None else str(choice)

    def _usage(self, answers: Sequence[Answer]) -> ResponseUsage:
        figures = usage(self._call, answers)
        return {
            "input_tokens": figures["prompt_tokens"],
            "input_tokens_details": figures["prompt_tokens_details"],
            "output_tokens": figures["completion_tokens"],
            "output_tokens_details": OutputDetails(reasoning_tokens=0, **figures["completion_tokens_details"]),
            "total_tokens": figures["total_tokens"],
        }
