"""Small charts as inline SVG: bars with intervals, and lines."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Protocol

COLOURS = ("#1f77b4", "#d95f02", "#2a9d5c", "#c2255c", "#7048a8", "#8a6d3b", "#0b8a9e", "#666666", "#b8860b", "#444bb5")
LABEL, BAR, LINE = 260, 420, 22
"""Widths of a bar chart's labels and bars, and the height of a bar's line, in pixels."""
WIDTH, HEIGHT, MARGIN, TOP = 460, 260, 40, 26
"""A line chart's plot, and the space around it."""
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


def bar_chart(bars: Mapping[str, Bar], mark: float | None = None) -> str:
    """Horizontal bars with their intervals as whiskers; `mark` draws a vertical line at a value."""
    most = max((bar.high for bar in bars.values()), default=1.0) or 1.0
    x = lambda value: LABEL + BAR * value / most
    parts = []
    for index, (name, bar) in enumerate(bars.items()):
        top, middle = index * LINE + 3, index * LINE + LINE / 2
        parts += [
            _text(LABEL - 8, middle + 4, name, "end"),
            f'<rect x="{LABEL}" y="{top}" width="{x(bar.value) - LABEL:.1f}" height="{LINE - 6}" fill="{COLOURS[0]}"/>',
            f'<path d="M{x(bar.low):.1f} {middle}H{x(bar.high):.1f}" stroke="#111" stroke-width="2"/>',
            _text(x(bar.high) + 6, middle + 4, f"{bar.value:.2f}"),
        ]
    height = len(bars) * LINE
    if mark is not None:
        parts.append(f'<path d="M{x(mark):.1f} 0V{height}" stroke="#999" stroke-dasharray="4 3"/>')
    return _svg(LABEL + BAR + 60, height, parts)


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, y_most: float | None = None
) -> str:
    """Lines of points `(x, y)` from y = 0 (or the lowest below) up, with a legend."""
    lines = {name: line[:: 1 + len(line) // MOST_POINTS] for name, line in lines.items()}
    points = [point for line in lines.values() for point in line]
    xs = sorted({x for x, _ in points})
    if not xs:
        return ""
    y_top = y_most or 1.05 * max(y for _, y in points) or 1.0
    y_low = min(0.0, *(y for _, y in points))
    spread = (xs[-1] - xs[0]) or 1.0
    across = lambda value: MARGIN + WIDTH * ((value - xs[0]) / spread if len(xs) > 1 else 0.5)
    down = lambda value: TOP + HEIGHT * (1 - (min(value, y_top) - y_low) / (y_top - y_low))
    parts = [f'<path d="M{MARGIN} {TOP}V{TOP + HEIGHT}H{MARGIN + WIDTH}" fill="none" stroke="#888"/>']
    ticks = xs if len(xs) <= MOST_TICKS else [xs[0], xs[-1]]
    parts += [_text(across(x), TOP + HEIGHT + 16, f"{x:g}", "middle") for x in ticks]
    for step in range(5):
        value = y_low + (y_top - y_low) * step / 4
        parts += [
            _text(MARGIN - 6, down(value) + 4, f"{value:.3g}", "end"),
            f'<path d="M{MARGIN} {down(value):.1f}H{MARGIN + WIDTH}" stroke="#eee"/>',
        ]
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        dashes = "" if index < len(COLOURS) else ' stroke-dasharray="5 3"'
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        if len(line) <= MOST_TICKS:
            parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>' for x, y in line]
        left, middle = MARGIN + WIDTH + 16, TOP + 8 + index * 18
        parts.append(f'<path d="M{left} {middle}h18" stroke="{colour}" stroke-width="3"{dashes}/>')
        parts.append(_text(left + 24, middle + 4, name))
    parts += [_text(MARGIN + WIDTH / 2, TOP + HEIGHT + 34, x_label, "middle"), _text(4, 12, y_label)]
    return _svg(MARGIN + WIDTH + 300, max(TOP + HEIGHT + 42, TOP + 16 + 18 * len(lines)), parts)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    """A chart that stands alone when it is saved, and shrinks with a narrow page."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    font = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">{"".join(parts)}</svg>'
