"""What a draft's folder holds, and what does not fit: the facts behind most low acceptance."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from draftwing.drafts.eagle.fields import Fields, sort_fields
from draftwing.drafts.eagle.formats import (
    HeadFile,
    TargetSizes,
    Tensors,
    default_or_none,
    is_language_model,
    read_head,
)
from draftwing.drafts.fit import (
    BROKEN,
    broken_tensors,
    fit_problems,
    medusa_problems,
    tensor_problems,
    vocabulary_problems,
)
from draftwing.drafts.load import expected_medusa_shapes, expected_shapes, read_draft_files, resolve_draft
from draftwing.drafts.medusa.files import is_medusa, read_medusa
from draftwing.target.load import find_tokenizer, resolve_target
from draftwing.target.model import ATTENTION, TargetModel, one_line

NETWORK_OPTIONS = (
    "fc_norm",
    "norm_output",
    "norm_before_residual",
    "norm_before_fc",
    "attention_bias",
    "output_bias",
    "mlp_bias",
    "fc_bias",
    "qk_norm",
)


@dataclass(frozen=True)
class HeadReport:
    """A head's facts. `problems` are errors on loading, or make it useless; `notes` are things worth knowing.

    The fields of its config.json are used, or change nothing, or are among the problems.
    """

    folder: str
    format: str
    dtype: str
    num_parameters: int
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
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ModelReport:
    """The facts of a causal language model as a draft. `problems` are errors on loading.

    `num_parameters` counts tied weights once; `max_positions` is None where the configuration sets no limit,
    `target_vocab_size` where no target was named.
    """

    folder: str
    architecture: str
    dtype: str
    num_parameters: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_positions: int | None
    target_vocab_size: int | None = None
    format: str = "language_model"
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MedusaReport:
    """The facts of Medusa heads.

    `problems` are errors on loading, or make them useless; `notes` are things worth knowing.
    """

    folder: str
    dtype: str
    num_parameters: int
    num_heads: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    format: str = "medusa"
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Report = HeadReport | MedusaReport | ModelReport


def inspect_draft(name: str, target: str | None = None) -> Report:
    """Report on a draft: an EAGLE head, Medusa's heads or a causal language model.

    With a target, check that they fit; only the target's config and tokenizer are read.

    Raises:
        ValueError: a draft that cannot be read, a target whose config cannot, a language model that cannot be run over
            trees.
    """
    folder = resolve_draft(name)
    values, tensors = read_draft_files(folder)
    if is_language_model(values, tensors):
        return _inspect_model(folder, tensors, target)
    if is_medusa(values, tensors):
        return _inspect_medusa(folder, values, tensors, target)
    return _inspect_head(folder, values, tensors, target)


def _inspect_model(folder: Path, tensors: Tensors, target: str | None) -> ModelReport:
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):  # no weights: parameters are counted, and what the cycle needs of a model is checked
            network = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"draft: cannot make the model of {str(folder)!r}: {one_line(error)}") from error
    model, problems, target_vocab_size = TargetModel(network.eval(), role="draft"), [], None
    if target is not None:
        target_vocab_size = target_sizes(target).vocab_size
        tokenizers = find_tokenizer(str(folder)), find_tokenizer(target)
        problems = vocabulary_problems(model.vocab_size, target_vocab_size, *tokenizers)
    return ModelReport(
        folder=str(folder),
        architecture=type(network).__name__,
        dtype=_dtype_name(tensors),
        num_parameters=network.num_parameters(),
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        target_vocab_size=target_vocab_size,
        problems=problems,
    )


def _inspect_medusa(folder: Path, values: dict[str, Any], tensors: Tensors, target: str | None) -> MedusaReport:
    heads = read_medusa(values, tensors)
    config, notes = heads.config, []
    problems = [] if target is None else medusa_problems(config, target_sizes(target))
    problems += tensor_problems(expected_medusa_shapes(config), heads.tensors) + broken_tensors(heads.tensors)
    if (stated := values.get("medusa_num_heads")) not in (None, config.num_heads):
        notes.append(f"config.json says medusa_num_heads {stated}, the file has {config.num_heads}, which are all used")
    return MedusaReport(
        folder=str(folder),
        dtype=_dtype_name(heads.tensors),
        num_parameters=sum(tensor.numel() for tensor in heads.tensors.values()),
        num_heads=config.num_heads,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        problems=problems,
        notes=notes,
    )


def _dtype_name(tensors: Tensors) -> str:
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")


def _inspect_head(folder: Path, values: dict[str, Any], tensors: Tensors, target: str | None) -> HeadReport:
    sizes = None if target is None else target_sizes(target)
    head = read_head(values, tensors, sizes)
    config = head.config
    fields = sort_fields(values, tensors, head.is_eagle3)
    problems = [*([] if sizes is None else fit_problems(head, sizes)), *fields.refused]
    if not fields.refused:  # else it is another network, with other tensors
        problems += tensor_problems(expected_shapes(head), head.tensors)
    problems += broken_tensors(head.tensors)
    options = [option for option in NETWORK_OPTIONS if getattr(config, option)]
    return HeadReport(
        folder=str(folder),
        format=head.format,
        dtype=_dtype_name(head.tensors),
        num_parameters=head.num_parameters,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        draft_vocab_size=config.draft_vocab_size,
        aux_layers=list(config.aux_layers),
        rope_parameters=config.rope_parameters,
        trained_length=config.trained_length,
        window=config.window,
        options=options,
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
    if config.sliding_window is not None:
        notes.append(f"sliding_window: it reads the last {config.window} tokens, and drafted ones beside them")
    if head.is_eagle3 and not config.aux_layers:
        notes.append("the file names no feature layers; with a target of n layers they are 2, n//2 and n-3")
    if not config.has_fc:
        notes.append("the file has no fc: the target's last state, behind the final norm, is the draft's first")
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


def target_sizes(name: str) -> TargetSizes:
    """A target's sizes from its config alone."""
    try:
        config = AutoConfig.from_pretrained(resolve_target(name)).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"target: cannot read the config of {name!r}: {one_line(error)}") from error
    return TargetSizes(config.hidden_size, config.num_hidden_layers, config.vocab_size)


