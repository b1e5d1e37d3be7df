"""What a draft's folder holds, and what does not fit."""

from rich.markup import escape
from rich.table import Table

from draftwing.drafts.family import DraftReport
from draftwing.drafts.fit import BROKEN, TargetSizes
from draftwing.drafts.kinds import family_of_files
from draftwing.drafts.load_draft import open_draft
from draftwing.target.load import read_target_config


def inspect_draft(name: str, target: str | None = None) -> DraftReport:
    """Report on a draft.

    With a target, check that they fit; only the target's config and tokenizer are read.

    Raises:
        ValueError: a draft that cannot be read, a target whose config cannot, a language model that cannot be run over
            trees.
    """
    files = open_draft(name)
    sizes = None if target is None else target_sizes(target)
    return family_of_files(files.values, files.tensors).kind.inspect(files, sizes, target)


def target_sizes(name: str) -> TargetSizes:
    """A target's sizes from its config alone."""
    config = read_target_config(name).get_text_config()
    return TargetSizes(config.hidden_size, config.num_hidden_layers, config.vocab_size)


def report_table(report: DraftReport, target: str | None = None) -> Table:
    """The report as people read it; `target` is the one that the draft was checked against."""
    table = Table(show_header=False, title=escape(report.folder))
    table.add_row("format", report.format.replace("_", " "))
    table.add_row("parameters", f"{report.num_parameters:,} ({report.dtype})")
    for row in report.rows():
        table.add_row(*row)
    for note in report.notes:
        table.add_row("note", note)
    for problem in report.problems:
        label = "broken" if problem.endswith(BROKEN) else "does not fit"
        table.add_row(f"[red]{label}[/red]", problem)
    if not report.problems:
        label, text = report.verdict
        table.add_row(f"[green]{label}[/green]", text)
        if target is not None:
            table.add_row("[green]fits[/green]", target)
    return table
