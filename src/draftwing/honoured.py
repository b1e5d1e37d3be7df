"""What of a transformers `generate` call is honoured, changes no token, or is refused by its name.

Lists name what is known; whatever else a call sets, in a later transformers too, is refused.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation import logits_process as stock

from draftwing.target.model import attention_windows

# fmt: off
HONOURED_FIELDS = frozenset((
    # as processors, stopping criteria or prompts that transformers prepares from them
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings",
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "token_healing", "guidance_scale",
    "watermarking_config", "num_return_sequences", "bos_token_id", "eos_token_id", "pad_token_id",
    # and read here
    "do_sample", "output_scores", "output_logits", "return_dict_in_generate",
))
"""Fields of GenerationConfig that are honoured."""

NEUTRAL_FIELDS = frozenset((
    # of beams, encoders and assistants, which are refused themselves
    "early_stopping", "length_penalty", "diversity_penalty", "decoder_start_token_id",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    # and of how transformers computes
    "use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile",
    "continuous_batching_config", "prefill_chunk_size", "transformers_version",
))
"""Fields of GenerationConfig that change no token here."""

PREFIX_PROCESSORS = frozenset((
    stock.EpsilonLogitsWarper, stock.EtaLogitsWarper, stock.ExponentialDecayLengthPenalty,
    stock.ForcedBOSTokenLogitsProcessor, stock.ForcedEOSTokenLogitsProcessor, stock.InfNanRemoveLogitsProcessor,
    stock.LogitNormalization, stock.MinLengthLogitsProcessor, stock.MinNewTokensLengthLogitsProcessor,
    stock.MinPLogitsWarper, stock.NoBadWordsLogitsProcessor, stock.NoRepeatNGramLogitsProcessor,
    stock.RepetitionPenaltyLogitsProcessor, stock.SequenceBiasLogitsProcessor,
    stock.SuppressTokensAtBeginLogitsProcessor, stock.SuppressTokensLogitsProcessor, stock.TemperatureLogitsWarper,
    stock.TopHLogitsWarper, stock.TopKLogitsWarper, stock.TopPLogitsWarper, stock.TypicalLogitsWarper,
    stock.WatermarkLogitsProcessor,
))
"""Processors that are functions of one row's text and scores.

Others may know rows by number, or count their calls.
"""
# fmt: on

NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "cache_implementation": ("dynamic", "offloaded", "static", "offloaded_static", "hybrid"),  # not fewer bits
}
"""Values that change no token, of fields that are refused else."""

ROW_CRITERIA = frozenset((EosTokenCriteria, MaxLengthCriteria, StopStringCriteria))
"""Stopping criteria that are functions of one row's text."""

FAST_PROCESSORS: dict[type, tuple[str, str]] = {
    stock.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
    stock.TemperatureLogitsWarper: ("temperature", "temperature"),
    stock.TopKLogitsWarper: ("top_k", "top_k"),
    stock.TopPLogitsWarper: ("top_p", "top_p"),
    stock.MinPLogitsWarper: ("min_p", "min_p"),
}
"""Processors that are also fields of SamplingParams, in its order: that field and their own."""


def check_call(arguments: Mapping[str, Any], model: Any, config: Any) -> None:
    """Raise a ValueError for what no drop-in gets to see of a call, but would change its tokens.

    `arguments` are those of `generate`, as far as they are known.
    """
    if arguments.get("assistant_model") is not None:
        raise ValueError("assistant_model: not beside draftwing; give it to custom_generate as its draft")
    if arguments.get("synced_gpus"):
        raise ValueError("synced_gpus: not supported by draftwing; processes would run unlike passes")
    if "prepare_inputs_for_generation" in vars(model):
        raise ValueError(
            "prepare_inputs_for_generation: replaced on this model, as adapters that learn prompts do; "
            "not supported by draftwing (adapters that change layers are)"
        )
    check_config(config)


