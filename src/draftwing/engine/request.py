"""What an engine is asked for, and what it has brought: requests, their seats, events."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from draftwing.engine.grammar import Allowed, Grammar
from draftwing.engine.logprobs import MOST_TOP, TokenLogprobs
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.statistics import CycleCounts
from draftwing.engine.stopping import StopRule
from draftwing.target.model import TargetModel


@dataclass(frozen=True)
class Request:
    """One row to generate: its prompt's token ids, its sampling parameters and when to stop.

    Attributes:
        num_logprobs: how many of the most probable tokens, 0 to 20, are scored beside each new one; None: nothing is.
        scores_prompt: whether the prompt's tokens are scored as well.
        allowed: which tokens may follow those generated so far; asked for each node of a tree (see grammar.py).
        drafts: whether drafts are wanted for it. A cycle whose rows all want none is plain decoding; beside one that
            wants them all rows are drafted for, which changes none of their tokens.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    stop: StopRule
    num_logprobs: int | None = None
    scores_prompt: bool = False
    allowed: Allowed | None = None
    drafts: bool = True

    @property
    def most_tokens(self) -> int:
        """Tokens of its text at most, prompt and new ones."""
        return len(self.prompt) + self.stop.max_new_tokens


@dataclass(eq=False)
class Seat:
    """A request in an engine, and what it has emitted so far.

    Attributes:
        index: where its state lies; it changes when a seat before it is left.
        finish_reason: eos, stop or length once it has ended; error if its own stop rule failed.
        num_shared: tokens of the prompt that were copied from another seat, or found in a kept one.
        counts: of its cycles, and of what was drafted and accepted.
        logprobs: of the tokens, where the request asks for them.
        prompt_logprobs: of the prompt's tokens read so far, None for its first, where the request asks for them.
    """

    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    num_shared: int = 0
    error: Exception | None = None
    grammar: Grammar | None = None
    counts: CycleCounts = field(default_factory=CycleCounts)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])


@dataclass(frozen=True)
class Event:
    """The tokens that a cycle committed for a seat; `num_accepted` of them were drafted (the rest is the bonus).

    `logprobs` has an entry for each, where the request asks for them.
    """

    seat: Seat
    tokens: list[int]
    num_accepted: int
    logprobs: list[TokenLogprobs]


def check_requests(requests: Sequence[Request], check: Callable[[Request, str], None]) -> None:
    """Raise a ValueError for no requests, or for one that `check` refuses, which is given a name for it."""
    if not requests:
        raise ValueError("input_ids: expected at least one prompt")
    for row, request in enumerate(requests):
        check(request, f"prompt {row}")


def check_request(target: TargetModel, request: Request, name: str) -> None:
    """Raise a ValueError for an empty prompt, unknown ids, or more tokens than the target has positions."""
    if not request.prompt:
        raise ValueError(f"input_ids: {name} is empty; at least one token is needed")
    if target.max_positions is not None:
        check_room(request, name, target.max_positions, f"the model's {target.max_positions} positions")
    if min(request.prompt) < 0 or max(request.prompt) >= target.vocab_size:
        raise ValueError(f"input_ids: {name} has ids outside the vocabulary of {target.vocab_size}")
    request.sampling.check(target.vocab_size)
    wanted = request.num_logprobs
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or not 0 <= wanted <= MOST_TOP):
        raise ValueError(f"num_logprobs: expected an integer from 0 to {MOST_TOP}, got {wanted!r}")


def check_room(request: Request, name: str, limit: int, limit_in_words: str) -> None:
    if request.most_tokens > limit:
        num_prompt, num_new = len(request.prompt), request.stop.max_new_tokens
        raise ValueError(
            f"max_new_tokens: {name} has {num_prompt} tokens, and {num_new} new ones would pass {limit_in_words}"
        )
