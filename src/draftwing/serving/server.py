"""From a body to an answer: a call for the scheduler, and what its cycles bring, whole or in chunks.

This side knows no tensors; the scheduler knows no HTTP.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from draftwing.serving.answers import (
    DONE,
    Answer,
    ChatShape,
    CompletionShape,
    Envelope,
    Shape,
    envelope,
    event,
    metrics,
    usage,
)
from draftwing.serving.errors import ApiError
from draftwing.serving.intake import Call, Intake
from draftwing.serving.metrics import ServerMetrics
from draftwing.serving.scheduler import Busy, Delivery, Draining, Scheduler
from draftwing.serving.schema import ChatRequest, CompletionRequest, FieldError, GenerationRequest
from draftwing.serving.submission import Gone, Submission
from draftwing.serving.token_texts import TokenTexts

Given = TypeVar("Given", bound=GenerationRequest)
Written = TypeVar("Written")
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
FIELDS = {"max_new_tokens": "max_tokens", "input_ids": "prompt"}
"""The API's names of fields that the engine calls otherwise."""


@dataclass(frozen=True)
class Identity:
    """What a server calls itself: the model's `name`, and a `root` by which clients find its tokenizer."""

    name: str
    root: str
    fingerprint: str


class Server:
    """Answers for one model and its scheduler."""

    def __init__(self, scheduler: Scheduler, intake: Intake, identity: Identity) -> None:
        self.scheduler, self.intake, self.identity = scheduler, intake, identity
        self.metrics = ServerMetrics(scheduler, intake.limits.num_seats, identity.name)
        self.texts = TokenTexts(intake.tokenizer)
        self.shapes: dict[str, Shape] = {
            "text_completion": CompletionShape(self.texts),
            "chat.completion": ChatShape(self.texts),
        }
        self._reader = ThreadPoolExecutor(1, "draftwing-tokenizer")  # long prompts must not keep others' streams

    async def read(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Tokenise, or name tokens, beside the event loop, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, call, *arguments)

    def check_model(self, name: str | None) -> None:
        """Raise an ApiError for another model than the one that is served."""
        if name is not None and name not in (self.identity.name, self.identity.root):
            raise ApiError(404, f"model: {name:.100} is not served here", "model", "model_not_found")

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Answer a completion."""
        return await self._answer(body, self.intake.completion, "text_completion", request)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await self._answer(body, self.intake.chat, "chat.completion", request)

    async def _answer(self, body: Given, read: Callable[[Given], Call], kind: str, request: Request) -> Response:
        self.check_model(body.model)
        call: Call = await self.read(self._call, body, read)
        try:
            submission = Submission(self.scheduler, call, request.receive)
        except Busy as error:
            self.metrics.count([], "refused")
            raise ApiError(429, str(error)) from None
        except Draining as error:
            raise ApiError(503, str(error)) from None
        work = _Work(self, call, submission, kind, request)
        if body.stream:
            return StreamingResponse(work.stream(), media_type="text/event-stream", headers=UNBUFFERED)
        return await work.whole()

    def _call(self, body: Given, read: Callable[[Given], Call]) -> Call:
        """What a body asks for, checked by all who have to do with it."""
        try:
            call = read(body)
            for checked in call.requests[:: call.num_choices]:
                self.scheduler.check(checked)
            return call
        except FieldError:
            raise
        except ValueError as error:  # the engine's: it begins with the field's name
            field, _, problem = str(error).partition(": ")
            field = FIELDS.get(field, field)
            raise ApiError(400, f"{field}: {problem}", field) from None


class _Work:
    """One call being worked at."""

    def __init__(self, server: Server, call: Call, submission: Submission, kind: str, request: Request) -> None:
        self._server, self._call, self._submission = server, call, submission
        self._kind, self._shape = kind, server.shapes[kind]
        self._facts: dict[str, Any] = request.state.facts
        self._name = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{secrets.token_hex(12)}"
        self._answers = [
            Answer(
                call,
                index,
                ticket,
                server.intake.answer_text(call),
                server.intake.offsets(call, index),
                None if call.tools is None else call.tools.reader(),
            )
            for index, ticket in enumerate(submission.tickets)
        ]
        self._end = "cancelled"  # unless it comes to another one

    async def whole(self) -> Response:
        """The answer as one body."""
        try:
            async for index, delivery in self._submission.deliveries():
                self._check(delivery)
                self._answers[index].take(delivery)
        except Gone:
            return Response(status_code=499)
        finally:
            self._settle()
        choices = await self._write(lambda: [self._shape.whole(answer) for answer in self._answers])
        figures = {"usage": usage(self._call, self._answers), "metrics": metrics(self._answers)}
        return JSONResponse(self._head(self._kind) | {"choices": choices} | figures)

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as events: a chunk for each cycle."""
        head = self._head(self._kind + ".chunk" * self._kind.startswith("chat"))
        options = self._call.body.stream_options
        has_usage = options is not None and bool(options.include_usage)
        try:
            async for index, delivery in self._submission.deliveries():
                self._check(delivery)
                yield await self._write(partial(self._event, head, index, delivery))
            if has_usage:
                figures = {"usage": usage(self._call, self._answers), "metrics": metrics(self._answers)}
                yield event(head | {"choices": []} | figures)
        except ApiError as error:
            yield event(error.body())
        except Gone:
            return
        finally:
            self._settle()
        yield DONE

    async def _write(self, write: Callable[[], Written]) -> Written:
        """Write something; beside the event loop where tokens must be named, which for a prompt's takes long."""
        if self._call.num_top is None:
            return write()
        written: Written = await self._server.read(write)
        return written

    def _event(self, head: Envelope, index: int, delivery: Delivery) -> bytes:
        """A chunk: what a cycle brought one answer."""
        answer, options = self._answers[index], self._call.body.stream_options
        step = answer.take(delivery)
        chunk: dict[str, Any] = head | {"choices": [self._shape.chunk(answer, step)]}
        if options is not None and options.continuous_usage_stats:
            chunk["usage"] = usage(self._call, self._answers)
        elif options is not None and options.include_usage:
            chunk["usage"] = None
        if options is not None and options.draftwing:
            chunk["draftwing"] = step.drafted
        return event(chunk)

    def _check(self, delivery: Delivery) -> None:
        """Raise an ApiError for an answer that failed or was ended by the server."""
        if delivery.finish_reason == "error":
            self._end = "error"
            raise ApiError(500, delivery.error or "the request has failed")
        if delivery.finish_reason == "cancelled":
            raise ApiError(503, "the server is shutting down")

    def _settle(self) -> None:
        """Count and log what was done, however it ended."""
        if all(answer.finish_reason for answer in self._answers):
            ends = {answer.finish_reason for answer in self._answers}
            self._end = "length" if "length" in ends else "stop"
        self._submission.close()
        figures = usage(self._call, self._answers)
        self._server.metrics.count(self._answers, self._end)
        self._facts |= {
            "id": self._name,
            "prompt_tokens": figures["prompt_tokens"],
            "new_tokens": figures["completion_tokens"],
            "accepted_tokens": figures["completion_tokens_details"]["accepted_prediction_tokens"],
            "end": self._end,
        }

    def _head(self, kind: str) -> Envelope:
        identity = self._server.identity
        return envelope(self._name, kind, identity.name, identity.fingerprint, self._call.seed)
