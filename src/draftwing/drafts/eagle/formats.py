"""The published formats of EAGLE heads: names, options and conventions, translated to ours (save_head.py writes them).

eagle1        EAGLE-1/2 files: fc [D, 2D], layers.0 without input norm, no output head
eagle3        EAGLE-3 files: fc [D, 3D], midlayer.* (or layers.0.*), norm, lm_head [Vd, D], d2t offsets, t2d mask;
              without fc the features are the state, without lm_head the target's output head is used
speculators   the same tensors as layers.0.*, the configuration nested in transformer_layer_config

A file without embed_tokens is of a head that reads the target's embedding.

fields.py says what becomes of each field of a config.json.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from draftwing.drafts.eagle.fields import LAYER_IDS, rope_of, sliding_window
from draftwing.drafts.fit import TargetSizes, Tensors
from draftwing.layers import DraftConfig
from draftwing.target.hidden_states import NORMED

HeadFormat = Literal["eagle1", "eagle3", "speculators"]

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
class HeadOptions:
    """What a user says of a head instead of its file, under config.json's names; None leaves it to the file.

    Attributes:
        aux_layers: EAGLE-3's feature layers, as numbers of hidden states (the files' convention is ambiguous in the
            wild): i is the output of layer i, -1 the state behind the final norm.
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


OUTPUT_IDS = "target_layer_ids"
FROM_FILE = HeadOptions()
"""Everything as the file says."""
OPTIONAL_NORMS = {"fc_norm": "fc_norm.", "norm_before_fc": "input_norm."}
"""Options that a file decides by having these tensors, by their names' beginnings."""


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's feature layers: 2, n//2, n-3 (reference code).

    Raises:
        ValueError: the target is so shallow that they coincide.
    """
    layers = (2, num_layers // 2, num_layers - 3)
    if not 0 < layers[0] < layers[1] < layers[2]:
        raise ValueError(f"aux_layers: a target of {num_layers} layers has no default; name them in ascending order")
    return layers


def default_or_none(num_layers: int) -> tuple[int, ...] | None:
    """The same, None for so shallow a target."""
    try:
        return default_aux_layers(num_layers)
    except ValueError:
        return None


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
    tensors = {name: tensor for name, tensor in _bare(tensors).items() if not IGNORED_TENSORS.match(name)}
    head_format = format_of(values, tensors) or "eagle1"
    if head_format == "eagle1" and "fc.weight" not in tensors:
        raise ValueError("fc.weight: missing; this is no EAGLE head")
    if head_format == "speculators" and values["speculators_model_type"] != "eagle3":
        raise ValueError(f"speculators_model_type: expected eagle3, got {values['speculators_model_type']!r}")
    layer_values = _required(values, "transformer_layer_config") if head_format == "speculators" else values
    layer_values = {name: value for name, value in layer_values.items() if value is not None}
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
    num_draft = _draft_vocab_size(values, layer_values, tensors)
    target_ids = _take_target_ids(tensors, layer_values["vocab_size"], num_draft, options.d2t == "absolute")
    config = _eagle3_config(values, layer_values, tensors, target, options)
    return HeadFile(head_format, dataclasses.replace(config, draft_vocab_size=num_draft), target_ids, tensors)


def _draft_vocab_size(values: Mapping[str, Any], layer_values: Mapping[str, Any], tensors: Tensors) -> int:
    """The output head's rows. A tied head's own embedding is put in the output head's place among the tensors."""
    vocab_size = int(_required(layer_values, "vocab_size"))
    stated = values.get("draft_vocab_size", layer_values.get("draft_vocab_size"))
    if "lm_head.weight" not in tensors and layer_values.get("tie_word_embeddings") and "embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    if "lm_head.weight" in tensors:
        rows = tensors["lm_head.weight"].shape[0]
        if stated not in (None, rows):
            raise ValueError(f"draft_vocab_size: config.json says {stated}, lm_head.weight has {rows} rows")
        return rows
    num_draft = len(tensors["d2t"]) if "d2t" in tensors else stated or vocab_size
    if num_draft != vocab_size:
        raise ValueError(
            f"lm_head.weight: missing; the target's output head can take its place for all {vocab_size} tokens alone, "
            f"and this head drafts {num_draft}"
        )
    return vocab_size