def report_table(report: Report, target: str | None = None) -> Table:
    """The report as people read it; `target` is the one that the draft was checked against."""
    table = Table(show_header=False, title=report.folder)
    table.add_row("format", report.format.replace("_", " "))
    table.add_row("parameters", f"{report.num_parameters:,} ({report.dtype})")
    verdict = "complete", "every tensor is there, known and of the expected shape"
    if isinstance(report, HeadReport):
        _add_head_rows(table, report)
    elif isinstance(report, MedusaReport):
        _add_medusa_rows(table, report)
    else:
        _add_model_rows(table, report)
        checked = "" if report.target_vocab_size is None else ", and nothing contradicts the target's vocabulary"
        verdict = "can draft", f"its cache can be rolled back{checked}"
    for problem in report.problems:
        label = "broken" if problem.endswith(BROKEN) else "does not fit"
        table.add_row(f"[red]{label}[/red]", problem)
    if not report.problems:
        table.add_row(f"[green]{verdict[0]}[/green]", verdict[1])
        if target is not None:
            table.add_row("[green]fits[/green]", target)
    return table


def _add_head_rows(table: Table, report: HeadReport) -> None:
    table.add_row(
        "network",
        f"{report.num_layers} layer, hidden size {report.hidden_size}, {report.num_heads} heads of {report.head_dim}, "
        f"{report.num_key_value_heads} key/value heads",
    )
    table.add_row("vocabulary", f"{report.draft_vocab_size:,} of {report.vocab_size:,} tokens")
    layers = ", ".join(map(str, report.aux_layers)) or ("last" if report.format == "eagle1" else "not named")
    table.add_row("feature layers", f"{layers} (i is the output of layer i, -1 behind the final norm)")
    table.add_row("rope", ", ".join(f"{name} {value}" for name, value in report.rope_parameters.items()))
    source = "max_position_embeddings" if report.trained_length is None else "the length it was trained on"
    source = "sliding_window" if any(note.startswith("sliding_window") for note in report.notes) else source
    table.add_row("reads", f"the last {report.window} tokens ({source})")
    table.add_row("options", ", ".join(report.options) or "none")
    table.add_row("fields used", ", ".join(report.used_fields))
    table.add_row("fields that change nothing", ", ".join(report.idle_fields) or "none")
    for note in report.notes:
        table.add_row("note", note)


def _add_medusa_rows(table: Table, report: MedusaReport) -> None:
    blocks = f"{report.num_layers} residual block" + ("s" if report.num_layers > 1 else "")
    table.add_row("network", f"{report.num_heads} heads of {blocks}, hidden size {report.hidden_size}")
    table.add_row("vocabulary", f"{report.vocab_size:,} tokens")
    for note in report.notes:
        table.add_row("note", note)


def _add_model_rows(table: Table, report: ModelReport) -> None:
    table.add_row("network", f"{report.architecture}, {report.num_layers} layers, hidden size {report.hidden_size}")
    target_size = report.target_vocab_size
    of_target = "" if target_size is None else f"; the target has {target_size:,}"
    table.add_row("vocabulary", f"{report.vocab_size:,} tokens{of_target}")
    table.add_row("positions", "no limit" if report.max_positions is None else f"{report.max_positions:,}")
