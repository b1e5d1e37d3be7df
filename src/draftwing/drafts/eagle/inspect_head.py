"""What the files of an EAGLE head say, and what does not fit: the facts behind most low acceptance."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from draftwing.drafts.eagle.build_head import expected_shapes, fit_problems
from draftwing.drafts.eagle.fields import Fields, sort_fields
from draftwing.drafts.eagle.formats import HeadFile, default_or_none, read_head
from draftwing.drafts.family import DraftFiles, DraftReport, counted
from draftwing.drafts.fit import TargetSizes, broken_tensors, dtype_name, tensor_problems

NETWORK_OPTIONS = (
    *("fc_norm", "norm_output", "norm_before_residual", "norm_before_fc", "attention_bias", "output_bias", "mlp_bias"),
    *("fc_bias", "qk_norm"),
)
AS_CONFIGURED = (
    *("hidden_size", "num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size", "rope_parameters"),
    *("trained_length", "window"),
)
"""Facts of a report that a head's configuration has under the same names."""


@dataclass(frozen=True, kw_only=True)
class HeadReport(DraftReport):
    """A head's facts. The fields of its config.json are used, or change nothing, or are among the problems."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: list[int]
    rope_parameters: dict[str, Any]
    trained_length: int | None
    window: int
    options: list[str]
    used_fields: list[str]
    idle_fields: list[str]

    def rows(self) -> Iterator[tuple[str, str]]:
        yield (
            "network",
            f"{counted(self.num_layers, 'layer')}, hidden size {self.hidden_size}, "
            f"{self.num_heads} heads of {self.head_dim}, {self.num_key_value_heads} key/value heads",
        )
        yield "vocabulary", f"{self.draft_vocab_size:,} of {self.vocab_size:,} tokens"
        layers = ", ".join(map(str, self.aux_layers)) or ("last" if self.format == "eagle1" else "not named")
        yield "feature layers", f"{layers} (i is the output of layer i, -1 behind the final norm)"
        yield "rope", ", ".join(f"{name} {value}" for name, value in self.rope_parameters.items())
        source = "max_position_embeddings" if self.trained_length is None else "the length it was trained on"
        source = "sliding_window" if any(note.startswith("sliding_window") for note in self.notes) else source
        yield "reads", f"the last {self.window} tokens ({source})"
        yield "options", ", ".join(self.options) or "none"
        yield "fields used", ", ".join(self.used_fields)
        yield "fields that change nothing", ", ".join(self.idle_fields) or "none"


def inspect_head(files: DraftFiles, sizes: TargetSizes | None) -> HeadReport:
    """Report on a head's files, and with a target's sizes on whether it fits."""
    values, tensors = files.values, files.tensors
    head = read_head(values, tensors, sizes)
    config = head.config
    fields = sort_fields(values, tensors, head.is_eagle3)
    problems = [*([] if sizes is None else fit_problems(head, sizes)), *fields.refused]
    if not fields.refused:  # else it is another network, with other tensors
        problems += tensor_problems(expected_shapes(head), head.tensors)
    problems += broken_tensors(head.tensors)
    options = [option for option in NETWORK_OPTIONS if getattr(config, option)]
    return HeadReport(
        folder=str(files.folder),
        format=head.format,
        dtype=dtype_name(head.tensors),
        num_parameters=head.num_parameters,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        aux_layers=list(config.aux_layers),
        options=options,
        **{name: getattr(config, name) for name in AS_CONFIGURED},
        used_fields=fields.used,
        idle_fields=fields.idle,
        problems=problems,
        notes=_notes(values, head, sizes, fields),
    )


def _notes(values: dict[str, Any], head: HeadFile, target: TargetSizes | None, fields: Fields) -> list[str]:
    config, notes = head.config, list(fields.notes)
    layer_values = values.get("transformer_layer_config", values)
    if not (layer_values.get("rope_theta") or layer_values.get("rope_parameters")):
        notes.append("rope_theta is missing from config.json; 10000 is used, as in the reference training code")
    if config.sliding_window == config.window:
        notes.append(f"sliding_window: it reads the last {config.window} tokens, and drafted ones beside them")
    if head.is_eagle3 and not config.aux_layers:
        notes.append("the file names no feature layers; with a target of n layers they are 2, n//2 and n-3")
    if not config.has_fc:
        notes.append("the file has no fc: the target's last state, behind the final norm, is the draft's first")
    if not head.is_eagle3 and "embed_tokens.weight" not in head.tensors:
        notes.append("the file has no embedding: the target's is used")
    if not config.own_lm_head:
        notes.append("the file has no output head: the target's is used")
    ids = head.target_ids
    if ids is not None and torch.equal(ids, torch.arange(len(ids))):
        notes.append(f"d2t maps to the first {len(ids)} tokens; one that nobody has filled in looks the same")
    default = None if target is None else default_or_none(target.num_layers)
    for by, name in ((1, "one above"), (-1, "one below")):
        if default and config.aux_layers == tuple(layer + by for layer in default):
            notes.append(f"the feature layers are each {name} the usual ones; if little is accepted, try {default}")
    return notes
