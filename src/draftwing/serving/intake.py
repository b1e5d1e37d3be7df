"""From a body to what the engine is asked for: prompts as token ids, sampling, stops. The one place that maps them."""

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from draftwing.api import SpeculativeModel
from draftwing.data.messages import read_message
from draftwing.data.prompts import Prompt
from draftwing.engine.engine import Request
from draftwing.engine.options import row_seed
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import StopRule, exact_decode
from draftwing.serving.conversations import ChatRequest, ConversationRequest, TokenizeRequest
from draftwing.serving.response_schema import ResponseRequest
from draftwing.serving.scheduler import Scheduler
from draftwing.serving.schema import (
    CompletionRequest,
    FieldError,
    GenerationRequest,
    NamedSchema,
    ResponseFormat,
)
from draftwing.serving.structured import AllowedTokens, Forms, only_token
from draftwing.serving.text import AnswerText
from draftwing.serving.token_texts import Offsets
from draftwing.serving.tools import FORMATS, CallReader, ToolFormat, format_of, schemas

COMPLETION_TOKENS = 16
"""New tokens of a completion whose body does not say how many, as OpenAI's."""

MOST_CHARACTERS = 64
"""Characters of a text for each token of the context; longer ones are not even tokenised."""


class ContextError(FieldError):
    """Prompt and new tokens are more than a seat holds."""

    code = "context_length_exceeded"


