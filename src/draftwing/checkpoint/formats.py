"""The published formats of EAGLE heads: names, options and conventions, translated to ours and back here only.

eagle1        EAGLE-1/2 files: fc [D, 2D], layers.0 without input norm, own embedding, no output head
eagle3        EAGLE-3 files: fc [D, 3D], midlayer.* (or layers.0.*), norm, lm_head [Vd, D], d2t offsets, t2d mask
speculators   the same tensors as layers.0.*, the configuration nested in transformer_layer_config
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from draftwing.models.layers import DraftConfig

HeadFormat = Literal["eagle1", "eagle3", "speculators"]
Tensors = dict[str, torch.Tensor]

AUX_NORM_NAMES = {"aux_norm_low.weight": "fc_norm.0.weight", "aux_norm_mid.weight": "fc_norm.1.weight",
                  "aux_norm_high.weight": "fc_norm.2.weight"}  # fmt: skip
# Buffers that older code saved.
IGNORED_TENSORS = re.compile(r".*rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class HeadFile:
    """A head file in our terms: which network, its configuration, vocabulary and parameters.

    `target_ids [Vd]` are absolute (None: the whole vocabulary); `tensors` are named as the network's parameters.
    """

    format: HeadFormat
    config: DraftConfig
    target_ids: torch.Tensor | None
    tensors: Tensors

    @property
    def is_eagle3(self) -> bool:
        return self.format != "eagle1"

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())


@dataclass(frozen=True)
class TargetSizes:
    """What a head's file leaves to its target."""

    hidden_size: int
    num_layers: int
    vocab_size: int


