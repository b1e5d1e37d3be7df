"""How completions and chats go out: as one body, or as events, a chunk for each cycle."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from draftwing.engine.logprobs import TokenLogprobs
from draftwing.engine.stopping import NO_CHARACTER
from draftwing.serving.answers import (
    Answer,
    Chances,
    ChatChoice,
    ChatLogprobs,
    ChosenToken,
    CompletionChoice,
    CompletionLogprobs,
    Said,
    Step,
    TokenChance,
    metrics,
    usage,
)
from draftwing.serving.errors import ApiError
from draftwing.serving.intake import Call
from draftwing.serving.schema import StreamOptions
from draftwing.serving.token_texts import TokenTexts

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


class Choices(ABC):
    """OpenAI's older form: a list of choices. Its objects are of a `KIND`, chunks of a `CHUNK_KIND`."""

    KIND: ClassVar[str]
    CHUNK_KIND: ClassVar[str]
    PREFIX: ClassVar[str]

    def __init__(self, texts: TokenTexts, identity: Identity, call: Call) -> None:
        self.name = f"{self.PREFIX}-{secrets.token_hex(12)}"
        self._texts, self._identity, self._call = texts, identity, call
        self._created, self._options = int(time.time()), call.body.stream_options or StreamOptions()
        self._by_id = bool(call.body.return_tokens_as_token_ids)

    @abstractmethod
    def _choice(self, answer: Answer) -> Mapping[str, Any]:
        """An answer that has ended."""

    @abstractmethod
    def _part(self, answer: Answer, step: Step) -> Mapping[str, Any]:
        """What a cycle brought an answer."""

    def whole(self, answers: Sequence[Answer]) -> Mapping[str, Any]:
        choices = {"choices": [self._choice(answer) for answer in answers]}
        return self._head(self.KIND) | choices | self._figures(answers)

    def opening(self) -> bytes:
        return b""

    def chunk(self, answer: Answer, step: Step, answers: Sequence[Answer]) -> bytes:
        chunk = self._head(self.CHUNK_KIND) | {"choices": [self._part(answer, step)]}
        if self._options.continuous_usage_stats:
            chunk["usage"] = usage(self._call, answers)
        elif self._options.include_usage:
            chunk["usage"] = None
        if self._options.draftwing:
            chunk["draftwing"] = step.drafted
        return event(chunk)

    def closing(self, answers: Sequence[Answer]) -> bytes:
        if not self._options.include_usage:
            return DONE
        return event(self._head(self.CHUNK_KIND) | {"choices": []} | self._figures(answers)) + DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    def _figures(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {"usage": usage(self._call, answers), "metrics": metrics(answers)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": kind,
            "created": self._created,
            "model": self._identity.name,
            "system_fingerprint": self._identity.fingerprint,
            "seed": self._call.seed,
        }


class Completions(Choices):
    """POST /v1/completions."""

    KIND = CHUNK_KIND = "text_completion"
    PREFIX = "cmpl"

    def _choice(self, answer: Answer) -> CompletionChoice:
        return self._written(answer, answer.text, answer.logprobs)

    def _part(self, answer: Answer, step: Step) -> CompletionChoice:
        return self._written(answer, step.text, step.logprobs)

    def _written(self, answer: Answer, text: str, chances: Chances) -> CompletionChoice:
        logprobs = None if self._call.body.num_top is None else self._logprobs(answer, chances)
        return {"index": answer.index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _logprobs(self, answer: Answer, scored: Chances) -> CompletionLogprobs:
        written = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, chances in scored:
            written["tokens"].append(name_of(token, self._texts, self._by_id))
            written["token_logprobs"].append(None if chances is None else finite(chances.logprob))
            top = None if chances is None else likeliest(token, chances, self._texts, self._by_id)
            written["top_logprobs"].append(top)
            written["text_offset"].append(answer.offsets.next(token))
        return written


def name_of(token: int, texts: TokenTexts, by_id: bool) -> str:
    """A token's text; OpenAI's `bytes:` where it is no whole character; vLLM's `token_id:` where that is asked."""
    if by_id:
        return f"token_id:{token}"
    text = texts.text(token)
    data = texts.bytes(token) if NO_CHARACTER in text else None
    return text if data is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def likeliest(chosen: int, chances: TokenLogprobs, texts: TokenTexts, by_id: bool) -> dict[str, float]:
    """The most probable tokens and the chosen one by name; another that has its name too is named by its id."""
    logprobs = dict(chances.top)
    logprobs.setdefault(chosen, chances.logprob)
    names = {chosen: name_of(chosen, texts, by_id)}
    for token in logprobs:
        name = name_of(token, texts, by_id)
        names.setdefault(token, f"token_id:{token}" if name in names.values() else name)
    return {names[token]: finite(logprob) for token, logprob in logprobs.items()}


class Chats(Choices):
    """POST /v1/chat/completions. The role goes out with the first token."""

    KIND, CHUNK_KIND, PREFIX = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _choice(self, answer: Answer) -> ChatChoice:
        said = Said(role="assistant", content=answer.text)
        if answer.calls:
            said |= Said(content=answer.text or None, tool_calls=answer.calls)
        logprobs = self._logprobs(answer.logprobs)
        return {"index": answer.index, "message": said, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _part(self, answer: Answer, step: Step) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant"} if step.is_first else {}
        said["content"] = step.text
        if answer.calls:
            said["tool_calls"] = [{"index": index} | call for index, call in enumerate(answer.calls)]
        logprobs = self._logprobs(step.logprobs)
        return {"index": answer.index, "delta": said, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _logprobs(self, scored: Chances) -> ChatLogprobs | None:
        if self._call.body.num_top is None:
            return None
        return {"content": [self._chosen(token, chances) for token, chances in scored if chances is not None]}

    def _chosen(self, token: int, chances: TokenLogprobs) -> ChosenToken:
        top = [self._chance(*chance) for chance in chances.top]
        return ChosenToken(**self._chance(token, chances.logprob), top_logprobs=top)

    def _chance(self, token: int, logprob: float) -> TokenChance:
        text = f"token_id:{token}" if self._by_id else self._texts.text(token)
        return {"token": text, "logprob": finite(logprob), "bytes": self._texts.bytes(token)}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold; that of what cannot be is -9999, as vLLM writes it."""
    return max(logprob, -9999.0)


def event(data: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