@dataclass(frozen=True)
class Call:
    """What a body asks for: a request for each answer, `num_choices` for each prompt, in the order of their indices."""

    body: GenerationRequest
    requests: list[Request]
    seed: int
    prompts: Sequence[Sequence[int]]
    tools: "ToolUse | None" = None
    """The answers may call some."""
    prompt_texts: Sequence[str] | None = None
    """What each answer begins with, if that is asked for."""

    @property
    def only_echoes(self) -> bool:
        """Whether no new token is asked for; see `Intake._scoring`."""
        return self.body.max_tokens == 0

    @property
    def num_prompt_tokens(self) -> int:
        """Of the prompts, each counted once."""
        return sum(map(len, self.prompts))

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompts are asked for as well."""
        return self.requests[0].scores_prompt

    def prompt(self, index: int) -> Sequence[int]:
        """What an answer answers."""
        return self.prompts[index // self.body.num_choices]

    def echo(self, index: int) -> str:
        """What an answer begins with: its prompt, if that is asked for."""
        return "" if self.prompt_texts is None else self.prompt_texts[index // self.body.num_choices]


@dataclass(frozen=True)
class ToolUse:
    """How an answer may call tools: `reader` makes what takes the calls out of it.

    The `marks` are special tokens of the format; `allowed` are tokens of a call, if there must be one.
    """

    reader: Callable[[], CallReader]
    marks: frozenset[int]
    allowed: AllowedTokens | None


class Intake:
    """Reads bodies for one model and its scheduler.

    Args:
        max_new_tokens: of a request; None: what its prompt leaves.
        tool_format: how the model writes calls; None: the chat template tells.
    """

    def __init__(
        self,
        model: SpeculativeModel,
        scheduler: Scheduler,
        max_new_tokens: int | None = None,
        tool_format: str | None = None,
    ) -> None:
        self.tokenizer, target = model.tokenizer, model.target
        template = str(getattr(self.tokenizer, "chat_template", None))
        self._tool_format = format_of(template) if tool_format is None else FORMATS[tool_format]
        self._vocab_size, self._eos = target.vocab_size, tuple(target.eos_token_ids)
        self._max_model_len, self._max_new_tokens = scheduler.max_model_len, max_new_tokens
        self._max_answers = scheduler.num_seats + scheduler.max_queue
        self._forms = Forms(self.tokenizer, self._vocab_size, self._eos)

    @cached_property
    def _decode(self) -> Any:
        return exact_decode(self.tokenizer)

    def read(self, body: CompletionRequest | ChatRequest | ResponseRequest) -> Call:
        """What a body asks for.

        Raises:
            FieldError: a field that is out of range for this model.
        """
        return self._completion(body) if isinstance(body, CompletionRequest) else self._conversation(body)

    def _completion(self, body: CompletionRequest) -> Call:
        prompts = [self.prompt_ids(prompt, body.add_special_tokens is not False) for prompt in body.prompts]
        asked = body.num_asked
        if asked is None:
            asked = min(COMPLETION_TOKENS, self._max_new_tokens or COMPLETION_TOKENS)
        call = self._call(body, prompts, asked, echoes=bool(body.echo))
        if not body.echo:
            return call
        texts = [prompt if isinstance(prompt, str) else self._decode(prompt) for prompt in body.prompts]
        return replace(call, prompt_texts=texts)

    def _conversation(self, body: ChatRequest | ResponseRequest) -> Call:
        tools = self._tool_use(body) if body.offered else None
        ids = self.chat_ids(body.messages, body.told, body.PROMPT)
        return self._call(body, [ids], body.num_asked, tools)

    def tokenize(self, body: TokenizeRequest) -> list[int]:
        """The ids of a prompt or of a conversation."""
        if body.messages is not None:
            if body.offered:
                self._known_format()
            return self.chat_ids(body.messages, body.told)
        assert body.prompt is not None
        return self.prompt_ids(body.prompt, body.add_special_tokens is not False)

    def detokenize(self, tokens: list[int]) -> str:
        """The text of token ids, special ones included."""
        if tokens and max(tokens) >= self._vocab_size:
            raise FieldError("tokens", f"expected token ids below {self._vocab_size}, got {max(tokens)}")
        text: str = self._decode(tokens)
        return text

    def answer_text(self, call: Call) -> AnswerText:
        """Turns the tokens of one answer into its text."""
        body, marks = call.body, frozenset[int]() if call.tools is None else call.tools.marks
        keeps_special, keeps_stop = body.skip_special_tokens is False or marks, bool(body.include_stop_str_in_output)
        return AnswerText(self.tokenizer, body.stop_strings, keeps_special, keeps_stop)

    def offsets(self, call: Call, index: int) -> Offsets:
        """Tells where the tokens of one answer stand in its text."""
        hidden = () if call.body.skip_special_tokens is False else frozenset(self.tokenizer.all_special_ids)
        echoed = () if call.prompt_texts is None else call.prompt(index)
        return Offsets(self.tokenizer, hidden, echoed, call.echo(index))

    def prompt_ids(self, prompt: str | list[int], adds_special_tokens: bool = True) -> list[int]:
        """A prompt as the model reads it."""
        if isinstance(prompt, list):
            return prompt
        self._check_characters(len(prompt), "prompt")
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=adds_special_tokens)["input_ids"]
        return ids

    def _check_characters(self, count: int, field: str) -> None:
        """Refuse a text that is far too long before it is tokenised."""
        most = MOST_CHARACTERS * self._max_model_len
        if count > most:
            raise ContextError(
                field,
                f"{count} characters do not fit into the context of {self._max_model_len} tokens; "
                f"at most {most} are read",
            )

    def chat_ids(
        self, messages: Sequence[dict[str, Any]], tools: tuple[dict[str, Any], ...] = (), field: str = "messages"
    ) -> list[int]:
        """A conversation as the model reads it, up to where the assistant answers; errors name its `field`."""
        parts = [turn.get(name) or "" for turn in messages for name in ("content", "tool_calls")]
        self._check_characters(sum(len(str(part)) for part in (*parts, *tools)), field)
        try:
            turns = [read_message(turn, f"turn {index}") for index, turn in enumerate(messages)]
            return Prompt("", messages=tuple(turns), tools=tools).token_ids(self.tokenizer)
        except ValueError as error:
            raise FieldError(field, str(error)) from None

    def _call(
        self,
        body: GenerationRequest,
        prompts: list[list[int]],
        asked: int | None,
        tools: ToolUse | None = None,
        echoes: bool = False,
    ) -> Call:
        num_choices, num_top, seed = body.num_choices, body.num_top, self._seed(body)
        allowed = (tools and tools.allowed) or self._allowed(body)
        if len(prompts) * num_choices > self._max_answers:
            raise FieldError(
                "n" if num_choices > 1 else body.PROMPT,
                f"{len(prompts)} prompts with {num_choices} answers each are more than the {self._max_answers} "
                "that this server has seats and places in its queue for (--seats, --max-queue)",
            )
        requests = list[Request]()
        for prompt in prompts:
            num_new = self._room(body, prompt, asked)
            if (body.min_tokens or 0) > num_new:
                raise FieldError("min_tokens", f"expected at most the {num_new} new tokens there may be")
            if not num_new:
                requests += num_choices * [self._scoring(prompt, num_top)]
                continue
            stop = self._stop(body, num_new)
            for _ in range(num_choices):
                sampling = self._sampling(body, row_seed(seed, len(requests)))
                scores, drafts = echoes and num_top is not None, body.draft is not False
                own = None if allowed is None else allowed.copy()
                requests.append(Request(prompt, sampling, stop, num_top, scores, own, drafts))
        return Call(body, requests, seed, prompts, tools)

    def _scoring(self, prompt: list[int], num_top: int | None) -> Request:
        """What scores a prompt and makes nothing: its last token is the only one that may follow those before it.

        So it needs no room behind the prompt. Of a prompt of one token, whatever follows is not looked at.
        """
        known, last = (prompt[:-1], prompt[-1]) if len(prompt) > 1 else (prompt, 0)
        forced, scores = only_token(last, self._vocab_size), num_top is not None
        return Request(known, SamplingParams(0.0), StopRule(1), num_top, scores, forced, drafts=False)

    def _room(self, body: GenerationRequest, prompt: list[int], asked: int | None) -> int:
        """New tokens of a prompt: as many as were asked for, or as there is room for."""
        if not prompt:
            raise FieldError(body.PROMPT, "expected at least one token")
        if max(prompt) >= self._vocab_size:
            raise FieldError(body.PROMPT, f"expected token ids below {self._vocab_size}, got {max(prompt)}")
        room = self._max_model_len - len(prompt)
        if room < (1 if asked is None else asked):
            raise ContextError(
                body.PROMPT,
                f"the context has {self._max_model_len} tokens; {len(prompt)} of the prompt and "
                f"{'at least 1' if asked is None else asked} new ones do not fit into it",
            )
        most = min(room, self._max_new_tokens or room)
        if asked is not None and asked > most:
            raise FieldError(body.limit_field, f"this server makes at most {most} new tokens, not {asked}")
        return most if asked is None else asked

    def _allowed(self, body: GenerationRequest) -> AllowedTokens | None:
        """What the form that is asked for lets follow; None: no form is."""
        try:
            match body.form:
                case None:
                    return None
                case ResponseFormat(regex=str(pattern)):
                    return self._forms.regex(pattern)
                case ResponseFormat(json_schema=NamedSchema(content=schema)):
                    return self._forms.json(schema)
            return self._forms.json({"type": "object"})
        except ValueError as error:
            raise FieldError(body.FORM, str(error)) from None

    def _known_format(self) -> ToolFormat:
        """How this model writes calls; raises a FieldError where it cannot be told of tools."""
        if not self._knows_tools:
            raise FieldError("tools", "this model's chat template knows none")
        if self._tool_format is None:
            unknown = "how this model writes calls is not known from its chat template"
            raise FieldError("tools", f"{unknown} (--tool-call-parser)")
        return self._tool_format

    def _tool_use(self, body: ConversationRequest) -> ToolUse:
        """How the model calls the tools that it is told of, and what makes it call one, if it must."""
        known = self._known_format()
        marks = [mark for mark in (*known.marks, "[ARGS]", "[CALL_ID]") if mark in self.tokenizer.all_special_tokens]
        special = {mark: self.tokenizer.convert_tokens_to_ids(mark) for mark in marks}
        allowed, functions = None, [function.model_dump(exclude_none=True) for function in body.callable]
        if body.must_call:
            try:
                allowed = self._forms.calls(known.grammar(schemas(functions), special))
            except ValueError as error:
                raise FieldError("tools", str(error)) from None
        names = frozenset(function.name for function in body.offered)
        most = 1 if body.parallel_tool_calls is False else None
        return ToolUse(partial(CallReader, known, names, most), frozenset(special.values()), allowed)

    @cached_property
    def _knows_tools(self) -> bool:
        """Whether the chat template tells a model of its tools."""
        messages = [{"role": "user", "content": "?"}]
        function = {"name": "f", "description": "?", "parameters": {"type": "object", "properties": {}}}
        with suppress(ValueError):
            told = self.chat_ids(messages, ({"type": "function", "function": function},))
            return told != self.chat_ids(messages)
        return False

    def _seed(self, body: GenerationRequest) -> int:
        """The seed of the first answer; drawn from so few that no two requests share one of their answers' seeds.

        The engine's seeds are those from 0 on; the negative ones of 64 bits are counted from 2^63 down.
        """
        return secrets.randbelow(2**32) if body.seed is None else body.seed % 2**63

    def _stop(self, body: GenerationRequest, num_tokens: int) -> StopRule:
        eos = () if body.ignore_eos else self._eos
        if max(body.stop_token_ids or [0]) >= self._vocab_size:
            raise FieldError("stop_token_ids", f"expected token ids below {self._vocab_size}")
        return StopRule(
            max_new_tokens=num_tokens,
            eos_token_ids=(*eos, *(body.stop_token_ids or ())),
            stop_strings=body.stop_strings,
            decode=self._decode,
            min_new_tokens=body.min_tokens or 0,
        )

    def _sampling(self, body: GenerationRequest, seed: int) -> SamplingParams:
        names = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        more: dict[str, Any] = {name: value for name in names if (value := getattr(body, name))}
        temperature = 1.0 if body.temperature is None else body.temperature
        bias = self._bias(body.logit_bias or {})
        return SamplingParams(temperature, top_k=max(0, body.top_k or 0), logit_bias=bias, seed=seed, **more)

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        for token in given:
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < self._vocab_size):
                raise FieldError("logit_bias", f"expected token ids from 0 to {self._vocab_size - 1} as keys")
        return {int(token): value for token, value in given.items()}
