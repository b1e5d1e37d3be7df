"""What clients are answered: OpenAI's completions and chats, whole or in chunks, made of what cycles bring.

Shapes are TypedDicts: a server's documentation is made of them, and nothing is validated while answers are sent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import (
    Any,
    Literal,
    NotRequired,  # pydantic wants these before Python 3.12
    Protocol,
)

from typing_extensions import TypedDict

from draftwing.engine.logprobs import TokenLogprobs
from draftwing.engine.statistics import CycleCounts
from draftwing.engine.stopping import NO_CHARACTER
from draftwing.serving.intake import Call
from draftwing.serving.scheduler import Delivery, Ticket
from draftwing.serving.text import AnswerText, Piece
from draftwing.serving.token_texts import Offsets, TokenTexts
from draftwing.serving.tools import CallReader, ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]
FINISH_REASONS: dict[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}
"""The API's word for why an answer ended; others are errors."""


class CachedTokens(TypedDict):
    cached_tokens: int


class PredictedTokens(TypedDict):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    """Tokens: read, made, and how many of these were drafted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: PredictedTokens


class Speculation(TypedDict):
    """What drafting brought, as vLLM's field: `acceptance_histogram[j]` cycles accepted j draft tokens."""

    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    acceptance_histogram: list[int]
    mean_acceptance_length: float
    """Tokens of a cycle, its own one among them."""
    draft_acceptance_rate: float


class Metrics(TypedDict):
    speculative_decoding: Speculation


class TokenChance(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(TokenChance):
    top_logprobs: list[TokenChance]


class ChatLogprobs(TypedDict):
    content: list[ChosenToken]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Said(TypedDict):
    role: NotRequired[str]
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCall]]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class ChatChoice(TypedDict):
    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class Drafted(TypedDict):
    """Of a chunk: its text in pieces, each with whether it was drafted, and tokens of its cycle."""

    pieces: list[tuple[str, bool]]
    num_tokens: int
    num_accepted: int


class Envelope(TypedDict):
    """What all answers and chunks have."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    seed: int
    usage: NotRequired[Usage | None]
    metrics: NotRequired[Metrics]
    draftwing: NotRequired[Drafted]


class Completion(Envelope):
    choices: list[CompletionChoice]


class ChatCompletion(Envelope):
    choices: list[ChatChoice]


class Shape(Protocol):
    """How an endpoint writes what came."""

    def whole(self, answer: "Answer") -> Mapping[str, Any]:
        """A choice of an answer that has ended."""

    def chunk(self, answer: "Answer", step: "Step") -> Mapping[str, Any]:
        """A choice of a stream's chunk."""


@dataclass(frozen=True)
class Step:
    """What a cycle brought an answer: text, log-probabilities by token, the end."""

    text: str
    calls: list[ToolCall]
    logprobs: list[tuple[int, TokenLogprobs | None]]
    finish_reason: FinishReason | None
    is_first: bool
    drafted: Drafted


@dataclass
class Answer:
    """One answer while it comes, and what it has so far."""

    call: Call
    index: int
    ticket: Ticket
    decoder: AnswerText
    offsets: Offsets
    """Where the tokens whose log-probabilities are written stand."""
    reader: CallReader | None = None
    """Takes calls out of the text."""
    calls: list[ToolCall] = field(default_factory=list)
    text: str = ""
    logprobs: list[tuple[int, TokenLogprobs | None]] = field(default_factory=list)
    num_tokens: int = 0
    num_accepted: int = 0
    has_begun: bool = False
    finish_reason: FinishReason | None = None

    def take(self, delivery: Delivery) -> Step:
        """Read what a cycle brought."""
        is_first = not self.has_begun
        self.has_begun = True
        pieces, logprobs = list[Piece](), list[tuple[int, TokenLogprobs | None]]()
        if is_first and (said := self.call.echo(self.index)):
            pieces.append(Piece(said, False))
        if is_first and self.call.scores_prompt:
            logprobs += self._of_prompt()
        logprobs += zip(delivery.tokens, delivery.logprobs, strict=False)
        if self.call.only_echoes:
            logprobs = logprobs[: len(self.call.prompt(self.index))]
        else:
            pieces += self.decoder.push(delivery.tokens, delivery.num_accepted, delivery.finish_reason)
            self.num_tokens += len(delivery.tokens)
            self.num_accepted += delivery.num_accepted
        self.finish_reason = FINISH_REASONS.get(delivery.finish_reason or "")
        if self.finish_reason and self.call.only_echoes:
            self.finish_reason = "length"  # of no token at all
        drafted = Drafted(pieces=list(pieces), num_tokens=len(delivery.tokens), num_accepted=delivery.num_accepted)
        text = "".join(piece.text for piece in pieces)
        if self.reader is not None:
            text, self.calls = self.reader.push(text, self.finish_reason is not None)
            if self.calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        self.text += text
        self.logprobs += logprobs
        return Step(text, self.calls, logprobs, self.finish_reason, is_first, drafted)

    @property
    def counts(self) -> CycleCounts:
        """What its cycles brought, and drafted for it."""
        seat = self.ticket.seat
        return CycleCounts() if seat is None or self.call.only_echoes else seat.counts  # an echo decodes a hidden token

    def _of_prompt(self) -> list[tuple[int, TokenLogprobs | None]]:
        seat = self.ticket.seat
        assert seat is not None
        return list(zip(self.ticket.request.prompt, seat.prompt_logprobs, strict=True))


