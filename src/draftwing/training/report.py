"""training.html: the curves of a run in one file that needs nothing else, drawn as SVG from its training.json."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from draftwing.charts import as_words, line_chart

Curve = list[tuple[float, float]]
"""(Step, value) pairs."""
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
    return curves


def _chart(title: str, curves: Mapping[str, Curve]) -> str:
    return f"<h2>{escape(title)}</h2>{line_chart(curves, 'step', '')}" if curves else ""


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><td>{escape(name)}</td><td>{escape(as_words(value))}</td></tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"