@dataclass(frozen=True)
class HeadOptions:
    """What a user says of a head instead of its file, under config.json's names; None leaves it to the file.

    Attributes:
        aux_layers: EAGLE-3's feature layers as hidden_states indices (the files' convention is ambiguous in the wild).
        rope_theta: some heads ship another value than they were trained with.
        rope_scaling: a mapping as in config.json; an empty one is none.
        norm_before_residual, norm_output: EAGLE-3 options that are in config.json alone.
        fc_norm, norm_before_fc: False ignores these norms' tensors.
        d2t: how its numbers are read: as `offsets`, the convention, or as `absolute` target ids.

    Raises:
        ValueError: d2t is neither of the two.
    """

    aux_layers: tuple[int, ...] | None = None
    rope_theta: float | None = None
    rope_scaling: Mapping[str, Any] | None = None
    norm_before_residual: bool | None = None
    norm_output: bool | None = None
    fc_norm: bool | None = None
    norm_before_fc: bool | None = None
    d2t: Literal["offsets", "absolute"] | None = None

    def __post_init__(self) -> None:
        if self.aux_layers is not None:
            object.__setattr__(self, "aux_layers", tuple(self.aux_layers))
        if self.d2t not in (None, "offsets", "absolute"):
            raise ValueError(f"d2t: expected offsets or absolute, got {self.d2t!r}")

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not left to the file."""
        return {name: value for name, value in vars(self).items() if value is not None}


FROM_FILE = HeadOptions()
"""Everything as the file says."""
OPTIONAL_NORMS = {"fc_norm": "fc_norm.", "norm_before_fc": "input_norm."}
"""Options that a file decides by having these tensors, by their names' beginnings."""


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's feature layers as hidden_states indices: 2, n//2, n-3 (reference code).

    Raises:
        ValueError: the target is so shallow that they coincide.
    """
    layers = (2, num_layers // 2, num_layers - 3)
    if not 0 < layers[0] < layers[1] < layers[2]:
        raise ValueError(f"aux_layers: a target of {num_layers} layers has no default; name them in ascending order")
    return layers


def read_head(
    values: Mapping[str, Any],
    tensors: Tensors,
    target: TargetSizes | None = None,
    options: HeadOptions = FROM_FILE,
) -> HeadFile:
    """Translate a head's configuration and tensors.

    Args:
        target: sizes of the target, for what the file does not say; None reads what the file alone determines.
        options: what overrides the file.

    Raises:
        ValueError: a tensor or field that contradicts the format, by name.
    """
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not IGNORED_TENSORS.match(name)}
    head_format = detect_format(values, tensors)
    layer_values = dict(_required(values, "transformer_layer_config") if head_format == "speculators" else values)
    layer_values["rope_parameters"] = _rope_parameters(layer_values, options)
    if head_format == "eagle1":
        for name in options.given.keys() - {"rope_theta", "rope_scaling"}:
            raise ValueError(f"{name}: only EAGLE-3 heads have it, and this is an EAGLE-1 head")
        tensors.pop("lm_head.weight", None)  # repacks carry the target's; EAGLE-1 always uses the target's own
        return HeadFile(head_format, _eagle1_config(layer_values, tensors), None, tensors)
    tensors = _canonical_names(tensors)
    for name, beginning in OPTIONAL_NORMS.items():
        if getattr(options, name) is False:
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(beginning)}
    target_ids = _take_target_ids(tensors, _required(layer_values, "vocab_size"), options.d2t == "absolute")
    config = _eagle3_config(values, layer_values, tensors, target, options)
    return HeadFile(head_format, config, target_ids, tensors)


def is_language_model(values: Mapping[str, Any], tensors: Tensors) -> bool:
    """Whether files hold a causal language model. EAGLE-1 heads name the architecture of one too, but have `fc`."""
    names_one = any(name.endswith("ForCausalLM") for name in values.get("architectures") or ())
    return names_one and not any(name.removeprefix("model.") == "fc.weight" for name in tensors)


def detect_format(values: Mapping[str, Any], tensors: Tensors) -> HeadFormat:
    """Which format a file is in, from what it holds."""
    if "speculators_model_type" in values:
        if values["speculators_model_type"] != "eagle3":
            raise ValueError(f"speculators_model_type: expected eagle3, got {values['speculators_model_type']!r}")
        return "speculators"
    if "fc.weight" not in tensors:
        raise ValueError("fc.weight: missing; this is no EAGLE head")
    is_eagle3 = any(name == "d2t" or name.startswith("midlayer.") or "hidden_norm" in name for name in tensors)
    return "eagle3" if is_eagle3 else "eagle1"


def _canonical_names(tensors: Tensors) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        name = AUX_NORM_NAMES.get(name, name)
        name = re.sub(r"^layers\.0\.", "midlayer.", name)
        # Layer i of the file is entry i - 1 of our list of further layers.
        name = re.sub(r"^layers\.(\d+)\.", lambda match: f"layers.{int(match[1]) - 1}.", name)
        renamed[name] = tensor
    return renamed


def _take_target_ids(tensors: Tensors, vocab_size: int, is_absolute: bool) -> torch.Tensor | None:
    """Remove d2t and t2d from the tensors and return absolute ids, None for the identity."""
    stored, mask = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if "lm_head.weight" not in tensors:
        raise ValueError("lm_head.weight: missing; an EAGLE-3 head has its own output head")
    draft_vocab_size = tensors["lm_head.weight"].shape[0]
    if stored is None:
        if draft_vocab_size != vocab_size:
            raise ValueError(f"d2t: missing, and lm_head.weight has {draft_vocab_size} rows for {vocab_size} tokens")
        return None
    if stored.shape != (draft_vocab_size,):
        raise ValueError(
            f"d2t: expected {draft_vocab_size} entries (rows of lm_head.weight), got {tuple(stored.shape)}"
        )
    numbers = torch.arange(draft_vocab_size, device=stored.device)
    absolute, offset = stored.to(torch.int64), stored.to(torch.int64) + numbers
    target_ids, others, other = (absolute, offset, "offsets") if is_absolute else (offset, absolute, "absolute")
    if stored.is_meta:
        return target_ids
    if problem := _vocab_problem(target_ids, mask, vocab_size):
        fits = _vocab_problem(others, mask, vocab_size) is None
        hint = f"; read the other way its numbers fit: pass d2t={other!r} (--d2t {other})" if fits else ""
        raise ValueError(problem + hint)
    return None if torch.equal(target_ids, numbers) and draft_vocab_size == vocab_size else target_ids


def _vocab_problem(target_ids: torch.Tensor, mask: torch.Tensor | None, vocab_size: int) -> str | None:
    """Why draft tokens cannot have these target ids, None if they can."""
    outside = target_ids[(target_ids < 0) | (target_ids >= vocab_size)]
    if outside.numel():
        return f"d2t: maps to token {int(outside[0])}, outside the target vocabulary of {vocab_size}"
    if target_ids.unique().numel() != target_ids.numel():
        return "d2t: maps two draft tokens to one target token"
    if mask is not None and not torch.equal(mask.bool().nonzero().squeeze(1), target_ids.sort().values):
        return "t2d: marks other tokens than d2t maps to"
    return None


def _eagle1_config(values: Mapping[str, Any], tensors: Tensors) -> DraftConfig:
    common = _common_config(values, tensors, "layers.0")
    return DraftConfig(
        **common,
        draft_vocab_size=common["vocab_size"],
        target_hidden_size=common["hidden_size"],
        num_hidden_layers=_count_layers(tensors),
    )


def _eagle3_config(
    values: Mapping[str, Any],
    layer_values: Mapping[str, Any],
    tensors: Tensors,
    target: TargetSizes | None,
    options: HeadOptions,
) -> DraftConfig:
    common = _common_config(layer_values, tensors, "midlayer")
    target_hidden_size = values.get("target_hidden_size") or common["hidden_size"]
    num_features, remainder = divmod(tensors["fc.weight"].shape[1], target_hidden_size)
    if remainder or num_features == 0:
        raise ValueError(
            f"fc.weight: reads {tensors['fc.weight'].shape[1]} features, no multiple of the target's hidden size "
            f"{target_hidden_size}"
        )
    aux_layers = options.aux_layers or _stored_aux_layers(values)
    if aux_layers is None and target is not None and num_features == 3:
        aux_layers = default_aux_layers(target.num_layers)
    if aux_layers and len(aux_layers) != num_features:
        raise ValueError(f"aux_layers: fc.weight reads {num_features} layers, but {aux_layers} were named")
    chosen: dict[str, Any] = {
        "aux_layers": tuple(aux_layers or ()),
        "fc_norm": "fc_norm.0.weight" in tensors,
        "norm_before_fc": "input_norm.weight" in tensors,
        "norm_output": _norm_output(values),
        "norm_before_residual": _norm_before_residual(values),
    }
    chosen |= {name: value for name, value in options.given.items() if name in chosen}
    return DraftConfig(
        **common,
        **chosen,
        draft_vocab_size=tensors["lm_head.weight"].shape[0],
        target_hidden_size=target_hidden_size,
        num_hidden_layers=1 + _count_layers(tensors),
    )


def _norm_output(values: Mapping[str, Any]) -> bool:
    """Whether the normed output is fed back; absent means no in every format."""
    nested = values.get("eagle_config") or {}
    return bool(values.get("norm_output", nested.get("norm_output", False)))


def _norm_before_residual(values: Mapping[str, Any]) -> bool:
    """Absent means False in EAGLE-3 files and True in speculators', as the servers read them."""
    return bool(values.get("norm_before_residual", "speculators_model_type" in values))


