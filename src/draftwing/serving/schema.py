"""What clients may ask for: the bodies of OpenAI's API with the fields that vLLM's clients add, and their limits.

Here is what all bodies have in common, and those without a conversation; conversations.py has the others.

A field that would change the text and is not honoured is refused by name; others that are unknown are logged.
"""

import difflib
import logging
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 2**20
MAX_PROMPTS = 64
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_BIASES = 1024
MAX_REGEX_LENGTH = 4096
MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_UNKNOWN = 32

REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "documents", "audio", "web_search_options"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), ()),
    **dict.fromkeys(("grammar", "json_schema", "bad_words", "allowed_token_ids", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "continue_final_message", "suffix"), ()),
    **dict.fromkeys(("use_beam_search", "early_stopping", "prompt_embeds", "logits_processors"), ()),
    **dict.fromkeys(("reasoning_effort", "verbosity", "thinking", "prompt_logprobs"), ()),
    **dict.fromkeys(("mirostat", "top_a", "xtc_probability", "dry_multiplier", "dynatemp_range"), ()),
    **dict.fromkeys(("echo", "min_length", "no_repeat_ngram_size", "regex", "beam_width", "num_beams"), ()),
    **dict.fromkeys(("n_predict", "num_predict", "thinking_token_budget", "stop_sequences"), ()),
    **dict.fromkeys(("tfs", "typical_p", "typical", "length_penalty"), (1,)),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
}
"""Fields that would change the text and are not honoured, with the values that change nothing, beside empty ones."""
SILENT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prediction", "request_id", "priority"),
)
"""Fields that many clients send and that change no text; they are not logged."""
SIMILAR = 0.8
"""How much an unknown field must look like a known one to be taken for a slip of the pen."""

