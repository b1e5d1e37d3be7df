"""Pages of small charts, as inline SVG (bars with intervals, and lines), and of values in words."""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, StrictUndefined, Template

COLOURS = ("#1f77b4", "#d95f02", "#2a9d5c", "#c2255c", "#7048a8", "#8a6d3b", "#0b8a9e", "#666666", "#b8860b", "#444bb5")
BAR, LINE = 420, 22
"""The width of a bar chart's bars, and the height of a bar's line, in pixels."""
WIDTH, HEIGHT, TOP = 460, 260, 26
"""A line chart's plot, and the space above it."""
LETTER = 7.5
"""The width that a letter is given, in pixels: text as a whole is narrower in any sans-serif font of 12 pixels."""
MOST_POINTS, MOST_TICKS = 600, 12
"""Of a line; and of an axis, beyond which only its ends are labelled."""


class Bar(Protocol):
    """A figure and the ends of its interval."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def as_page(template: Path, **values: Any) -> str:
    """A page from its template (Jinja), which may call this module's functions."""
    return _compiled(template).render(values)


@cache
def _compiled(template: Path) -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.globals |= {"as_words": as_words, "bar_chart": bar_chart, "line_chart": line_chart}
    return environment.from_string(template.read_text(encoding="utf-8"))


def bar_chart(bars: Mapping[str, Bar], mark: float | None = None) -> str:
    """Horizontal bars with their intervals as whiskers; `mark` draws a vertical line at a value."""
    if not bars:
        return "<p>Nothing was measured.</p>"
    most = max([bar.high for bar in bars.values()] + [mark or 0.0]) or 1.0
    label, beside = _room_for(bars), _room_for([f"{bar.value:.2f}" for bar in bars.values()])
    x = lambda value: label + BAR * value / most
    parts = []
    for index, (name, bar) in enumerate(bars.items()):
        top, middle = index * LINE + 3, index * LINE + LINE / 2
        parts += [
            _text(label - 8, middle + 4, name, "end"),
            f'<rect x="{label:.1f}" y="{top}" width="{x(bar.value) - label:.1f}" height="{LINE - 6}" '
            f'fill="{COLOURS[0]}"/>',
            f'<path d="M{x(bar.low):.1f} {middle}H{x(bar.high):.1f}" stroke="#111" stroke-width="2"/>',
            _text(x(bar.high) + 6, middle + 4, f"{bar.value:.2f}"),
        ]
    height = len(bars) * LINE
    if mark is not None:
        parts.append(f'<path d="M{x(mark):.1f} 0V{height}" stroke="#999" stroke-dasharray="4 3"/>')
    return _svg(label + BAR + beside, height, parts)


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, y_most: float | None = None
) -> str:
    """Lines of points `(x, y)` from y = 0 (or the lowest below) up, with a legend; what is no number is left out."""
    lines = {name: [point for point in line if all(map(math.isfinite, point))] for name, line in lines.items()}
    lines = {name: line[:: 1 + len(line) // MOST_POINTS] for name, line in lines.items()}
    points = [point for line in lines.values() for point in line]
    xs = sorted({x for x, _ in points})
    if not xs:
        return ""
    y_low, highest = min(0.0, *(y for _, y in points)), max(0.0, *(y for _, y in points))
    y_top = y_most or 1.05 * highest or float(y_low == 0)  # 0 above values that are negative
    spread = (xs[-1] - xs[0]) or 1.0
    values = [y_low + (y_top - y_low) * step / 4 for step in range(5)]
    margin = _room_for([f"{value:.3g}" for value in values])
    across = lambda value: margin + WIDTH * ((value - xs[0]) / spread if len(xs) > 1 else 0.5)
    down = lambda value: TOP + HEIGHT * (1 - (min(value, y_top) - y_low) / (y_top - y_low))
    parts = [f'<path d="M{margin:.1f} {TOP}V{TOP + HEIGHT}H{margin + WIDTH:.1f}" fill="none" stroke="#888"/>']
    ticks = xs if len(xs) <= MOST_TICKS else [xs[0], xs[-1]]
    parts += [_text(across(x), TOP + HEIGHT + 16, f"{x:g}", "middle") for x in ticks]
    for value in values:
        parts += [
            _text(margin - 6, down(value) + 4, f"{value:.3g}", "end"),
            f'<path d="M{margin:.1f} {down(value):.1f}H{margin + WIDTH:.1f}" stroke="#eee"/>',
        ]
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        dashes = "" if index < len(COLOURS) else ' stroke-dasharray="5 3"'
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        if len(line) <= MOST_TICKS:
            parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>' for x, y in line]
        left, middle = margin + WIDTH + 16, TOP + 8 + index * 18
        parts.append(f'<path d="M{left:.1f} {middle}h18" stroke="{colour}" stroke-width="3"{dashes}/>')
        parts.append(_text(left + 24, middle + 4, name))
    parts += [_text(margin + WIDTH / 2, TOP + HEIGHT + 34, x_label, "middle"), _text(4, 12, y_label)]
    return _svg(margin + WIDTH + 40 + _room_for(lines), max(TOP + HEIGHT + 42, TOP + 16 + 18 * len(lines)), parts)


def as_words(value: Any) -> str:
    """A setting as people read it: lists with commas, mappings as `name: value`, yes, no, and nothing for None."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {as_words(part)}" for name, part in value.items())
    if isinstance(value, Collection) and not isinstance(value, str):
        return ", ".join(map(as_words, value))
    return str(value)


def _room_for(texts: Collection[str]) -> float:
    """Pixels for the longest text and the space around it."""
    return 14 + LETTER * max(map(len, texts), default=0)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    """A chart that stands alone when it is saved, and shrinks with a narrow page."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    font = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">{"".join(parts)}</svg>'
