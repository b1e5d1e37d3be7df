"""One stage of a recipe; its figures are kept beside what it made."""

import json
import time
from pathlib import Path

from draftwing.config import TrainConfig
from draftwing.provenance import provenance
from draftwing.training.heads import train_head
from draftwing.training.language_model import train_language_model
from draftwing.training.self_generated import write_self_generated

STAGES = {
    "language_model": train_language_model,
    "self_generated": write_self_generated,
    "eagle1": train_head,
    "eagle3": train_head,
    "medusa": train_head,
}


def train_stage(config: TrainConfig) -> dict[str, float]:
    """Run one stage; returns its metrics and writes them with the recipe and provenance beside its output."""
    start = time.perf_counter()
    metrics = STAGES[config.objective](config)
    record = {
        "metrics": metrics,
        "seconds": round(time.perf_counter() - start),
        "recipe": config.as_dict(),
        "provenance": provenance(),
    }
    output = Path(config.output)
    path = output / "training.json" if output.is_dir() else output.with_suffix(".json")
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return metrics
