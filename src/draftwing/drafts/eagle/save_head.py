"""Write heads in the published formats: back from our names, options and conventions (formats.py reads them).

Keys are written where their value is not what all engines take for granted: some take the key itself for a statement.
"""

import re
from pathlib import Path
from typing import Any

import torch

from draftwing.drafts.eagle.fields import LAYER_IDS, rope_scaling_of
from draftwing.drafts.eagle.formats import HeadFile, HeadFormat, default_or_none
from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.drafts.fit import TargetSizes, Tensors
from draftwing.drafts.save import write_draft
from draftwing.layers import DraftConfig
from draftwing.target.hidden_states import NORMED
from draftwing.target.packed import PackedLinear

LAYER_FIELDS = (
    *("hidden_act", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_hidden_layers", "vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_parameters"),
)
"""What a config.json has under the names, and with the values, of our configuration."""


def to_head(network: DraftNetwork, head_format: HeadFormat) -> HeadFile:
    """A network as a head of the given format (its parameters are not copied), as `read_head` gives it."""
    assert not any(isinstance(module, PackedLinear) for module in network.modules()), "packed for decoding"
    tensors = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return HeadFile(head_format, network.config, network.vocab.target_ids, tensors)


def save_head(
    head: HeadFile, folder: Path, target: TargetSizes, dtype: torch.dtype | None = None, verifier: str = ""
) -> None:
    """Write config.json and model.safetensors; the weights in `dtype` (default: as they are)."""
    write_draft(*write_head(head, target, verifier), folder, dtype)


def write_head(head: HeadFile, target: TargetSizes, verifier: str = "") -> tuple[dict[str, Any], Tensors]:
    """A head's config.json and tensors in its format. `verifier` names the target in a speculators file."""
    config, tensors = head.config, dict(head.tensors)
    layer_values = _layer_values(config, "LlamaForCausalLMEagle3" if head.is_eagle3 else "LlamaForCausalLM")
    if not head.is_eagle3:
        # The reference code gives fc a bias unless the key says no; vLLM takes the key for the attention's biases.
        return layer_values | ({} if config.fc_bias else {"bias": False}), tensors
    if head.target_ids is not None:
        tensors["d2t"] = head.target_ids - torch.arange(head.target_ids.numel())
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, head.target_ids, True)
    # SGLang must find the first key; the reference code takes the second for a head with an embedding of its own.
    options: dict[str, Any] = {"draft_vocab_size": config.draft_vocab_size if config.own_lm_head else None}
    if config.target_hidden_size != config.hidden_size:
        options["target_hidden_size"] = config.target_hidden_size
    options |= {name: True for name in ("fc_norm", "norm_output") if getattr(config, name)}
    if head.format == "speculators":
        options |= _speculators_values(config, layer_values, verifier)
        return options | _feature_values(config, None), _file_names(tensors, "layers.0")
    # No published EAGLE-3 engine but vLLM reads these.
    options |= {name: True for name in ("norm_before_residual", "norm_before_fc") if getattr(config, name)}
    return layer_values | options | _feature_values(config, target), _file_names(tensors, "midlayer")


def _feature_values(config: DraftConfig, target: TargetSizes | None) -> dict[str, Any]:
    """What names the feature layers; nothing where they are the target's default. Without a target: speculators' way.

    vLLM and llama.cpp read the list at the top level, and without it their defaults; SGLang reads the nested one.
    """
    if config.aux_layers == (NORMED,):
        return {"eagle_config": {LAYER_IDS: [], "use_aux_hidden_state": False}}
    if NORMED in config.aux_layers:
        raise ValueError(
            f"aux_layers: no format has the state behind the final norm beside others: {config.aux_layers}"
        )
    if target is None:
        return {LAYER_IDS: list(config.aux_layers)}
    if not config.aux_layers or config.aux_layers == default_or_none(target.num_layers):
        return {}
    nested = {LAYER_IDS: [layer - 1 for layer in config.aux_layers], "use_aux_hidden_state": True}
    return {"eagle_config": nested, LAYER_IDS: list(config.aux_layers)}


def _layer_values(config: DraftConfig, architecture: str) -> dict[str, Any]:
    """The Llama part of a config.json."""
    rope = config.rope_parameters
    values: dict[str, Any] = {
        "model_type": "llama",
        "architectures": [architecture],
        **{name: getattr(config, name) for name in LAYER_FIELDS},
        # Older engines read these two instead.
        "rope_theta": rope["rope_theta"],
        "rope_scaling": rope_scaling_of(rope) or None,
        "tie_word_embeddings": False,
    }
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if config.attention_bias:  # transformers' key means the output's bias too
        values["attention_bias" if config.output_bias else "qkv_bias"] = True
    if config.mlp_bias:
        values["mlp_bias"] = True
    if config.sliding_window is not None:
        values["sliding_window"] = config.sliding_window
        values["layer_types"] = ["sliding_attention"] * config.num_hidden_layers
    if config.trained_length is not None:
        values["trained_length"] = config.trained_length  # a key of our own
    return values


def _speculators_values(config: DraftConfig, layer_values: dict[str, Any], verifier: str) -> dict[str, Any]:
    """What a speculators config.json says beside the options it shares with EAGLE-3 files."""
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "transformer_layer_config": layer_values,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
    }


def _file_names(tensors: Tensors, first_layer: str) -> Tensors:
    """Our parameter names as the file's: the inverse of `_canonical_names`."""

    def file_name(name: str) -> str:
        name = re.sub(r"^layers\.(\d+)\.", lambda match: f"layers.{int(match[1]) + 1}.", name)
        return re.sub(r"^midlayer\.", f"{first_layer}.", name)

    return {file_name(name): tensor for name, tensor in tensors.items()}