PROMPT_FORMS = f"a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either"
STOP_FORMS = f"a text of 1 to {MAX_STOP_LENGTH} characters, or up to {MAX_STOPS} of them"
Text = Annotated[str, Field(max_length=MAX_BODY_BYTES)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


def one_of_forms(expected: str) -> Any:
    """Of a field that may have several forms: the words for them, which are said where it has none."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"expected {expected}") from None

    return WrapValidator(check)


def without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in given.items() if value is not None}


class Body(BaseModel):
    """A request's body; a field that is null counts as absent.

    Raises:
        ValueError: an unknown field that would change the text, or that must be a slip of the pen.
    """

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: Annotated[str, Field(description="one of GET /v1/models; absent: the one that is served")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if isinstance(bias := body.get("logit_bias"), dict) and len(bias) > MAX_BIASES:
            raise FieldError("logit_bias", f"expected at most {MAX_BIASES} tokens, got {len(bias)}")
        return without_nulls(body)

    @model_validator(mode="after")
    def _look_at_unknown_fields(self) -> "Body":
        extra = self.model_extra or {}
        if len(extra) > MAX_UNKNOWN:
            raise FieldError(
                list(extra)[MAX_UNKNOWN], f"one of {len(extra)} unknown fields; at most {MAX_UNKNOWN} are read"
            )
        for name, value in extra.items():
            self.look_at(name, value)
        return self

    def look_at(self, name: str, value: Any) -> None:
        """Refuse an unknown field that would change the text, or that must be a slip of the pen."""
        if name in REFUSED or name.startswith("guided_"):
            if value and value not in REFUSED.get(name, ()):
                raise FieldError(name, "is not supported here, and would change the text; leave it out")
            return
        if name in SILENT:
            return
        similar = self._similar(name[:100].lower())
        if similar:
            raise FieldError(name, f"is unknown; did you mean {similar[0]}?")
        logger.info("field %.60r of a request is not read", name)

    def _similar(self, name: str) -> list[str]:
        """Known fields that a lower-case name must mean: misspelt, or with three letters or more abbreviated."""
        fields = type(self).model_fields
        longer = [field for field in fields if len(name) >= 3 and field.startswith(name)]
        return difflib.get_close_matches(name, fields, 1, SIMILAR) or longer


class FieldError(ValueError):
    """A field that is wrong: its name, and what is wrong about it; some have a code that clients know."""

    code: str | None = None

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


class Strict(BaseModel):
    """What is of another type is refused, not converted."""

    model_config = ConfigDict(strict=True)


class StreamOptions(Strict):
    """What a stream carries beside its text."""

    include_usage: Annotated[bool | None, Field(description="a last chunk without choices has the usage")] = None
    continuous_usage_stats: Annotated[bool | None, Field(description="every chunk has the usage so far")] = None
    draftwing: Annotated[bool | None, Field(description="every chunk says which of its text was drafted")] = None
    include_obfuscation: Annotated[bool | None, Field(description="changes nothing: chunks are never padded")] = None


class Known(BaseModel):
    """Has these fields alone; one that is null counts as absent."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        return without_nulls(given) if isinstance(given, dict) else given


class NamedSchema(Known):
    """A JSON schema as OpenAI's clients send it; it is always kept strictly."""

    name: str | None = None
    description: str | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Known):
    """The form that answers must have: `type`, and beside it the one field that is called like it, if there is one."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: NamedSchema | None = None
    regex: Annotated[str, Field(max_length=MAX_REGEX_LENGTH)] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> "ResponseFormat":
        for name in ("json_schema", "regex"):
            if (getattr(self, name) is not None) != (self.type == name):
                raise FieldError("response_format", f"{name} goes with the type {name}, and that with it")
        return self


class GenerationRequest(Body):
    """What completions and chats have in common."""

    PROMPT: ClassVar[str] = "prompt"
    """The field with what is to be answered."""
    FORM: ClassVar[str] = "response_format"
    """The field with the form that an answer must have."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = Field(None, description="only the value of n")
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="no end-of-sequence token before")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(None, description="default: 1; 0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(None, description="0 or -1: all")
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(description="token ids with what is added to their logits"),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None,
        description="absent: drawn; the answer has it, and with it the same tokens come again. -1 means 2^63 - 1",
    )
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None,
        one_of_forms(STOP_FORMS),
    ] = Field(None, description=STOP_FORMS)
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_BIASES)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = Field(
        None, description="text, json_object, json_schema or regex; other texts than these are not generated"
    )
    draft: bool | None = Field(None, description="false: plain decoding, unless others that run want drafts")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def form(self) -> ResponseFormat | None:
        """What form the answers must have, if any."""
        return None if self.response_format is None or self.response_format.type == "text" else self.response_format

    @property
    def num_choices(self) -> int:
        """Answers for each prompt."""
        return self.n or 1

    @property
    def limit_field(self) -> str:
        """The field that says how many new tokens there may be."""
        return "max_tokens"

    @property
    def num_asked(self) -> int | None:
        """New tokens that there may be; None: it does not say."""
        num_asked: int | None = getattr(self, self.limit_field)
        return num_asked

    @property
    def num_top(self) -> int | None:
        """Of each token's log-probabilities, how many; None: none are asked for."""
        return None

    @model_validator(mode="after")
    def _check_together(self) -> "GenerationRequest":
        if self.best_of is not None and self.best_of != self.num_choices:
            raise FieldError("best_of", f"only the value of n, {self.num_choices}, is supported")
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "only with stream")
        if self.form is not None:
            self.check_ends("a response_format")
        return self

    def check_ends(self, form: str) -> None:
        """Refuse fields that would move the end of a text that must have a form."""
        for name in ("ignore_eos", "min_tokens"):
            if getattr(self, name):
                raise FieldError(name, f"not with {form}, whose text ends where it is complete")


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        Text
        | TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)],
        one_of_forms(PROMPT_FORMS),
    ] = Field(description=PROMPT_FORMS)
    echo: bool | None = Field(None, description="the prompt is part of the answer, and of its logprobs")
    logprobs: Logprobs | None = Field(None, description="so many most probable tokens, and the one that was chosen")
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_length(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", "expected at least 1; 0 is for echo alone")
        return self

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts, each a text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
