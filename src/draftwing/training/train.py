"""One stage of a recipe: a language model, or a head for one; its figures are kept beside the weights."""

import json
import time
from pathlib import Path

from draftwing.config import TrainConfig
from draftwing.provenance import provenance
from draftwing.training.heads import train_head
from draftwing.training.language_model import train_language_model


def train_stage(config: TrainConfig) -> dict[str, float]:
    """Train one stage; returns its held-out metrics and writes them with provenance to `training.json`."""
    start = time.perf_counter()
    metrics = train_language_model(config) if config.objective == "language_model" else train_head(config)
    record = {
        "metrics": metrics,
        "seconds": round(time.perf_counter() - start),
        "recipe": config.as_dict(),
        "provenance": provenance(),
    }
    path = Path(config.output) / "training.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return metrics
