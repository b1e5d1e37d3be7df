"""What a head file holds, and what does not fit: the facts behind most low acceptance."""

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from transformers import AutoConfig

from draftwing.checkpoint.formats import TargetSizes, read_head
from draftwing.checkpoint.load import (
    expected_shapes,
    fit_problems,
    read_head_files,
    resolve_head,
    resolve_target,
    tensor_problems,
)

NETWORK_OPTIONS = (
    "fc_norm",
    "norm_output",
    "norm_before_residual",
    "norm_before_fc",
    "attention_bias",
    "fc_bias",
    "qk_norm",
)


@dataclass(frozen=True)
class HeadReport:
    """A head's facts. `problems` are errors on loading; `notes` are things worth knowing."""

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
    options: list[str]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inspect_head(name: str, target: str | None = None) -> HeadReport:
    """Read a head and report on it; with a target, check that they fit (only the target's config is read)."""
    folder = resolve_head(name)
    values, tensors = read_head_files(folder)
    sizes = None if target is None else target_sizes(target)
    head = read_head(values, tensors, sizes)
    config = head.config
    problems = [] if sizes is None else fit_problems(head, sizes)
    problems += tensor_problems(expected_shapes(head), head.tensors)
    options = [option for option in NETWORK_OPTIONS if getattr(config, option)]
    weights = next(iter(head.tensors.values()))
    return HeadReport(
        folder=str(folder),
        format=head.format,
        dtype=str(weights.dtype).removeprefix("torch."),
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
        options=options,
        problems=problems,
        notes=_notes(values, head.is_eagle3, bool(config.aux_layers)),
    )


def _notes(values: dict[str, Any], is_eagle3: bool, has_aux_layers: bool) -> list[str]:
    notes = []
    layer_values = values.get("transformer_layer_config", values)
    if not (layer_values.get("rope_theta") or layer_values.get("rope_parameters")):
        notes.append("rope_theta is missing from config.json; 10000 is used, as in the reference training code")
    if is_eagle3 and not has_aux_layers:
        notes.append("the file names no feature layers; with a target of n layers they are 2, n//2 and n-3")
    return notes


def target_sizes(name: str) -> TargetSizes:
    """A target's sizes from its config alone."""
    try:
        config = AutoConfig.from_pretrained(resolve_target(name)).get_text_config()
    except OSError as error:
        raise ValueError(f"target: cannot read the config of {name!r}: {error}") from error
    return TargetSizes(config.hidden_size, config.num_hidden_layers, config.vocab_size)


def report_table(report: HeadReport) -> Table:
    """The report as people read it."""
    table = Table(show_header=False, title=report.folder)
    table.add_row("format", report.format)
    table.add_row("parameters", f"{report.num_parameters:,} ({report.dtype})")
    table.add_row(
        "network",
        f"{report.num_layers} layer, hidden size {report.hidden_size}, {report.num_heads} heads of {report.head_dim}, "
        f"{report.num_key_value_heads} key/value heads",
    )
    table.add_row("vocabulary", f"{report.draft_vocab_size:,} of {report.vocab_size:,} tokens")
    layers = ", ".join(map(str, report.aux_layers)) or ("last" if report.format == "eagle1" else "not named")
    table.add_row("feature layers", f"{layers} (hidden_states indices)")
    table.add_row("rope", ", ".join(f"{name} {value}" for name, value in report.rope_parameters.items()))
    table.add_row("options", ", ".join(report.options) or "none")
    for note in report.notes:
        table.add_row("note", note)
    for problem in report.problems:
        table.add_row("[red]does not fit[/red]", problem)
    if not report.problems:
        table.add_row("[green]complete[/green]", "every tensor is there, known and of the expected shape")
    return table
