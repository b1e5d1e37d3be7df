"""Drop-in for transformers: our decoding inside `hf_model.generate`, with what transformers has prepared."""

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMixin,
    MaxLengthCriteria,
)

from draftwing.api import HEAD_OPTIONS, SpeculativeModel, take_head_options
from draftwing.batches import append_padded, unpad
from draftwing.config import check_keys
from draftwing.drafts.eagle.formats import HeadOptions
from draftwing.drafts.family import Draft
from draftwing.drafts.kinds import family_of_draft, suitable_draft
from draftwing.drafts.load_draft import load_packed, read_acceptance
from draftwing.engine.generation import Generation
from draftwing.engine.options import GenerateOptions
from draftwing.engine.statistics import Statistics
from draftwing.engine.stepwise import Place
from draftwing.engine.stopping import StopRule
from draftwing.engine.tree_plan import TreeShape
from draftwing.honoured import (
    PREFIX_PROCESSORS,
    ROW_CRITERIA,
    check_call,
    check_inputs,
    fast_sampling,
    inputs_given,
    left_paddings,
)
from draftwing.plans.lessons import Lessons
from draftwing.target.model import TargetModel


@dataclass
class DropInOutput(GenerateDecoderOnlyOutput):
    """transformers' output (`sequences [B, S]`) with the generation's figures."""

    statistics: Statistics | None = None


OPTIONS = ("ngram", "draft_window", "coupled", "stop")
"""Fields of GenerateOptions that a drop-in takes; the other ones come from transformers."""