def inputs_given(arguments: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The model inputs among the arguments of `generate`, under the names that the user gave them."""
    known = ("input_ids", "attention_mask")
    given: Mapping[str, Any] = arguments.get("kwargs", {})
    return {name: value for name, value in given.items() if name not in known and not hasattr(config, name)}


def check_config(config: Any) -> None:
    """Raise a ValueError for a field of a GenerationConfig that is not honoured and would change tokens."""
    defaults = GenerationConfig._get_default_generation_params()
    for name in vars(GenerationConfig()):
        value = getattr(config, name, None)
        if name.startswith("_") or name in HONOURED_FIELDS | NEUTRAL_FIELDS or value in (None, False):
            continue
        if value != defaults.get(name) and value not in NEUTRAL_VALUES.get(name, ()):
            raise ValueError(f"{name}: not supported by draftwing, got {value!r}")


def check_inputs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, inputs: Mapping[str, Any], model_config: Any
) -> None:
    """Raise a ValueError for a model input that might change tokens, beside `input_ids [B, S]`.

    The same for prompts padded on the right, after which transformers goes on from the padding, and for gaps
    in the prompts of a model with sliding windows, which count the gaps in transformers.
    """
    if not len(input_ids):
        raise ValueError("input_ids: expected at least one prompt")
    if attention_mask is not None and not attention_mask[:, -1].all():
        row = int((attention_mask[:, -1] == 0).nonzero()[0])
        raise ValueError(f"attention_mask: prompt {row} ends in padding; pad prompts on the left")
    gaps = (left_paddings(attention_mask, input_ids) < 0).nonzero().flatten().tolist()
    if gaps and any(attention_windows(model_config.get_text_config()).values()):
        raise ValueError(
            f"attention_mask: prompt {gaps[0]} has gaps, which draftwing supports without sliding windows only"
        )
    for name, value in inputs.items():
        is_neutral = NEUTRAL_INPUTS.get(name, _is_nothing)
        if value is not None and not is_neutral(value, input_ids, attention_mask):
            raise ValueError(f"{name}: not supported by draftwing, which reads input_ids and their mask")


def fast_sampling(processors: Sequence[Any], paddings: torch.Tensor, is_sampled: bool) -> tuple[dict[str, Any], bool]:
    """Fields of SamplingParams that do what the processors do, and whether they do exactly that.

    Where they do not, they still tell how drafts are best ranked. `paddings [B]` count the padding
    tokens that the prompts begin with.
    """
    options: dict[str, Any] = {"temperature": 1.0 if is_sampled else 0.0}
    order = list(FAST_PROCESSORS)
    last, is_exact = -1, True
    for processor in processors:
        kind = type(processor)
        if not _is_fast(processor, paddings) or not (is_sampled or kind is stock.RepetitionPenaltyLogitsProcessor):
            is_exact = False
            continue
        name, attribute = FAST_PROCESSORS[kind]
        options[name] = getattr(processor, attribute)
        is_exact &= order.index(kind) > last
        last = order.index(kind)
    return options, is_exact


def left_paddings(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
    """The number `[B]` of padding tokens that each prompt begins with; -1 for one with gaps further on."""
    if attention_mask is None:
        return torch.zeros(len(input_ids), dtype=torch.int64)
    mask = attention_mask.bool().cpu()
    leading = mask.int().argmax(1)
    return torch.where((~mask).sum(1) == leading, leading, -1)


def _is_fast(processor: Any, paddings: torch.Tensor) -> bool:
    """Whether a processor is one of FAST_PROCESSORS and nothing about it is unusual."""
    if type(processor) not in FAST_PROCESSORS:
        return False
    value = getattr(processor, FAST_PROCESSORS[type(processor)][1])
    usual, given = vars(type(processor)(value)), dict(vars(processor))
    if isinstance(processor, stock.RepetitionPenaltyLogitsProcessor):
        ignored = given.pop("prompt_ignore_length", None)
        usual.pop("prompt_ignore_length", None)
        ignored = torch.zeros_like(paddings) if ignored is None else ignored
        if not isinstance(ignored, torch.Tensor) or not ignored.cpu().equal(paddings.to(ignored.dtype)):
            return False
    return usual == given and not (isinstance(processor, stock.TopPLogitsWarper) and value == 0)


InputTest = Callable[[Any, torch.Tensor, torch.Tensor | None], bool]


def _is_nothing(value: Any, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    return isinstance(value, Mapping) and all(part is None for part in value.values())


def _is_flag(value: Any, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    return isinstance(value, int)


def _is_empty_cache(value: Any, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    return type(value) in (DynamicCache, StaticCache) and int(value.get_seq_length()) == 0


def _is_range(value: Any, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    return bool(torch.equal(value.cpu(), torch.arange(input_ids.shape[1])))


def _are_positions(value: Any, input_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether positions `[..., B, S]` count the tokens that are not padding."""
    if value.shape[-1] != input_ids.shape[1]:
        return False
    kept = torch.ones_like(input_ids, device="cpu") if mask is None else mask.cpu().long()
    return bool(((value.cpu() == kept.cumsum(-1) - 1) | (kept == 0)).all())


NEUTRAL_INPUTS: dict[str, InputTest] = {
    "use_cache": _is_flag,
    "logits_to_keep": _is_flag,
    "past_key_values": _is_empty_cache,
    "cache_position": _is_range,
    "position_ids": _are_positions,
}
"""Model inputs that change nothing, and when."""