def format_of(values: Mapping[str, Any], tensors: Tensors) -> HeadFormat | None:
    """Which format files are in, None if they hold no EAGLE head.

    EAGLE-1's may name a causal language model's architecture, but have `fc`.
    """
    names = _bare(tensors)
    if "speculators_model_type" in values:
        return "speculators"
    if any(name == "d2t" or name.startswith("midlayer.") or "hidden_norm" in name for name in names):
        return "eagle3"
    return "eagle1" if "fc.weight" in names and any(name.startswith("layers.") for name in names) else None


def _bare(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def _canonical_names(tensors: Tensors) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        name = AUX_NORM_NAMES.get(name, name)
        name = re.sub(r"^layers\.0\.", "midlayer.", name)
        # Layer i of the file is entry i - 1 of our list of further layers.
        name = re.sub(r"^layers\.(\d+)\.", lambda match: f"layers.{int(match[1]) - 1}.", name)
        renamed[name] = tensor
    return renamed


def _take_target_ids(tensors: Tensors, vocab_size: int, num_draft: int, is_absolute: bool) -> torch.Tensor | None:
    """Remove d2t and t2d from the tensors and return absolute ids, None for the identity."""
    stored, mask = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if stored is None and mask is not None and num_draft != vocab_size:
        return _ids_of_mask(mask, num_draft)
    if stored is None:
        if num_draft != vocab_size:
            raise ValueError(f"d2t: missing, and lm_head.weight has {num_draft} rows for {vocab_size} tokens")
        return None
    if stored.shape != (num_draft,):
        raise ValueError(f"d2t: expected {num_draft} entries (rows of lm_head.weight), got {tuple(stored.shape)}")
    numbers = torch.arange(num_draft, device=stored.device)
    absolute, offset = stored.to(torch.int64), stored.to(torch.int64) + numbers
    target_ids, others, other = (absolute, offset, "offsets") if is_absolute else (offset, absolute, "absolute")
    if stored.is_meta:
        return target_ids
    if num_draft == vocab_size:
        mask = None  # of a whole vocabulary it can only be all true, and often nobody has filled it in
    if problem := _vocab_problem(target_ids, mask, vocab_size):
        fits = _vocab_problem(others, mask, vocab_size) is None
        hint = f"; read the other way its numbers fit: pass d2t={other!r} (--d2t {other})" if fits else ""
        raise ValueError(problem + hint)
    return None if torch.equal(target_ids, numbers) and num_draft == vocab_size else target_ids


def _ids_of_mask(mask: torch.Tensor, num_draft: int) -> torch.Tensor:
    """The draft tokens' ids from t2d alone: those that it marks, ascending, as every trainer numbers them."""
    if mask.is_meta:
        return torch.empty(num_draft, dtype=torch.int64, device="meta")
    ids = mask.bool().nonzero().squeeze(1)
    if len(ids) != num_draft:
        raise ValueError(f"t2d: marks {len(ids)} tokens for the {num_draft} rows of lm_head.weight, and d2t is missing")
    return ids


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
    nested = values.get("eagle_config") or {}
    chosen: dict[str, Any] = {
        "fc_norm": "fc_norm.0.weight" in tensors,
        "norm_before_fc": "input_norm.weight" in tensors,
        "norm_output": bool(values.get("norm_output", nested.get("norm_output", False))),
        # Where it is absent, the servers read False in EAGLE-3 files and True in speculators'.
        "norm_before_residual": bool(values.get("norm_before_residual", "speculators_model_type" in values)),
    }
    chosen |= {name: value for name, value in options.given.items() if name in chosen}
    num_features, has_fc = count_features(tensors, target_hidden_size), "fc.weight" in tensors
    return DraftConfig(
        **common,
        **chosen,
        aux_layers=_aux_layers(values, num_features, has_fc, target, options),
        draft_vocab_size=common["vocab_size"],
        target_hidden_size=target_hidden_size,
        num_hidden_layers=1 + _count_layers(tensors),
        has_fc=has_fc,
        own_lm_head="lm_head.weight" in tensors,
    )


def count_features(tensors: Tensors, target_hidden_size: int) -> int:
    """How many of the target's states the head reads: one where there is no fc to join several."""
    if "fc.weight" not in tensors:
        return 1
    width = tensors["fc.weight"].shape[1]
    if width % target_hidden_size or not width:
        raise ValueError(
            f"fc.weight: reads {width} features, no multiple of the target's hidden size {target_hidden_size}"
        )
    return int(width // target_hidden_size)


def _aux_layers(
    values: Mapping[str, Any], num_features: int, has_fc: bool, target: TargetSizes | None, options: HeadOptions
) -> tuple[int, ...]:
    """The feature layers of an EAGLE-3 head; empty where only the target tells and there is none."""
    nested = values.get("eagle_config") or {}
    uses_last = values.get("use_aux_hidden_state", nested.get("use_aux_hidden_state")) is False
    layers = options.aux_layers or ((NORMED,) if uses_last else _stored_aux_layers(values, target))
    if not has_fc and len(layers or ()) != 1:
        raise ValueError("fc.weight: missing; only a head that reads one state (use_aux_hidden_state: false) has none")
    if layers is None and target is not None and num_features == 3:
        layers = default_aux_layers(target.num_layers)
    if layers and len(layers) != num_features:
        raise ValueError(f"aux_layers: fc.weight reads {num_features} layers, but {layers} were named")
    return tuple(layers or ())


def _stored_aux_layers(values: Mapping[str, Any], target: TargetSizes | None) -> tuple[int, ...] | None:
    """The file's feature layers as numbers of hidden states.

    The servers' key at the top level holds those; the same key in `eagle_config` (SpecForge, Model-Optimizer) and
    `target_layer_ids` (DeepSpec) count layers from 0 and mean their outputs, one less.

    Raises:
        ValueError: lists that contradict each other, or one whose convention is not known.
    """
    nested = values.get("eagle_config") or {}
    found = {
        f"eagle_config.{LAYER_IDS}": _numbers(nested.get(LAYER_IDS), target, shift=1),
        f"eagle_config.{OUTPUT_IDS}": _numbers(nested.get(OUTPUT_IDS), target, shift=1),
        OUTPUT_IDS: _numbers(values.get(OUTPUT_IDS), target, shift=1),
        LAYER_IDS: _numbers(values.get(LAYER_IDS), target),
        "aux_hidden_state_layer_ids": _numbers(values.get("aux_hidden_state_layer_ids"), target),
    }
    lists = {name: layers for name, layers in found.items() if layers}
    if values.get("layer_ids") and not lists:
        raise ValueError(
            f"layer_ids: {values['layer_ids']} may count layers from 0 or from 1; pass aux_layers (--aux-layers), "
            "where i is the output of layer i"
        )
    if len(set(lists.values())) > 1:
        said = ", ".join(f"{name} means {list(layers)}" for name, layers in lists.items())
        raise ValueError(f"aux_layers: the file's lists contradict each other ({said}); pass aux_layers (--aux-layers)")
    return next(iter(lists.values()), None)


def _numbers(ids: Sequence[int] | None, target: TargetSizes | None, shift: int = 0) -> tuple[int, ...]:
    """Layer ids as numbers of hidden states; negative ones count from the last layer, as in Python."""
    if any(layer < 0 for layer in ids or ()) and target is None:
        return ()
    return tuple(layer + shift + (target.num_layers if target and layer < 0 else 0) for layer in ids or ())


def _common_config(values: Mapping[str, Any], tensors: Tensors, layer: str) -> dict[str, Any]:
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        _required(values, name)
    if f"{layer}.self_attn.q_proj.weight" not in tensors:
        raise ValueError(f"{layer}.self_attn.q_proj.weight: missing from the head's file")
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
        "hidden_act": values.get("hidden_act") or "silu",
        "sliding_window": sliding_window(values, _count_layers(tensors) + (layer == "midlayer")),
        "attention_bias": f"{layer}.self_attn.q_proj.bias" in tensors,
        "output_bias": f"{layer}.self_attn.o_proj.bias" in tensors,
        "mlp_bias": f"{layer}.mlp.gate_proj.bias" in tensors,
        "fc_bias": "fc.bias" in tensors,
        "qk_norm": f"{layer}.self_attn.q_norm.weight" in tensors,
    }


def _required(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ValueError(f"{name}: missing from the head's config.json")
    return values[name]


def _rope_parameters(values: Mapping[str, Any], options: HeadOptions) -> dict[str, Any]:
    """RoPE settings as the file says or the user, who speaks in the older `rope_theta` and `rope_scaling`."""
    parameters = rope_of(values)
    if options.rope_scaling is not None:
        kept = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
        parameters = rope_of({**values, "rope_parameters": {**kept, **options.rope_scaling}})
    return parameters | ({} if options.rope_theta is None else {"rope_theta": options.rope_theta})


def verifier_name(values: Mapping[str, Any]) -> str:
    """The target that a config.json says its head was made for, empty if it names none (only speculators' do)."""
    verifier = (values.get("speculators_config") or {}).get("verifier") or {}
    return str(verifier.get("name_or_path") or "")


def _count_layers(tensors: Tensors) -> int:
    numbers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    return len(numbers)
