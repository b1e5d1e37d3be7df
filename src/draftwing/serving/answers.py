"""An answer while cycles bring it, and what clients are told: the parts of OpenAI's completions and chats.

These are TypedDicts: a server's documentation is made of them, and nothing is validated while answers are sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic wants these before Python 3.12

from draftwing.engine.logprobs import TokenLogprobs
from draftwing.engine.statistics import CycleCounts
from draftwing.serving.intake import Call
from draftwing.serving.scheduler import Delivery, Ticket
from draftwing.serving.text import AnswerText, Piece
from draftwing.serving.token_texts import Offsets
from draftwing.serving.tools import CallReader, ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]
FINISH_REASONS: dict[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}
"""The API's word for why an answer ended; others are errors."""
Chances = list[tuple[int, TokenLogprobs | None]]
"""Tokens, each with its log-probability and those of the likeliest ones; a prompt's first token has none."""


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


@dataclass(frozen=True)
class Step:
    """What a cycle brought an answer: text, log-probabilities by token."""

    text: str
    logprobs: Chances
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
    logprobs: Chances = field(default_factory=list)
    num_tokens: int = 0
    num_accepted: int = 0
    has_begun: bool = False
    finish_reason: FinishReason | None = None

    def take(self, delivery: Delivery) -> Step:
        """Read what a cycle brought."""
        is_first = not self.has_begun
        self.has_begun = True
        pieces, logprobs = list[Piece](), Chances()
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
        return Step(text, logprobs, is_first, drafted)

    @property
    def counts(self) -> CycleCounts:
        """What its cycles brought, and drafted for it."""
        seat = self.ticket.seat
        return CycleCounts() if seat is None or self.call.only_echoes else seat.counts  # an echo decodes a hidden token

    def _of_prompt(self) -> Chances:
        seat = self.ticket.seat
        assert seat is not None
        return list(zip(self.ticket.request.prompt, seat.prompt_logprobs, strict=True))


def usage(call: Call, answers: Sequence[Answer]) -> Usage:
    """Tokens of all answers so far; a prompt of several answers counts once."""
    made = sum(answer.num_tokens for answer in answers)
    firsts = [answer.ticket.seat for answer in answers[:: call.body.num_choices]]
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
