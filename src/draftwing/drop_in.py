"""Drop-in for transformers: our decoding inside `hf_model.generate`, with what transformers has prepared."""

import inspect
import math
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMixin

from draftwing.api import HEAD_OPTIONS, Lessons, SpeculativeModel, append_padded, take_head_options, unpad
from draftwing.checkpoint.formats import HeadOptions
from draftwing.checkpoint.load import Draft, load_draft, read_acceptance
from draftwing.config import check_keys
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.statistics import Statistics
from draftwing.methods import suitable_draft
from draftwing.models.fused import pack_draft
from draftwing.models.target import TargetModel


@dataclass
class DropInOutput(GenerateDecoderOnlyOutput):
    """transformers' output (`sequences [B, S]`) with the generation's figures."""

    statistics: Statistics | None = None


OPTIONS = ("ngram", "draft_window", "coupled", "stop")
"""Fields of GenerateOptions that a drop-in takes; the other ones come from transformers."""


def custom_generate(
    draft: str | Path | Draft | None,
    plan: str | TreePlan | None = None,
    seed: int | None = None,
    method: str | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Callable[..., Any]:
    """A drop-in for transformers: `hf_model.generate(..., custom_generate=draftwing.custom_generate(draft))`.

    Sampling parameters, biases of single tokens, EOS ids, stopping criteria and a `streamer` are honoured as `generate`
    has prepared them; the streamer gets the first row's tokens cycle by cycle, and its end also where decoding fails.

    The model is not changed, so its passes round as its own kernels do: in bfloat16 (and on GPUs) two
    nearly equal logits may swap, and a token differ from stock's. A model that `load` has made has no
    such differences on a CPU (docs/architecture.md).

    With `return_dict_in_generate=True` the output has `statistics`.
    Keep the returned function: it loads the draft once per model, and trees that size themselves learn from each call.

    Args:
        draft: what `load` takes, or a loaded one; None with a method that needs none.
        plan, method: as `load` and GenerateOptions have them.
        seed: None: each call draws its seed from torch's generator, so that `torch.manual_seed` repeats it.
        tokenizer: the target's, for `stop`, and for a draft model with another number of ids.
        options: `ngram`, `draft_window`, `coupled` and `stop` of GenerateOptions, and the fields of HeadOptions.
            Give stop strings here, or as a StopStringCriteria: transformers keeps the `tokenizer` that its own
            `stop_strings` needs from drop-ins, and says that it could not locate one.

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
    known: weakref.WeakKeyDictionary[Any, tuple[Draft | None, Lessons]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

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
        streamer = _streamer_of_caller() if streamer is None else streamer
        was_training = model.training
        model.eval()
        try:
            _check_generation_config(generation_config)
            if kwargs.get("inputs_embeds") is not None:
                raise ValueError("inputs_embeds: not supported by draftwing, which reads input_ids")
            speculative = self._speculative(TargetModel(model))
            generation = speculative.start(
                unpad(input_ids, kwargs.get("attention_mask")),
                seed=int(torch.randint(2**31, ())) if self.seed is None else self.seed,
                **_sampling_of(logits_processor, bool(generation_config.do_sample)),
                **_stop_of(stopping_criteria, input_ids, speculative.target.vocab_size),
                **self.options,
            )
            for committed in generation.cycles():
                for token in committed.tokens[0] if streamer is not None else ():
                    streamer.put(torch.tensor([token]))
        finally:
            model.train(was_training)
            if streamer is not None:
                streamer.end()  # whoever reads from it would wait for ever
        pad = (_as_ids(generation_config.pad_token_id) or _as_ids(generation_config.eos_token_id) or [0])[0]
        sequences = append_padded(input_ids, [output.tokens for output in generation.outputs], pad)
        if not generation_config.return_dict_in_generate:
            return sequences
        return DropInOutput(sequences=sequences, statistics=generation.statistics)

    def _speculative(self, target: TargetModel) -> SpeculativeModel:
        if target.model not in self.known:
            self.known[target.model] = self._load(target)
        draft, lessons = self.known[target.model]
        # Not captured: a recording would go on with the old weights where the caller changes the model.
        return SpeculativeModel(target, draft, self.tokenizer, self.method, lessons, capture=False)

    def _load(self, target: TargetModel) -> tuple[Draft | None, Lessons]:
        if not isinstance(self.draft, str | Path):
            return self.draft, Lessons()
        name = suitable_draft(str(self.draft), self.method)
        draft = load_draft(name, target, options=self.head_options, tokenizer=self.tokenizer)
        return pack_draft(draft, compiles=False), Lessons(read_acceptance(name))


def _streamer_of_caller() -> Any:
    """The streamer that `hf_model.generate` was called with, None if there is none or another function calls us.

    transformers (5.17 to 5.23 at least) gives it the prompt, but keeps it from a `custom_generate`; so it is read from
    the frame of `generate`. Without that, a reader in another thread would wait for ever.
    """
    caller = sys._getframe(2)  # a variable for our own frame would keep it, and what it points to, until a collection
    is_transformers = caller.f_code is inspect.unwrap(GenerationMixin.generate).__code__
    return caller.f_locals.get("streamer") if is_transformers else None


def _check_generation_config(config: Any) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams: speculative decoding has one beam, got {config.num_beams}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"{name}: not supported by draftwing")


# What transformers' logits processors are to us: their class, our option, their attribute.
PROCESSORS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
}


# Processors that we have nothing for: the option that makes transformers prepare them.
UNSUPPORTED = {
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty",
    "EpsilonLogitsWarper": "epsilon_cutoff",
    "EtaLogitsWarper": "eta_cutoff",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "InfNanRemoveLogitsProcessor": "remove_invalid_values",
    "LogitNormalization": "renormalize_logits",
    "MinLengthLogitsProcessor": "min_length or min_new_tokens",  # the latter sets both
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config",
    "TopHLogitsWarper": "top_h",
    "TypicalLogitsWarper": "typical_p",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
    "WatermarkLogitsProcessor": "watermarking_config",
}


def _sampling_of(processors: Any, is_sampled: bool) -> dict[str, Any]:
    """Our sampling options from the logits processors that transformers prepared."""
    options: dict[str, Any] = {"temperature": 1.0 if is_sampled else 0.0}
    bias: dict[int, float] = defaultdict(float)
    for processor in processors or ():
        kind = type(processor).__name__
        if kind in PROCESSORS:
            name, attribute = PROCESSORS[kind]
            if is_sampled or name == "repetition_penalty":
                options[name] = getattr(processor, attribute)
            continue
        for token, value in _bias_of(processor).items():
            bias[token] += value
    return options | {"logit_bias": dict(bias)}


def _bias_of(processor: Any) -> dict[int, float]:
    """What a processor adds to the logits of single tokens."""
    kind = type(processor).__name__
    if kind == "SuppressTokensLogitsProcessor":
        return dict.fromkeys(_as_ids(processor.suppress_tokens), -math.inf)
    if kind not in ("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor"):
        name = UNSUPPORTED.get(kind, f"logits_processor: {kind}")
        raise ValueError(f"{name}: not supported by draftwing")
    bias = {}
    for sequence, value in processor.sequence_bias.items():
        if len(sequence) > 1:
            name = "sequence_bias" if kind.startswith("Sequence") else "bad_words_ids"
            raise ValueError(f"{name}: draftwing supports single tokens, got the sequence {list(sequence)}")
        bias[sequence[0]] = value
    return bias


def _stop_of(criteria: Any, input_ids: torch.Tensor, vocab_size: int) -> dict[str, Any]:
    """Our stop options from the stopping criteria that transformers prepared; unknown ones are run after each token.

    End-of-sequence ids that no model can choose (-1: never end) are left out.
    """
    limits, eos, others = [], [], []
    for criterion in criteria or ():
        kind = type(criterion).__name__
        if kind == "MaxLengthCriteria":
            limits.append(criterion.max_length - input_ids.shape[1])
        elif kind == "EosTokenCriteria":
            eos += [token for token in _as_ids(criterion.eos_token_id) if 0 <= token < vocab_size]
        else:
            others.append(criterion)

    def is_done(row: int, emitted: Sequence[int]) -> bool:
        ids = torch.cat((input_ids[row], torch.tensor(emitted, device=input_ids.device)))[None]
        return any(bool(criterion(ids, None).any()) for criterion in others)

    if not limits:
        raise ValueError("max_new_tokens: expected a limit (max_new_tokens, max_length or a MaxLengthCriteria)")
    return {"max_new_tokens": min(limits), "eos_token_id": eos, "is_done": is_done if others else None}


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return [int(token) for token in value.flatten()]
    return [value] if isinstance(value, int) else list(value)
