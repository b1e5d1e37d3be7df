"""What each field of a head's config.json means here: it is used, changes nothing, or makes another network of it.

A field that would add, drop or reshape a tensor can change nothing in silence, for every tensor is accounted for. The
others are listed here, and a field that is in no list is refused.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from draftwing.layers import ACTIVATIONS
from draftwing.rotary import COMMON_KEYS, NEEDED_KEYS, YARN_OPTIONS, rope_problem

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
USED = frozenset(
    ("architectures", "model_type", "hidden_act", "hidden_size", "intermediate_size", "num_attention_heads")
    + ("num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size", "rms_norm_eps", "max_position_embeddings")
    + ("trained_length", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types")
    + ("sliding_window", "use_sliding_window", "max_window_layers", "target_hidden_size", "tie_word_embeddings")
    + ("norm_before_residual", "norm_output", "eagle_config", LAYER_IDS, "target_layer_ids", "layer_ids")
    + ("aux_hidden_state_layer_ids", "use_aux_hidden_state", "transformer_layer_config", "speculators_model_type")
    + ("speculators_config",)
)
EAGLE3_ONLY = ("norm_before_residual", "norm_output", LAYER_IDS, "target_layer_ids", "aux_hidden_state_layer_ids")
TOLD_BY_TENSORS = {
    "attention_bias": "self_attn.q_proj.bias",
    "qkv_bias": "self_attn.q_proj.bias",
    "mlp_bias": "mlp.gate_proj.bias",
    "bias": "fc.bias",
    "use_qk_norm": "self_attn.q_norm.weight",
    "qk_norm": "self_attn.q_norm.weight",
    "fc_norm": "fc_norm.0.weight",
    "use_aux_norm": "aux_norm_low.weight",
    "norm_before_fc": "input_norm.weight",
    "has_lm_head": "lm_head.weight",
}
"""Options that the file's tensors decide, each with the end of a name that is there where it is on."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_output_gate": (False,),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "input_embedding_scale": (1,),
    "interleaved": (False,),
    "is_neox_style": (True,),
    "lm_head_multiplier": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "next_layer_regular": (True,),
    "num_nextn_predict_layers": (0, 1),
    "output_multiplier": (1,),
    "parallel_draft_heads_num_layers": (0, 1),
    "parallel_draft_step": (1,),
    "quantization_config": ({},),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "scale_emb": (1,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
}
"""Fields that would change the arithmetic, each with the values (beside null) that do not."""
IDLE = frozenset(
    # Where the file comes from.
    ("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "auto_map", "dtype")
    + ("has_no_defaults_at_init", "id2label", "label2id", "name_or_path", "speculators_version", "tokenizer_class")
    + ("torch_dtype", "transformers_version", "version", "task_specific_params", "problem_type", "finetuning_task")
    + ("target_model_type", "target_architectures", "target_vocab_size", "num_target_layers", "verifier")
    + ("target_num_hidden_layers", "verifier_name_or_path", "base_model_name_or_path")
    # Layers and their shapes: the tensors tell.
    + ("num_hidden_layers", "num_eagle_layers", "num_eagle_features", "eagle_num_layers")
    # Special tokens and transformers' own generation.
    + ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "prefix", "suffix")
    + ("bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size", "do_sample")
    + ("diversity_penalty", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty")
    + ("forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length", "top_k", "top_p")
    + ("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "repetition_penalty")
    + ("remove_invalid_values", "suppress_tokens", "temperature", "typical_p", "is_decoder", "is_encoder_decoder")
    + ("add_cross_attention", "output_attentions", "output_hidden_states", "output_scores", "return_dict", "use_cache")
    + ("return_dict_in_generate", "tie_encoder_decoder", "tf_legacy_loss", "torchscript", "use_bfloat16")
    + ("pruned_heads", "max_sequence_length", "max_seq_len", "seq_length", "model_max_length", "pretraining_tp")
    # Training.
    + ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "hidden_dropout_prob")
    + ("dropout", "classifier_dropout", "initializer_range", "initializer_factor", "embed_requires_grad", "loss_type")
    + ("gradient_checkpointing", "router_aux_loss_coef", "output_router_logits", "ttt_steps", "ttt_length", "length")
    # A target's experts, copied with its config: a head's layer is dense, as its tensors say.
    + ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts")
    + ("num_experts_per_tok", "num_local_experts", "shared_expert_intermediate_size", "router_jitter_noise")
    + ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq")
    # An axis for images, in which text stands still.
    + ("mrope_section", "mrope_interleaved", "image_token_id", "video_token_id", "vision_token_id")
    + ("vision_start_token_id", "vision_end_token_id")
)
"""Fields that change nothing of what a head computes."""
LLAMA_LIKE = frozenset(
    ("", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v2")
    + ("deepseek_v3", "kimi_k2", "eagle", "eagle3", "llama_eagle", "llama_eagle3", "speculator_model", "vicuna")
)
"""`model_type`s of which a dense layer is Llama's, with the tensors that a head's file has."""
ARCHITECTURE = re.compile(
    r"(Eagle3?)?(Llama|Mistral|Mixtral|Qwen2|Qwen2Moe|Qwen3|Qwen3Moe|Qwen2_5vl|Qwen3vl)(ForCausalLM|Model)?"
    r"(ForCausalLM)?(Eagle3?|Eagle3Deep|NextN)?|Eagle3?(Speculator|DraftModel|Model|ForCausalLM)",
    re.IGNORECASE,
)
OWN_LAYER = re.compile(r"LlamaForCausalLMEagle3?|Eagle3?LlamaForCausalLM")
"""Architectures that are a Llama layer whatever the `model_type`, which is often the target's."""


@dataclass
class Fields:
    """The fields of a config.json (nested ones with dots) by what they do; `refused` has a sentence for each."""

    used: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sort_fields(values: Mapping[str, Any], tensor_names: Collection[str], is_eagle3: bool) -> Fields:
    """What becomes of each field that is not null; `tensor_names` as in the file."""
    fields = Fields()
    layer_values = values.get("transformer_layer_config", values)
    for path, name, value in _flattened(values):
        if name in TOLD_BY_TENSORS:
            fields.idle.append(path)
            if value is True and not any(tensor.endswith(TOLD_BY_TENSORS[name]) for tensor in tensor_names):
                _contradict(fields, path, name)
        elif name in EAGLE3_ONLY and value and not is_eagle3:
            fields.refused.append(f"{path}: only EAGLE-3 heads have it, and this is an EAGLE-1 head")
        elif name in USED:
            fields.used.append(path)
        elif name in IDLE or value in NEUTRAL.get(name, ()):
            fields.idle.append(path)
        elif name in NEUTRAL:
            fields.refused.append(f"{path}: {value!r} would change what the head computes, and is not known here")
        else:
            fields.refused.append(
                f"{path}: a field of config.json that is not known here (its value is {value!r}); if it changes "
                "nothing of what the head computes, delete it there"
            )
    fields.refused += [*_other_networks(values, layer_values), *_rope_problems(layer_values)]
    if (act := layer_values.get("hidden_act") or "silu") not in ACTIVATIONS:
        fields.refused.append(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return fields


def _contradict(fields: Fields, path: str, name: str) -> None:
    """A field promises tensors that the file lacks. Biases that were not stored were not trained; norms cannot lack."""
    tensor = TOLD_BY_TENSORS[name]
    if name in ("attention_bias", "qkv_bias", "mlp_bias", "bias", "has_lm_head"):
        fields.notes.append(f"config.json says {path}, but the file has no {tensor}, so there is none")
    else:
        fields.refused.append(f"{path}: config.json says so, but the file has no {tensor}")


def _flattened(values: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of each field that is not null, those of the parts that are read included."""
    for name, value in values.items():
        if name in ("transformer_layer_config", "eagle_config") and isinstance(value, Mapping):
            yield from ((f"{name}.{path}", inner, held) for path, inner, held in _flattened(value))
        elif value is not None:
            yield name, name, value


def _other_networks(values: Mapping[str, Any], layer_values: Mapping[str, Any]) -> Iterator[str]:
    names = [str(name) for name in values.get("architectures") or ()]
    for name in names:
        if not ARCHITECTURE.fullmatch(name):
            yield f"architectures: {name} is not one of the networks that are known here"
    if not any(map(OWN_LAYER.fullmatch, names)) and (kind := layer_values.get("model_type") or "") not in LLAMA_LIKE:
        yield f"model_type: the layers of {kind!r} are not Llama's, and not known here"
    try:
        sliding_window(layer_values, 1)
    except ValueError as error:
        yield str(error)


def sliding_window(values: Mapping[str, Any], num_layers: int) -> int | None:
    """How many tokens the attention of a head's layers reads; None is all.

    Raises:
        ValueError: its layers differ, or their attention is of another kind.
    """
    window = values.get("sliding_window")
    kinds = set((values.get("layer_types") or [])[:num_layers])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types: expected full_attention or sliding_attention, got {sorted(unknown)[0]!r}")
    if not window or values.get("use_sliding_window") is False or kinds == {"full_attention"}:
        return None
    if len(kinds) > 1:
        raise ValueError("layer_types: the layers of a head have one kind of attention here, these have two")
    beyond = values.get("max_window_layers")  # Qwen's: layers from this one on have a window
    return None if not kinds and beyond is not None and num_layers <= beyond else int(window)


def rope_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's RoPE settings, from `rope_parameters` or the older `rope_theta` and `rope_scaling`.

    A missing theta is 10000: the EAGLE-3 training code always used it, and its configs leave it out. Where there is a
    mapping for each layer type, it is the head's layer's. What the default type has no use for is left out.

    Raises:
        ValueError: mappings of several layer types, and `layer_types` does not say which is the head's.
    """
    parameters = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    parts = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    if parts:
        kind = next(iter(values.get("layer_types") or ()), None)
        kind = kind if kind in parts else next(iter(parts))
        if len(parts) > 1 and kind not in (values.get("layer_types") or ()) and len({*map(str, parts.values())}) > 1:
            raise ValueError(f"rope_parameters: there are some for {', '.join(parts)}; layer_types must say which")
        parameters = dict(parts[kind])
    parameters = {name: value for name, value in parameters.items() if value is not None}
    theta = parameters.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    rope_type = parameters.pop("rope_type", None) or parameters.get("type", "default")
    parameters.pop("type", None)
    if rope_type == "mrope":  # the axes of text are equal
        rope_type = "default"
    share = parameters.pop("partial_rotary_factor", None) or values.get("partial_rotary_factor") or 1.0
    if rope_type == "yarn":
        longest = values.get("max_position_embeddings")
        parameters.setdefault("original_max_position_embeddings", longest)
        if longest is not None and "factor" not in parameters:
            parameters["factor"] = longest / parameters["original_max_position_embeddings"]
    known = (*NEEDED_KEYS.get(rope_type, ()), *(YARN_OPTIONS if rope_type == "yarn" else ()))
    kept = {name: value for name, value in parameters.items() if name in known}
    partial = {} if share == 1.0 else {"partial_rotary_factor": share}
    return {**kept, **partial, "rope_type": rope_type, "rope_theta": theta}


def rope_scaling_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json's older `rope_scaling` says of RoPE settings; nothing for the default type."""
    if parameters.get("rope_type", "default") == "default":
        return {}
    return {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}


def _rope_problems(values: Mapping[str, Any]) -> Iterator[str]:
    try:
        problem = rope_problem(rope_of(values))
    except ValueError as error:
        problem = str(error)
    if problem:
        yield problem
    known = {*COMMON_KEYS, "type", "mrope_section", "mrope_interleaved", *YARN_OPTIONS, *sum(NEEDED_KEYS.values(), ())}
    for place in ("rope_parameters", "rope_scaling"):
        mapping = values.get(place) or {}
        for part in [mapping, *(value for value in mapping.values() if isinstance(value, Mapping))]:
            for name, value in part.items():
                if name not in known and value is not None and not isinstance(value, Mapping):
                    yield f"{place}.{name}: not known here (its value is {value!r})"
