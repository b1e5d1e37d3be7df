"""An evaluation's results for people: a console table, and one self-contained HTML page."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from draftwing.charts import as_words, bar_chart, line_chart
from draftwing.drafts.kinds import PLAIN
from draftwing.evaluation.evaluate import Skipped
from draftwing.evaluation.figures import Ablation, Figures, ResultRow
from draftwing.intervals import Interval

Cells = Sequence[object]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0.8rem 0 } caption { text-align: left; font-weight: 600 }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { background: #f4f4f4 }
.bad { color: #b00020; font-weight: 600 } .note { color: #555; max-width: 50rem } figure { margin: 1rem 0 }
figcaption { font-weight: 600 } .scroll { overflow-x: auto } svg { max-width: 100%; height: auto }
@media print { @page { size: A4 landscape } body { font-size: 11px; max-width: none } figure { break-inside: avoid } }
"""
MEANINGS = """tokens/s: new tokens over wall time, prefill included. Speed-up: over plain decoding by the same
engine, on the same turns. tau: tokens per target pass, the bonus token included; 1 is no gain. Acceptance at a
depth: of the cycles that accepted the parent, those that accepted the node. Neither counts what a text's end cut
off. n-alpha: on chains, acceptance where n of the features that the draft reads are its own. Identical: turns whose
output equals plain decoding's; other engines are compared at temperature 0 only, where their sampling cannot
differ. Brackets: 95 % bootstrap intervals over prompts."""


@dataclass(frozen=True)
class Report:
    """Everything that a report shows. `memory` says what peak memory is of."""

    title: str
    rows: Sequence[ResultRow]
    ablations: Sequence[Ablation]
    skipped: Sequence[Skipped]
    warnings: Sequence[str]
    memory: str
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]


def as_tables(report: Report) -> Group:
    """The results for the console, a table for each data set and temperature."""
    tables: dict[str, Table] = {}
    for row in report.rows:
        title = f"{row.data}, T = {row.temperature:g}"
        if title not in tables:
            tables[title] = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True)
            tables[title].add_column("method", overflow="fold")
            for column in ("tokens/s", "speed-up", "tau", "same", "turns"):
                tables[title].add_column(column, justify="right", no_wrap=True)
        speed = f"{row.figures.tokens_per_second.value:.0f}" if row.figures else ""
        tables[title].add_row(row.method, speed, *_main_cells(row)[1:])
    return Group(report.title, *tables.values())


def remarks(report: Report) -> list[str]:
    """One line for each thing that did not go as asked: warnings, failures, turns left out."""
    lines = list(report.warnings)
    lines += [f"{row.method} on {row.data} at T = {row.temperature:g} failed: {row.failure}"
              for row in report.rows if row.failure]  # fmt: skip
    return lines + [f"{skip.data}: {skip.name}, turn {skip.turn} skipped: {skip.reason}" for skip in report.skipped]


def as_html(report: Report) -> str:
    """The page."""
    datas = list(dict.fromkeys(row.data for row in report.rows))
    sections = [f"<h1>{escape(report.title)}</h1>", f'<p class="note">{MEANINGS}</p>']
    if lines := remarks(report):
        sections.append("<ul>" + "".join(f'<li class="bad">{escape(line)}</li>' for line in lines) + "</ul>")
    for data in datas:
        sections += _data_section(data, [row for row in report.rows if row.data == data], report)
    sections += [_published_section(datas), _settings_section(report)]
    head = f'<meta charset="utf-8"><title>{escape(report.title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(sections)}</body></html>\n'