def _stored_aux_layers(values: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The file's feature layers as hidden_states indices.

    speculators (and vLLM) store those indices; `eagle_config` (SpecForge, Model-Optimizer) stores the numbers of the
    layers whose outputs are read, one less.
    """
    key = "eagle_aux_hidden_state_layer_ids"
    nested = (values.get("eagle_config") or {}).get(key)
    if nested:
        return tuple(layer + 1 for layer in nested)
    stored = values.get(key)
    return tuple(stored) if stored else None


def _common_config(values: Mapping[str, Any], tensors: Tensors, layer: str) -> dict[str, Any]:
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        _required(values, name)
    for name in ("fc.weight", f"{layer}.self_attn.q_proj.weight"):
        if name not in tensors:
            raise ValueError(f"{name}: missing from the head's file")
    num_heads = values["num_attention_heads"]
    return {
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": values.get("num_key_value_heads") or num_heads,
        "head_dim": values.get("head_dim") or tensors[f"{layer}.self_attn.q_proj.weight"].shape[0] // num_heads,
        "vocab_size": values["vocab_size"],
        "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
        "max_position_embeddings": values.get("max_position_embeddings", 2048),
        "trained_length": values.get("trained_length"),
        "rope_parameters": values["rope_parameters"],
        "attention_bias": f"{layer}.self_attn.q_proj.bias" in tensors,
        "fc_bias": "fc.bias" in tensors,
        "qk_norm": f"{layer}.self_attn.q_norm.weight" in tensors,
    }


def _required(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ValueError(f"{name}: missing from the head's config.json")
    return values[name]


def _rope_parameters(values: Mapping[str, Any], options: HeadOptions) -> dict[str, Any]:
    """RoPE settings from the new `rope_parameters` or the old `rope_theta` and `rope_scaling`.

    A missing theta is 10000: the EAGLE-3 training code always used it, and its configs leave it out.
    """
    parameters = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    theta = options.rope_theta or parameters.get("rope_theta") or values.get("rope_theta") or 10000.0
    if options.rope_scaling is not None:
        parameters = dict(options.rope_scaling)
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    return parameters | {"rope_theta": theta}


def verifier_name(values: Mapping[str, Any]) -> str:
    """The target that a config.json says its head was made for, empty if it names none (only speculators' do)."""
    verifier = (values.get("speculators_config") or {}).get("verifier") or {}
    return str(verifier.get("name_or_path") or "")


def _count_layers(tensors: Tensors) -> int:
    numbers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    return len(numbers)


def write_head(head: HeadFile, target: TargetSizes, verifier: str = "") -> tuple[dict[str, Any], Tensors]:
    """A head's config.json and tensors in its format. `verifier` names the target in a speculators file."""
    config, tensors = head.config, dict(head.tensors)
    layer_values = _layer_values(config, "LlamaForCausalLMEagle3" if head.is_eagle3 else "LlamaForCausalLM")
    if not head.is_eagle3:
        return layer_values | {"bias": config.fc_bias}, tensors
    if head.target_ids is not None:
        tensors["d2t"] = head.target_ids - torch.arange(head.target_ids.numel())
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, head.target_ids, True)
    options: dict[str, Any] = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
    }
    if head.format == "speculators":
        return options | _speculators_values(config, layer_values, verifier), _file_names(tensors, "layers.0")
    for name in ("norm_before_residual", "norm_before_fc"):
        if getattr(config, name):
            options[name] = True  # no published EAGLE-3 engine but vLLM reads it; written only where it matters
    if config.aux_layers and config.aux_layers != _default_or_none(target.num_layers):
        key = "eagle_aux_hidden_state_layer_ids"
        output_ids = [layer - 1 for layer in config.aux_layers]
        options["eagle_config"] = {key: output_ids, "use_aux_hidden_state": True}
        options[key] = list(config.aux_layers)  # vLLM and llama.cpp read these, and without them their defaults
    return layer_values | options, _file_names(tensors, "midlayer")


def _layer_values(config: DraftConfig, architecture: str) -> dict[str, Any]:
    """The Llama part of a config.json."""
    values = {
        "model_type": "llama",
        "architectures": [architecture],
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": config.rope_parameters,
        # Older engines read these two instead.
        "rope_theta": config.rope_parameters["rope_theta"],
        "rope_scaling": rope_scaling_of(config.rope_parameters) or None,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": False,
    }
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
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
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


def _default_or_none(num_layers: int) -> tuple[int, ...] | None:
    try:
        return default_aux_layers(num_layers)
    except ValueError:
        return None


def rope_scaling_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json's older `rope_scaling` says of RoPE settings; nothing for the default type."""
    if parameters.get("rope_type", "default") == "default":
        return {}
    return {name: value for name, value in parameters.items() if name != "rope_theta"}
