"""From a body to an answer: a call for the scheduler, and what its cycles bring, whole or in chunks.

This side knows no tensors; the scheduler knows no HTTP.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from draftwing.serving.answers import Answer, usage
from draftwing.serving.conversations import ChatRequest
from draftwing.serving.errors import ApiError, as_api_error
from draftwing.serving.intake import Call, Intake
from draftwing.serving.metrics import ServerMetrics
from draftwing.serving.response_schema import ResponseRequest
from draftwing.serving.responses import ResponseOutlet
from draftwing.serving.scheduler import Busy, Delivery, Draining, Scheduler
from draftwing.serving.schema import CompletionRequest, FieldError
from draftwing.serving.streams import Chats, Completions, Identity, Outlet
from draftwing.serving.submission import Gone, Submission
from draftwing.serving.token_texts import TokenTexts

logger = logging.getLogger(__name__)

Given = CompletionRequest | ChatRequest | ResponseRequest
Written = TypeVar("Written")
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Server:
    """Answers for one model and its scheduler."""

    def __init__(self, scheduler: Scheduler, intake: Intake, identity: Identity) -> None:
        self.scheduler, self.intake, self.identity = scheduler, intake, identity
        self.metrics = ServerMetrics(scheduler, identity.name)
        self.texts = TokenTexts(intake.tokenizer)
        self._reader = ThreadPoolExecutor(1, "draftwing-tokenizer")  # long prompts must not keep others' streams

    async def read(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Tokenise, or name tokens, beside the event loop, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, call, *arguments)

    def check_model(self, name: str | None) -> None:
        """Raise an ApiError for another model than the one that is served."""
        if name is not None and name not in (self.identity.name, self.identity.root):
            raise ApiError(404, f"model: {name:.100} is not served here", "model", "model_not_found")

    async def answer(self, body: Given, request: Request) -> Response:
        """Answer what a body asks for, in the form of its route."""
        self.check_model(body.model)
        call: Call = await self.read(self._call, body)
        try:
            submission = Submission(self.scheduler, call, request.receive)
        except Busy as error:
            self.metrics.count([], "refused")
            raise ApiError(429, str(error)) from None
        except Draining as error:
            raise ApiError(503, str(error)) from None
        work = _Work(self, call, submission, self._outlet(call), request)
        if body.stream:
            return StreamingResponse(work.stream(), media_type="text/event-stream", headers=UNBUFFERED)
        return await work.whole()

    def _outlet(self, call: Call) -> Outlet:
        match call.body:
            case CompletionRequest():
                return Completions(self.texts, self.identity, call)
            case ChatRequest():
                return Chats(self.texts, self.identity, call)
        return ResponseOutlet(self.identity, call)

    def _call(self, body: Given) -> Call:
        """What a body asks for, checked by all who have to do with it."""
        try:
            call = self.intake.read(body)
            for checked in call.requests[:: body.num_choices]:
                self.scheduler.check(checked)
            return call
        except FieldError:
            raise
        except ValueError as error:  # the engine's: it begins with the field's name
            name, _, problem = str(error).partition(": ")
            names = {"max_new_tokens": body.limit_field, "input_ids": body.PROMPT}
            raise FieldError(names.get(name, name), problem) from None


class _Work:
    """One call being worked at."""

    def __init__(self, server: Server, call: Call, submission: Submission, outlet: Outlet, request: Request) -> None:
        self._server, self._call, self._submission, self._outlet = server, call, submission, outlet
        self._facts: dict[str, Any] = request.state.facts
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
        except ApiError:
            raise
        except Exception:
            self._end = "error"
            raise
        finally:
            self._settle()
        return JSONResponse(await self._write(partial(self._outlet.whole, self._answers)))

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as events: a chunk for each cycle."""
        try:
            yield self._outlet.opening()
            async for index, delivery in self._submission.deliveries():
                self._check(delivery)
                yield await self._write(partial(self._chunk, index, delivery))
            yield self._outlet.closing(self._answers)
        except ApiError as error:
            yield self._outlet.failure(error)
        except Gone:
            return
        except Exception as error:  # a stream that has begun has no status to say it with, and must not just stop
            logger.exception("an answer could not be written")
            self._end = "error"
            yield self._outlet.failure(as_api_error(error))
        finally:
            self._settle()

    async def _write(self, write: Callable[[], Written]) -> Written:
        """Write something; beside the event loop where tokens must be named, which for a prompt's takes long."""
        if self._call.body.num_top is None:
            return write()
        written: Written = await self._server.read(write)
        return written

    def _chunk(self, index: int, delivery: Delivery) -> bytes:
        """What a cycle brought one answer."""
        answer = self._answers[index]
        return self._outlet.chunk(answer, answer.take(delivery), self._answers)

    def _check(self, delivery: Delivery) -> None:
        """Raise an ApiError for an answer that failed or was ended by the server."""
        if delivery.finish_reason == "error":
            self._end = "error"
            raise ApiError(400 if delivery.is_callers else 500, delivery.error or "the request has failed")
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
            "id": self._outlet.name,
            "prompt_tokens": figures["prompt_tokens"],
            "new_tokens": figures["completion_tokens"],
            "accepted_tokens": figures["completion_tokens_details"]["accepted_prediction_tokens"],
            "end": self._end,
        }