def _data_section(data: str, rows: Sequence[ResultRow], report: Report) -> list[str]:
    parts = [f"<h2>{escape(data)}</h2>"]
    temperatures = list(dict.fromkeys(row.temperature for row in rows))
    for temperature in temperatures:
        here = [row for row in rows if row.temperature == temperature]
        at = f"T = {temperature:g}"
        header = ("method", "tokens/s", "speed-up", "tau", "identical", "turns", "tokens", report.memory)
        cells = [(row.method, *_main_cells(row), _num_tokens(row), _gibibytes(row.peak_bytes)) for row in here]
        parts.append(_html_table(f"{data}, {at}", header, cells))
        parts.append(_figure(f"Speed-up over plain decoding, {at}", bar_chart(_bars(here, _speedup), mark=1.0)))
        parts.append(_figure(f"tau, {at}", bar_chart(_bars(here, _tau), mark=1.0)))
        parts += _acceptance_parts(here, at)
        parts.append(_stage_table(here, at))
        parts += _category_tables(here, at)
        parts.append(_ablation_table([a for a in report.ablations if (a.data, a.temperature) == (data, temperature)]))
    if len(temperatures) > 1:
        parts.append(_figure("tau against temperature", line_chart(_tau_lines(rows), "temperature", "tau")))
    return parts


def _main_cells(row: ResultRow) -> tuple[str, str, str, str, str]:
    """tokens/s, speed-up, tau, identical, turns; of a failed method, what it did before."""
    turns = f"{row.figures.num_turns if row.figures else 0}/{row.num_expected}"
    turns = "FAILED " + turns if row.failure else turns
    if row.figures is None:
        return "", "", "", "", turns
    figures = row.figures
    share = figures.identical_share
    identical = "" if share is None else "all" if share == 1 else f"{share:.0%}"
    speed = figures.tokens_per_second
    speed_text = f"{speed.value:.0f} [{speed.low:.0f}, {speed.high:.0f}]"
    return speed_text, _shown(figures.speedup), _shown(figures.acceptance_length), identical, turns


def _acceptance_parts(rows: Sequence[ResultRow], at: str) -> list[str]:
    """Acceptance by depth as a table, and by step on chains as a figure."""
    drafting = [row for row in rows if row.acceptance_rate]
    depth = max((len(row.acceptance_rate) for row in drafting), default=0)
    if not depth:
        return []
    cells = [
        (
            row.method,
            *(f"{rate.rate:.2f} ({rate.num_reached:.0f})" if rate.num_reached else "" for rate in row.acceptance_rate),
        )
        for row in drafting
    ]
    parts = [
        _html_table(
            f"Acceptance by depth (of so many cycles of a repeat), {at}",
            ("method", *map(str, range(1, depth + 1))),
            cells,
        )
    ]
    chains = {row.method: list(enumerate(row.n_alpha)) for row in rows if row.n_alpha}
    if chains:
        chart = line_chart(chains, "n: features of the draft's own", "n-alpha", y_most=1.0)
        parts.append(_figure(f"Acceptance by step on chains (n-alpha), {at}", chart))
    return parts


def _stage_table(rows: Sequence[ResultRow], at: str) -> str:
    staged = [row for row in rows if row.stage_seconds]
    header = ("method", *(staged[0].stage_seconds if staged else ()), "sum")
    cells = [
        (row.method, *(f"{s:.2f}" for s in row.stage_seconds.values()), f"{sum(row.stage_seconds.values()):.2f}")
        for row in staged
    ]
    return _html_table(f"Seconds by stage, {at}", header, cells)


def _category_tables(rows: Sequence[ResultRow], at: str) -> list[str]:
    columns: dict[str, Callable[[Figures], Interval | None]] = {
        "Speed-up": lambda figures: figures.speedup,
        "tau": lambda figures: figures.acceptance_length,
    }
    names = sorted({name for row in rows for name in row.by_category})
    if not names:
        return []
    tables = []
    for title, column in columns.items():
        cells = []
        for row in rows:
            values = [column(row.by_category[name]) if name in row.by_category else None for name in names]
            if any(values):
                cells.append((row.method, *(f"{value.value:.2f}" if value else "" for value in values)))
        tables.append(_html_table(f"{title} by category, {at}", ("method", *names), cells))
    return tables


