"""How completions and chats go out: as one body, or as events, a chunk for each cycle."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from draftwing.serving.answers import Answer, Shape, Step, envelope, metrics, usage
from draftwing.serving.errors import ApiError
from draftwing.serving.intake import Call

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Identity:
    """What a server calls itself: the model's `name`, and a `root` by which clients find its tokenizer."""

    name: str
    root: str
    fingerprint: str


class Outlet(Protocol):
    """Writes what came of one call; `name` is its id."""

    name: str

    def whole(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        """The body, once all answers have ended."""

    def opening(self) -> bytes:
        """The events in front of all others."""

    def chunk(self, answer: Answer, step: Step, answers: Sequence[Answer]) -> bytes:
        """The events of what a cycle brought one of the answers."""

    def closing(self, answers: Sequence[Answer]) -> bytes:
        """The last events, once all answers have ended."""

    def failure(self, error: ApiError) -> bytes:
        """The last events where they do not."""


class Choices:
    """OpenAI's older form: a list of choices, written by a shape."""

    def __init__(self, shape: Shape, kind: str, prefix: str, identity: Identity, call: Call) -> None:
        self.name = f"{prefix}-{secrets.token_hex(12)}"
        self._shape, self._kind, self._identity, self._call = shape, kind, identity, call
        self._created, self._options = int(time.time()), call.body.stream_options

    def whole(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        choices = {"choices": [self._shape.whole(answer) for answer in answers]}
        return self._head(self._kind) | choices | self._figures(answers)

    def opening(self) -> bytes:
        return b""

    def chunk(self, answer: Answer, step: Step, answers: Sequence[Answer]) -> bytes:
        options = self._options
        chunk: dict[str, Any] = self._chunk_head() | {"choices": [self._shape.chunk(answer, step)]}
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = usage(self._call, answers)
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        if options is not None and options.draftwing:
            chunk["draftwing"] = step.drafted
        return event(chunk)

    def closing(self, answers: Sequence[Answer]) -> bytes:
        if self._options is None or not self._options.include_usage:
            return DONE
        return event(self._chunk_head() | {"choices": []} | self._figures(answers)) + DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    def _figures(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {"usage": usage(self._call, answers), "metrics": metrics(answers)}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head(self._kind + ".chunk" * self._kind.startswith("chat"))

    def _head(self, kind: str) -> dict[str, Any]:
        identity = self._identity
        return {**envelope(self.name, kind, self._created, identity.name, identity.fingerprint, self._call.seed)}


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