def custom_generate(
    draft: str | Path | Draft | None,
    plan: str | TreeShape | None = None,
    seed: int | None = None,
    method: str | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Callable[..., Any]:
    """A drop-in for transformers: `hf_model.generate(..., custom_generate=draftwing.custom_generate(draft))`.

    What changes the tokens is honoured as `generate` has prepared it, or refused by its name. Every
    logits processor and stopping criterion sees each step as without drafts, your own ones too; where
    they might tell rows apart, or scores are returned, the rows of a batch advance together, which
    accepts less. The same holds for a `streamer`. It gets each step's tokens `[B]`, and its end even where
    decoding fails.

    The model is not changed, so its passes round as its own kernels do: in bfloat16 (and on GPUs) two
    nearly equal logits may swap, and a token differ from stock's. A model that `load` has made has no
    such differences on a CPU (docs/mechanisms.md).

    With `return_dict_in_generate=True` the output has `statistics`, and no `past_key_values`: a cache that is handed
    over, which must be empty, stays so, with a warning.
    Keep the returned function: it loads the draft once per model, and trees that size themselves learn from each call.

    Args:
        draft: what `load` takes, or a loaded one; None with a method that needs none. A head that is loaded by its name
            is kept in 8 bits in float32 on a CPU with a C compiler; a loaded one stays as it is.
        plan, method: as `load` and GenerateOptions have them.
        seed: None: each call draws its seed from torch's generator, so that `torch.manual_seed` repeats it.
        tokenizer: the target's, for `stop`, and for a draft model with another number of ids.
        options: `ngram`, `draft_window`, `coupled` and `stop` of GenerateOptions, and the fields of HeadOptions.
            Give stop strings here, where the new text is searched, or as a StopStringCriteria, which also finds one
            that begins in the prompt: transformers keeps the `tokenizer` that its own `stop_strings` needs from
            drop-ins, and says that it could not locate one.

    Raises:
        ValueError: an unknown option; on use, a setting that is not supported (the message names it).
    """
    check_keys(options, (*OPTIONS, "plan", "seed", "method", "tokenizer", *HEAD_OPTIONS))
    head_options = take_head_options(options)
    if head_options.given and not isinstance(draft, str | Path):
        raise ValueError(f"{', '.join(head_options.given)}: for a draft that is loaded by its name, got {type(draft)}")
    return _DropIn(draft, method, tokenizer, head_options, seed, {"plan": plan, **options})


@dataclass(frozen=True, eq=False)
class _DropIn:
    """What `hf_model.generate` calls; it keeps the draft of each model, and what was learnt with it."""

    draft: str | Path | Draft | None
    method: str | None
    tokenizer: Any
    head_options: HeadOptions
    seed: int | None
    options: dict[str, Any]
    known: weakref.WeakKeyDictionary[Any, "_Known"] = field(default_factory=weakref.WeakKeyDictionary)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        arguments = _arguments_of_caller(model)
        streamer = arguments.get("streamer") if streamer is None else streamer
        were_training = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            mask = kwargs.pop("attention_mask", None)
            check_call(arguments, model, generation_config)
            given = inputs_given(arguments, generation_config)
            check_inputs(input_ids, mask, given | kwargs, model.config)
            if given.get("past_key_values") is not None:
                warnings.warn("past_key_values: draftwing has caches of its own; this one stays empty", stacklevel=4)
            is_streamed = streamer is not None
            call = _Call(
                input_ids, mask, logits_processor or (), stopping_criteria or (), generation_config, is_streamed
            )
            generation, steps = self._start(TargetModel(model), call)
            for committed in generation.cycles():
                for tokens in zip(*committed.tokens, strict=True) if is_streamed else ():
                    streamer.put(torch.tensor(tokens))
        finally:
            for module, was_training in were_training:
                module.training = was_training
            if streamer is not None:
                streamer.end()  # whoever reads from it would wait for ever
        sequences = append_padded(input_ids, [output.tokens for output in generation.outputs], call.pad_token_id)
        if not generation_config.return_dict_in_generate:
            return sequences
        scores, logits = (None, None) if steps is None else (steps.kept("scores"), steps.kept("logits"))
        return DropInOutput(sequences, scores=scores, logits=logits, statistics=generation.statistics)

    def _start(self, target: TargetModel, call: "_Call") -> tuple[Generation, "_StockSteps | None"]:
        """A generation, and who chooses its tokens where our sampling and stops are not the call's."""
        # Before a draft is loaded, and for what draws only: torch's generator goes on as it does without drafts.
        seed = int(torch.randint(2**31, ())) if self.seed is None and call.config.do_sample else self.seed or 0
        speculative = self._speculative(target)
        sampling, is_same = call.sampling()
        settings = GenerateOptions(
            **self.options | sampling,
            max_new_tokens=call.limit,
            eos_token_id=call.eos_token_ids(target.vocab_size),
            seed=seed,
        )
        requests = speculative.requests(unpad(call.input_ids, call.attention_mask), settings)
        in_step = call.is_of_one_piece(settings)
        if is_same and call.ends_rows_alone(CUT_CRITERIA, settings) and not (call.kept or in_step):
            return speculative.start_requests(requests, settings), None
        steps = _StockSteps(call, requests[0].stop, in_step)
        requests = [
            replace(
                request,
                sampling=replace(request.sampling, place=Place(steps, row)),
                stop=StopRule(call.limit, is_done=partial(steps.is_done, row)),
            )
            for row, request in enumerate(requests)
        ]
        return speculative.start_requests(requests, settings), steps

    def _speculative(self, target: TargetModel) -> SpeculativeModel:
        known = self.known.get(target.model)
        if known is None or known.fits != _what_drafts_fit(target):
            known = self.known[target.model] = self._load(target)
        # Not captured: a recording would go on with the old weights where the caller changes the model.
        return SpeculativeModel(target, known.draft, self.tokenizer, self.method, known.lessons, capture=False)

    def _load(self, target: TargetModel) -> "_Known":
        fits = _what_drafts_fit(target)
        if not isinstance(self.draft, str | Path):
            _check_fits(self.draft, target)
            return _Known(fits, self.draft, Lessons())
        name = suitable_draft(str(self.draft), self.method)
        with torch.random.fork_rng(devices=()):
            draft = load_packed(name, target, self.head_options, self.tokenizer, compiles=False)
        return _Known(fits, draft, Lessons(read_acceptance(name)))


@dataclass(frozen=True)
class _Known:
    """The draft of a model as long as the model `fits` it, and what was learnt with it."""

    fits: tuple[object, ...]
    draft: Draft | None
    lessons: Lessons


def _what_drafts_fit(target: TargetModel) -> tuple[object, ...]:
    """What of a model may change between calls so that its draft must be loaded again."""
    return target.device, target.dtype, target.vocab_size, target.hidden_size


def _check_fits(draft: Draft | None, target: TargetModel) -> None:
    """Raise a ValueError where a loaded draft lies elsewhere than its target, or has another dtype."""
    if draft is None:
        return
    kind = family_of_draft(draft).kind
    dtype = kind.dtype(draft, target)
    for other in kind.places(draft) - {(dtype, target.device)}:
        raise ValueError(
            f"draft: is {other[0]} on {other[1]}, expected {dtype} on {target.device}; load it anew for this model, or "
            "give custom_generate its name"
        )


def _arguments_of_caller(model: Any) -> Mapping[str, Any]:
    """What `model.generate` was called with; nothing if it has not called us.

    transformers (5.17 to 5.23 at least) keeps some arguments from a `custom_generate`, so they are read
    from the frame of `generate`: a streamer, which got the prompt, and whose reader in another thread
    would wait for ever; an assistant; and model inputs under the names that the user gave them.
    """
    generate = inspect.unwrap(GenerationMixin.generate).__code__
    # Not our own frame: a variable would keep it, and what it points to, until a collection.
    caller: FrameType | None = sys._getframe(2)
    while caller is not None:  # `generate` may have called a function around this one
        if caller.f_code is generate and caller.f_locals["self"] is model:
            return caller.f_locals
        caller = caller.f_back
    return {}


CUT_CRITERIA = frozenset((EosTokenCriteria, MaxLengthCriteria))
"""Stopping criteria that StopRule applies itself."""


@dataclass(frozen=True)
class _Call:
    """A call of `generate`, as transformers has prepared it."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    processors: Sequence[Any]
    criteria: Sequence[Any]
    config: Any
    is_streamed: bool

    @property
    def limit(self) -> int:
        """Tokens to generate at most; at least one, since lengths are looked at after a token."""
        limits = [criterion.max_length for criterion in self.criteria if type(criterion) is MaxLengthCriteria]
        if not limits:
            raise ValueError("max_new_tokens: expected a limit (max_new_tokens, max_length or a MaxLengthCriteria)")
        return max(1, int(min(limits)) - self.input_ids.shape[1])

    @property
    def pads_rows(self) -> bool:
        """Whether rows that have ended are padded; without end-of-sequence ids they go on with the others."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    @property
    def pad_token_id(self) -> int:
        config = self.config
        return (_as_ids(config.pad_token_id) or _as_ids(config.eos_token_id) or [0])[0]

    @property
    def kept(self) -> tuple[str, ...]:
        """What of each step is to be returned."""
        if not self.config.return_dict_in_generate:
            return ()
        return tuple(name for name in ("scores", "logits") if getattr(self.config, f"output_{name}"))

    def eos_token_ids(self, vocab_size: int) -> list[int]:
        """The end-of-sequence ids, without those that no model can choose (-1: never end)."""
        eos = [criterion.eos_token_id for criterion in self.criteria if type(criterion) is EosTokenCriteria]
        return [token for ids in eos for token in _as_ids(ids) if 0 <= token < vocab_size]

    def sampling(self) -> tuple[dict[str, Any], bool]:
        """Our sampling options, and whether they are what the processors do; see `fast_sampling`."""
        paddings = left_paddings(self.attention_mask, self.input_ids)
        return fast_sampling(self.processors, paddings, bool(self.config.do_sample))

    def ends_rows_alone(self, known: frozenset[type], settings: GenerateOptions) -> bool:
        """Whether the criteria are `known` ones, and each row ends by its own text."""
        kinds = {type(criterion) for criterion in self.criteria}
        all_end_at_once = kinds <= {MaxLengthCriteria} and not settings.stop
        return kinds <= known and (self.pads_rows or all_end_at_once or len(self.input_ids) == 1)

    def is_of_one_piece(self, settings: GenerateOptions) -> bool:
        """Whether steps must be shown for all rows at once: to what tells rows apart or is kept."""
        if len(self.input_ids) == 1:
            return False
        is_by_row = all(
            type(processor) in PREFIX_PROCESSORS and not _has_rows(processor) for processor in self.processors
        )
        is_shown = bool(self.kept) or self.is_streamed
        return is_shown or not is_by_row or not self.ends_rows_alone(ROW_CRITERIA, settings)


class _StockSteps:
    """Steps as `GenerationMixin._sample` takes them: processors, choice, padding, criteria."""

    def __init__(self, call: _Call, stop: StopRule, in_step: bool) -> None:
        num_rows, self._prompt_length = call.input_ids.shape
        self.in_step = in_step
        self._processors = LogitsProcessorList(call.processors)
        self._criteria = StoppingCriteriaList(call.criteria)
        if stop.stop_strings:
            self._criteria.append(partial(_completes, replace(stop, eos_token_ids=()), self._prompt_length))
        self._pad = call.pad_token_id if call.pads_rows else None
        self._texts = list(call.input_ids)
        self._has_ended = torch.zeros(num_rows, dtype=torch.bool, device=call.input_ids.device)
        self._lengths: list[int | None] = [None] * num_rows
        self._kept: dict[str, list[torch.Tensor]] = {name: [] for name in call.kept}
        # What is kept, by processors too, must not be an inference tensor, unless the caller's own are.
        self._of_inference = torch.is_inference_mode_enabled()

    def kept(self, name: str) -> tuple[torch.Tensor, ...] | None:
        """The `scores` or `logits [B, V]` of each step, None if they were not asked for."""
        return tuple(self._kept[name]) if name in self._kept else None

    def is_done(self, row: int, emitted: Sequence[int]) -> bool:
        """Whether a row has come to its end."""
        length = self._lengths[row]
        return length is not None and len(emitted) >= length

    def choose(self, rows: Sequence[int], logits: torch.Tensor, noise: torch.Tensor | None) -> list[int]:
        if self._lengths[rows[0]] is not None:  # accepted past the end; nobody is to see that
            return [0] * len(rows)
        with torch.inference_mode(self._of_inference), torch.no_grad():
            return self._step(list(rows), logits, noise)

    def _step(self, rows: list[int], logits: torch.Tensor, noise: torch.Tensor | None) -> list[int]:
        texts = torch.stack([self._texts[row] for row in rows])
        logits = logits.to(texts.device, torch.float32, copy=True)
        scores = self._processors(texts, logits)
        for name, step in (("scores", scores), ("logits", logits)):
            if name in self._kept:
                self._kept[name].append(step)
        if noise is not None:
            _check_drawable(scores)
        tokens = (scores if noise is None else scores + noise.to(scores.device)).argmax(-1)
        if self._pad is not None:
            tokens = tokens.masked_fill(self._has_ended[rows], self._pad)
        texts = torch.cat((texts, tokens[:, None]), dim=1)
        self._has_ended[rows] |= self._criteria(texts, self.kept("scores"))
        length = texts.shape[1] - self._prompt_length if self._has_ended[rows].all() else None
        for row, text in zip(rows, texts, strict=True):
            self._texts[row], self._lengths[row] = text, length
        return [int(token) for token in tokens]


def _completes(stop: StopRule, prompt_length: int, texts: torch.Tensor, scores: object) -> torch.Tensor:
    """Whether the last token of each text `[B, S]` completes a stop string; a stopping criterion."""
    emitted = texts[:, prompt_length:].tolist()
    ends = [stop.check(tokens[:-1], tokens[-1:])[1] == "stop" for tokens in emitted]
    return torch.tensor(ends, device=texts.device)


def _check_drawable(scores: torch.Tensor) -> None:
    """Raise a ValueError where the processors left a row of `scores [B, V]` nothing to draw, as transformers raises."""
    highest = scores.amax(-1)  # NaN where one score is
    if not highest.isfinite().all():
        raise ValueError(f"scores: the processors left {highest.tolist()} as the rows' highest; nothing can be drawn")


def _has_rows(processor: Any) -> bool:
    """Whether a processor has values of its own for each row."""
    return isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor)


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return [int(token) for token in value.flatten()]
    return [int(value)] if isinstance(value, Integral) else [int(token) for token in value]
