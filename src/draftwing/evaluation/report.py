"""An evaluation's results for people: a console table, and one self-contained HTML page."""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from draftwing.charts import as_page
from draftwing.drafts.kinds import PLAIN
from draftwing.evaluation.evaluate import Skipped
from draftwing.evaluation.figures import Ablation, Figures, ResultRow
from draftwing.intervals import Interval

Cells = Sequence[object]
PAGE = Path(__file__).parent / "report.html"


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

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready results."""
        return {
            "rows": [row.as_dict() for row in self.rows],
            "ablations": [asdict(ablation) for ablation in self.ablations],
            "skipped": [asdict(skipped) for skipped in self.skipped],
            "warnings": self.warnings,
            "options": self.settings,
            "provenance": self.provenance,
        }


def as_tables(report: Report) -> Group:
    """The results for the console, a table for each data set and temperature."""
    tables: dict[str, Table] = {}
    for row in report.rows:
        title = f"{row.data}, T = {row.temperature:g}"
        if title not in tables:
            tables[title] = Table(title=escape(title), box=SIMPLE_HEAD, collapse_padding=True)
            tables[title].add_column("method", overflow="fold")
            for column in ("tokens/s", "speed-up", "tau", "same", "turns"):
                tables[title].add_column(column, justify="right", no_wrap=True)
        speed = f"{row.figures.tokens_per_second.value:.0f}" if row.figures else ""
        tables[title].add_row(escape(row.method), speed, *_main_cells(row)[1:])
    return Group(escape(report.title), *tables.values())


def remarks(report: Report) -> list[str]:
    """One line for each thing that did not go as asked: warnings, failures, turns left out."""
    lines = list(report.warnings)
    lines += [f"{row.method} on {row.data} at T = {row.temperature:g} failed: {row.failure}"
              for row in report.rows if row.failure]  # fmt: skip
    return lines + [f"{skip.data}: {skip.name}, turn {skip.turn} skipped: {skip.reason}" for skip in report.skipped]


def as_html(report: Report) -> str:
    """The page."""
    by_data: dict[str, dict[float, list[ResultRow]]] = {}
    for row in report.rows:
        by_data.setdefault(row.data, {}).setdefault(row.temperature, []).append(row)
    published = [
        (f.target, f.method, f.data, f"{f.temperature:g}", f"{f.speedup:.2f}", f"{f.acceptance_length:.2f}", f.source)
        for f in sorted(published_figures(by_data), key=lambda f: (f.data, f.temperature, f.target))
    ]
    return as_page(
        PAGE,
        report=report,
        remarks=remarks(report),
        by_data={data: [_part(rows, report) for rows in parts.values()] for data, parts in by_data.items()},
        tau_lines=lambda data: _tau_lines([row for row in report.rows if row.data == data]),
        published=published,
        settings=[*report.settings.items(), *report.provenance.items()],
    )


def _part(rows: Sequence[ResultRow], report: Report) -> dict[str, Any]:
    """What the page shows of a data set at a temperature: cells and headers of tables, lines and bars of charts."""
    data, temperature = rows[0].data, rows[0].temperature
    drafting, staged = [row for row in rows if row.acceptance_rate], [row for row in rows if row.stage_seconds]
    depth = max((len(row.acceptance_rate) for row in drafting), default=0)
    categories = sorted({name for row in rows for name in row.by_category})
    return {
        "at": f"T = {temperature:g}",
        "main": [
            (row.method, *_main_cells(row), row.figures.num_tokens if row.figures else 0, _gibibytes(row.peak_bytes))
            for row in rows
        ],
        "speedup": {row.method: row.figures.speedup for row in rows if row.figures and row.figures.speedup},
        "tau": {row.method: tau for row in rows if (tau := _tau(row))},
        "acceptance_header": ("method", *range(1, depth + 1)),
        "acceptance": [
            (row.method, *(f"{r.rate:.2f} ({r.num_reached:.0f})" if r.num_reached else "" for r in row.acceptance_rate))
            for row in drafting
        ],
        "chains": {row.method: list(enumerate(row.n_alpha)) for row in rows if row.n_alpha},
        "stage_header": ("method", *(staged[0].stage_seconds if staged else ()), "sum"),
        "stages": [
            (row.method, *(f"{s:.2f}" for s in (*row.stage_seconds.values(), sum(row.stage_seconds.values()))))
            for row in staged
        ],
        "category_header": ("method", *categories),
        "categories": {
            "Speed-up": _category_cells(rows, categories, lambda figures: figures.speedup),
            "tau": _category_cells(rows, categories, lambda figures: figures.acceptance_length),
        },
        "ablations": [
            (a.what, a.with_it, a.without, _shown(a.acceptance_length_ratio), _shown(a.speed_ratio))
            for a in report.ablations
            if (a.data, a.temperature) == (data, temperature)
        ],
    }


def _main_cells(row: ResultRow) -> tuple[str, str, str, str, str]:
    """tokens/s, speed-up, tau, identical, turns; of a failed method, what it did before."""
    turns = f"{row.figures.num_turns if row.figures else 0}/{row.num_expected}"
    turns = "FAILED " + turns if row.failure else turns
    if row.figures is None:
        return "", "", "", "", turns
    figures = row.figures
    share = figures.identical_share
    identical = "" if share is None else "all" if share == 1 else f"{math.floor(100 * share)}%"
    speed = figures.tokens_per_second
    speed_text = f"{speed.value:.0f} [{speed.low:.0f}, {speed.high:.0f}]"
    return speed_text, _shown(figures.speedup), _shown(figures.acceptance_length), identical, turns


def _category_cells(
    rows: Sequence[ResultRow], names: Sequence[str], column: Callable[[Figures], Interval | None]
) -> list[Cells]:
    """A column's figures by category, of the methods that have any."""
    cells: list[Cells] = []
    for row in rows:
        values = [column(row.by_category[name]) if name in row.by_category else None for name in names]
        if any(values):
            cells.append((row.method, *(f"{value.value:.2f}" if value else "" for value in values)))
    return cells


def _tau_lines(rows: Sequence[ResultRow]) -> dict[str, list[tuple[float, float]]]:
    """tau by temperature of every method that drafts."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.method != PLAIN and (tau := _tau(row)):
            lines.setdefault(row.method, []).append((row.temperature, tau.value))
    return lines


def _tau(row: ResultRow) -> Interval | None:
    return row.figures.acceptance_length if row.figures else None


def _gibibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GiB"


def _shown(interval: Interval | None) -> str:
    return "" if interval is None else str(interval)


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
