"""training.html: the curves of a run in one file that needs nothing else, drawn as SVG from its training.json."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Curve = list[tuple[float, float]]
"""(Step, value) pairs."""
WIDTH, HEIGHT, MARGIN = 640, 260, 48
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#65a30d")
MOST_POINTS = 600
CHARTS = (
    ("Loss", r"(eval_)?loss"),
    ("Acceptance length: simulated (tau_sim) and decoded (tau)", r"(eval_)?tau(_sim)?"),
    ("Held-out top-1 accuracy per training-time-test step", r"eval_accuracy_\d+"),
    ("Learning rate", r"learning_rate"),
    ("Gradient norm", r"grad_norm"),
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:720px;margin:2em auto;padding:0 1em}}
svg{{width:100%;height:auto}}table{{border-collapse:collapse}}td{{padding:.1em 1em .1em 0;vertical-align:top}}</style>
</head><body><h1>{title}</h1><p>{status}</p>{charts}<h2>Recipe</h2>{recipe}<h2>Made with</h2>{provenance}</body></html>
"""


def as_html(record: Mapping[str, Any]) -> str:
    """The page of a run's record, finished or not."""
    recipe, history = record["recipe"], record["history"]
    last = history[-1]["step"] if history else 0
    state = "finished" if record["finished"] else "not finished"
    return PAGE.format(
        title=escape(f"{recipe['objective']}: {recipe['output']}"),
        status=f"{state}, logged up to step {last} of {recipe['max_steps']}, {record['seconds']} s",
        charts="".join(_chart(title, _curves(history, pattern)) for title, pattern in CHARTS),
        recipe=_table(recipe),
        provenance=_table(record["provenance"]),
    )


def _curves(history: Sequence[Mapping[str, float]], pattern: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for entry in history:
        for name, value in entry.items():
            if re.fullmatch(pattern, name):
                curves.setdefault(name, []).append((entry["step"], value))
    return {name: curve[:: 1 + len(curve) // MOST_POINTS] for name, curve in curves.items()}


def _chart(title: str, curves: Mapping[str, Curve]) -> str:
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left or 1)
        up = (y - low) / (high - low or 1)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = [_text(MARGIN - 6, place(left, y)[1], f"{y:.3g}", "end") for y in {low, high}]
    parts += [_text(place(x, low)[0], HEIGHT - MARGIN + 18, f"{x:g}", "middle") for x in {left, right}]
    for index, (name, curve) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        x, y = place(*curve[-1])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>')
        parts.append(_text(MARGIN + 85 * (index % 7), HEIGHT - 18 + 14 * (index // 7), name, "start", color))
    frame = f'<rect x="{MARGIN}" y="{MARGIN}" width="{WIDTH - 2 * MARGIN}" height="{HEIGHT - 2 * MARGIN}"'
    frame += ' fill="none" stroke="#ccc"/>'
    return f'<h2>{escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}">{frame}{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str, color: str = "#555") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"
