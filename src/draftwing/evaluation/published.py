"""What the EAGLE papers report, as context beside measured figures: other targets, other machines."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

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
