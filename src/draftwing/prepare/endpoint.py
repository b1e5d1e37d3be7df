"""Answers from an OpenAI-compatible server (chat completions): several requests in flight, retried with back-off."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from draftwing.ask import NoAnswer, ask
from draftwing.config import SelfGeneratedStage
from draftwing.data.corpus import Row
from draftwing.data.in_order import map_in_order
from draftwing.data.messages import Message, read_message
from draftwing.prepare.self_generated import Question

REFUSED = (400, 413, 422)
"""The server will never answer this request; another one it may."""
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
ANSWER_FIELDS = ("role", "content", "reasoning_content", "tool_calls")
MAX_TRIES = 6
TIMEOUT_S = 600.0


class RefusedRequest(Exception):
    """The server refuses this one request, or answers it in a form that cannot be read."""


class Endpoint:
    """A server's chat completions. The key, if it wants one, is read from OPENAI_API_KEY."""

    def __init__(self, url: str, model: str, first_wait_s: float = 1.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint: expected a URL such as http://localhost:8000/v1, got {url!r}")
        self.url = url if url.endswith("/chat/completions") else url.rstrip("/") + "/chat/completions"
        self.model, self._first_wait_s = model, first_wait_s
        self._stopped = threading.Event()
        self._reason = "stopped"

    def stop(self, reason: str = "stopped") -> ValueError:
        """Let waiting requests give up and refuse further ones; returns the error that says why."""
        if not self._stopped.is_set():
            self._reason = reason
            self._stopped.set()
        return ValueError(f"endpoint: {self.url}: {self._reason}")

    def complete(self, messages: Sequence[Message], **options: Any) -> dict[str, Any]:
        """The server's choice: a `message` and why it ended.

        Raises:
            RefusedRequest: it refuses this request.
            ValueError: it cannot be reached, refuses all requests, or still fails after several tries.
        """
        body = {"model": self.model, "messages": list(messages), **options}
        wait_s, problem = self._first_wait_s, ""
        for attempt in range(MAX_TRIES):
            if attempt:
                self._stopped.wait(wait_s)
                wait_s *= 2
            if self._stopped.is_set():
                raise self.stop()
            try:
                return self._post(body)
            except NoAnswer as error:
                problem = str(error)
                if error.status in REFUSED:
                    raise RefusedRequest(problem) from None
                if error.status not in (None, *PASSING):
                    raise self.stop(problem) from None
                wait_s = max(wait_s, _seconds(error.retry_after))
        raise self.stop(f"no answer in {MAX_TRIES} tries ({problem}); run the same command to go on")

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        key = os.environ.get("OPENAI_API_KEY")
        answer = ask(self.url, body, TIMEOUT_S, {"Authorization": f"Bearer {key}"} if key else None)
        try:
            choice: dict[str, Any] = json.loads(answer)["choices"][0]
            dict(choice["message"])
        except (ValueError, KeyError, IndexError, TypeError):
            raise self.stop(f"this is no chat completion: {answer[:200]!r}") from None
        return choice


class EndpointAnswers:
    """Answers by a server: rows of `messages` and `tools`; the last answer may be `truncated`.

    Texts, not tokens: what the server wrote is tokenised again where the rows are read.
    """

    def __init__(self, config: SelfGeneratedStage, endpoint: Endpoint, concurrency: int) -> None:
        self._config, self._endpoint, self._concurrency = config, endpoint, concurrency

    def __call__(self, prompts: Sequence[Question]) -> Iterator[Row]:
        executor = ThreadPoolExecutor(self._concurrency)
        try:
            yield from map_in_order(executor, self._answer, prompts, ahead=4 * self._concurrency)
        finally:
            self._endpoint.stop()
            executor.shutdown(wait=False, cancel_futures=True)

    def _answer(self, prompt: Question) -> Row:
        """Answer a conversation's turns one after another."""
        if not prompt.messages:
            return {"error": "a chat endpoint cannot continue a text", "held_out": prompt.held_out}
        said = list[Message]()
        tools: Row = {"tools": list(prompt.tools)} if prompt.tools else {}
        answered: Row = {"error": "not answered", "held_out": prompt.held_out}
        for message in prompt.messages:
            if message["role"] != "assistant":
                said.append(message)
                continue
            try:
                choice = self._endpoint.complete(said, **self._options(prompt), **tools)
                said.append(_read_answer(choice["message"]))
            except RefusedRequest as refusal:
                return answered if "messages" in answered else answered | {"error": str(refusal)}
            truncated = choice.get("finish_reason") == "length"
            answered = tools | {"messages": list(said), "held_out": prompt.held_out, "truncated": truncated}
            if truncated or "tool_calls" in said[-1]:  # nobody runs the tools
                break
        return answered

    def _options(self, prompt: Question) -> dict[str, Any]:
        """How the answers to a prompt are sampled."""
        config = self._config
        return {
            "temperature": config.temperatures[prompt.number % len(config.temperatures)],
            "max_tokens": config.max_new_tokens or config.sequence_length // 2,
            "seed": config.seed + prompt.number,
        }


def _read_answer(answer: Message) -> Message:
    """The parts of a server's message that a chat template reads; an answer may be empty."""
    try:
        read = read_message(answer | {"role": "assistant", "content": answer.get("content") or ""}, "the answer")
    except ValueError as error:
        raise RefusedRequest(str(error)) from None
    return {name: read[name] for name in ANSWER_FIELDS if name in read}


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header in seconds; dates are not read."""
    try:
        return float(retry_after or 0)
    except ValueError:
        return 0.0