class CompletionShape:
    """POST /v1/completions."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def whole(self, answer: Answer) -> CompletionChoice:
        return self._choice(answer, answer.text, answer.logprobs)

    def chunk(self, answer: Answer, step: Step) -> CompletionChoice:
        return self._choice(answer, step.text, step.logprobs)

    def _choice(
        self, answer: Answer, text: str, logprobs: Sequence[tuple[int, TokenLogprobs | None]]
    ) -> CompletionChoice:
        written = None if answer.call.num_top is None else self._logprobs(answer, logprobs)
        return {"index": answer.index, "text": text, "logprobs": written, "finish_reason": answer.finish_reason}

    def _logprobs(self, answer: Answer, logprobs: Sequence[tuple[int, TokenLogprobs | None]]) -> CompletionLogprobs:
        written = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, chances in logprobs:
            by_id = bool(answer.call.body.return_tokens_as_token_ids)
            written["tokens"].append(self._name(token, by_id))
            written["token_logprobs"].append(None if chances is None else finite(chances.logprob))
            written["top_logprobs"].append(None if chances is None else self._top(token, chances, by_id))
            written["text_offset"].append(answer.offsets.next(token))
        return written

    def _name(self, token: int, by_id: bool) -> str:
        """A token's text; OpenAI's `bytes:` where it is no whole character; vLLM's `token_id:` where that is asked."""
        if by_id:
            return f"token_id:{token}"
        text = self._texts.text(token)
        data = self._texts.bytes(token) if NO_CHARACTER in text else None
        return text if data is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _top(self, chosen: int, chances: TokenLogprobs, by_id: bool) -> dict[str, float]:
        """The most probable tokens and the chosen one by name; another that has its name too is named by its id."""
        likeliest = dict(chances.top)
        likeliest.setdefault(chosen, chances.logprob)
        names = {chosen: self._name(chosen, by_id)}
        for token in likeliest:
            name = self._name(token, by_id)
            names.setdefault(token, f"token_id:{token}" if name in names.values() else name)
        return {names[token]: finite(logprob) for token, logprob in likeliest.items()}


class ChatShape:
    """POST /v1/chat/completions. The role goes out with the first token."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def whole(self, answer: Answer) -> ChatChoice:
        said = Said(role="assistant", content=answer.text)
        if answer.calls:
            said |= Said(content=answer.text or None, tool_calls=answer.calls)
        return ChatChoice(
            index=answer.index,
            message=said,
            logprobs=self._logprobs(answer, answer.logprobs),
            finish_reason=answer.finish_reason,
        )

    def chunk(self, answer: Answer, step: Step) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant"} if step.is_first else {}
        said["content"] = step.text
        if step.calls:
            said["tool_calls"] = [{"index": index} | call for index, call in enumerate(step.calls)]
        logprobs = self._logprobs(answer, step.logprobs)
        return {"index": answer.index, "delta": said, "logprobs": logprobs, "finish_reason": step.finish_reason}

    def _logprobs(self, answer: Answer, logprobs: Sequence[tuple[int, TokenLogprobs | None]]) -> ChatLogprobs | None:
        if answer.call.num_top is None:
            return None
        by_id = bool(answer.call.body.return_tokens_as_token_ids)
        return {"content": [self._chosen(token, chances, by_id) for token, chances in logprobs if chances is not None]}

    def _chosen(self, token: int, chances: TokenLogprobs, by_id: bool) -> ChosenToken:
        top = [self._chance(*chance, by_id) for chance in chances.top]
        return ChosenToken(**self._chance(token, chances.logprob, by_id), top_logprobs=top)

    def _chance(self, token: int, logprob: float, by_id: bool) -> TokenChance:
        text = f"token_id:{token}" if by_id else self._texts.text(token)
        return {"token": text, "logprob": finite(logprob), "bytes": self._texts.bytes(token)}


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold; that of what cannot be is -9999, as vLLM writes it."""
    return max(logprob, -9999.0)


def envelope(name: str, kind: str, created: int, model: str, fingerprint: str, seed: int) -> Envelope:
    """The fields in front of the choices."""
    return {
        "id": name,
        "object": kind,
        "created": created,
        "model": model,
        "system_fingerprint": fingerprint,
        "seed": seed,
    }


def usage(call: Call, answers: Sequence[Answer]) -> Usage:
    """Tokens of all answers so far; a prompt of several answers counts once."""
    made = sum(answer.num_tokens for answer in answers)
    firsts = [answer.ticket.seat for answer in answers[:: call.num_choices]]
    accepted = sum(answer.num_accepted for answer in answers)  # of what was delivered; the engine may be ahead
    return {
        "prompt_tokens": call.num_prompt_tokens,
        "completion_tokens": made,
        "total_tokens": call.num_prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": sum(seat.num_shared for seat in firsts if seat is not None)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": max(0, sum(answer.counts.num_drafted for answer in answers) - accepted),
        },
    }


def metrics(answers: Sequence[Answer]) -> Metrics:
    """What drafting brought all answers together."""
    histogram = [sum(counts) for counts in zip_longest(*(answer.counts.histogram for answer in answers), fillvalue=0)]
    num_steps, num_drafted, num_accepted = (
        sum(histogram),
        sum(answer.counts.num_drafted for answer in answers),
        sum(answer.counts.num_accepted for answer in answers),
    )
    return {
        "speculative_decoding": {
            "num_spec_steps": num_steps,
            "num_draft_tokens": num_drafted,
            "num_accepted_draft_tokens": num_accepted,
            "acceptance_histogram": histogram,
            "mean_acceptance_length": 1 + num_accepted / max(1, num_steps),
            "draft_acceptance_rate": num_accepted / max(1, num_drafted),
        }
    }