def _ablation_table(ablations: Sequence[Ablation]) -> str:
    header = ("what", "with", "without", "ratio of taus", "ratio of tokens/s")
    cells = [
        (a.what, a.with_it, a.without, _shown(a.acceptance_length_ratio), _shown(a.speed_ratio)) for a in ablations
    ]
    return _html_table("What one choice changes", header, cells)


def _published_section(datas: Sequence[str]) -> str:
    header = ("target", "method", "data", "T", "speed-up", "tau", "source")
    cells = [
        (f.target, f.method, f.data, f"{f.temperature:g}", f"{f.speedup:.2f}", f"{f.acceptance_length:.2f}", f.source)
        for f in sorted(published_figures(datas), key=lambda f: (f.data, f.temperature, f.target))
    ]
    note = (
        "Printed in the papers: other targets, other machines, other prompts' lengths. Nothing here was measured. "
        "Their tau counts what the last cycle accepted beyond a text's end, which ours does not: it is a few percent "
        "higher where texts are short."
    )
    table = _html_table("", header, cells)
    return (
        f'<h2>Published, other targets</h2><p class="note">{note}</p><details><summary>Show</summary>{table}</details>'
    )


def _settings_section(report: Report) -> str:
    pairs = [(name, as_words(value)) for name, value in (*report.settings.items(), *report.provenance.items())]
    return "<h2>How it was measured</h2>" + _html_table("", ("setting", "value"), pairs)


def _bars(rows: Sequence[ResultRow], column: Callable[[ResultRow], Interval | None]) -> dict[str, Interval]:
    return {row.method: value for row in rows if (value := column(row)) is not None}


def _tau_lines(rows: Sequence[ResultRow]) -> dict[str, list[tuple[float, float]]]:
    """tau by temperature of every method that drafts."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.method != PLAIN and (tau := _tau(row)) is not None:
            lines.setdefault(row.method, []).append((row.temperature, tau.value))
    return lines


def _speedup(row: ResultRow) -> Interval | None:
    return row.figures.speedup if row.figures else None


def _tau(row: ResultRow) -> Interval | None:
    return row.figures.acceptance_length if row.figures else None


def _num_tokens(row: ResultRow) -> int:
    return row.figures.num_tokens if row.figures else 0


def _gibibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def _shown(interval: Interval | None) -> str:
    return "" if interval is None else str(interval)


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>" if svg else ""


def _html_table(caption: str, header: Cells, rows: Sequence[Cells]) -> str:
    """A table; nothing for one without rows. Short rows are filled up."""
    if not rows:
        return ""
    lines = ["".join(f"<th>{escape(str(name))}</th>" for name in header)]
    for row in rows:
        filled = [*row, *[""] * (len(header) - len(row))]
        lines.append("".join(f"<td>{escape(str(cell))}</td>" for cell in filled))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><caption>{escape(caption)}</caption>{body}</table></div>'


FILE = Path(__file__).parent / "published.json"
"""Tables of `[target, method, [speed-up, tau], ...]`, one pair per column; batch size 1.

Their tau counts tokens that the last cycle accepted beyond a text's end, ours does not (docs/evaluation.md).

EAGLE-2 on DeepSeek-R1-Distill and CNN/DM at temperature 0 is given as printed, though no speed-up can exceed its tau.
"""


@dataclass(frozen=True)
class PublishedFigure:
    """A printed speed-up over plain decoding and tau; SpS: a small draft model, PLD: prompt lookup."""

    source: str
    target: str
    method: str
    data: str
    temperature: float
    speedup: float
    acceptance_length: float


def published_figures(data: Collection[str]) -> list[PublishedFigure]:
    """The papers' figures on these data sets; if they have none of them, those on MT-bench."""
    figures = [
        PublishedFigure(table["source"], target, method, column, table["temperature"], *pair)
        for table in json.loads(FILE.read_text(encoding="utf-8"))
        for target, method, *pairs in table["rows"]
        for column, pair in zip(table["columns"], pairs, strict=True)
    ]
    return [f for f in figures if f.data in data] or [f for f in figures if f.data == "mt_bench"]
