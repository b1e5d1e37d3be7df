"""What a run shows while it goes: a progress bar and log lines on stderr, training.json and training.html in files."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from draftwing.charts import as_page
from draftwing.config import Stage
from draftwing.files import to_json, write_text
from draftwing.progress import progress_bar
from draftwing.provenance import provenance

RUN_LOG = "training.json"
REPORT = "training.html"
DULL = ("runtime", "per_second", "total_flos", "epoch")
"""Endings of the Trainer's log entries that the display and the run log leave out."""


class ProgressDisplay(TrainerCallback):
    """A progress bar with the latest figures, and each log line above it; of the main process, on stderr."""

    def __init__(self) -> None:
        self._progress = progress_bar()
        self._task = self._progress.add_task("training")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        figures = " ".join(f"{name} {value:.4g}" for name, value in _figures(logs or {}).items())
        self._progress.console.print(f"step {state.global_step}: {figures}", highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Give the terminal back, however the run has ended."""
        self._progress.stop()


class RunLogKeeper(TrainerCallback):
    """Keeps training.json and training.html up to date with the log, so that an interrupted run has them too.

    `inputs` are hashes of what the run reads.
    """

    def __init__(self, config: Stage, inputs: Mapping[str, str]) -> None:
        self._config, self._inputs, self._provenance = config, dict(inputs), provenance()
        self._start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:  # continued: the seconds of the run before count too
            self._start -= read_run_log(Path(self._config.output)).get("seconds", 0)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(state.log_history)

    on_save = on_evaluate

    def write(self, history: list[dict[str, float]], metrics: dict[str, float] | None = None) -> None:
        """Write the log of a run so far, or with its final `metrics` of a finished one."""
        folder = Path(self._config.output)
        run_log = {
            "finished": metrics is not None,
            "metrics": metrics or {},
            "seconds": round(time.perf_counter() - self._start),
            "recipe": self._config.as_dict(),
            "inputs": self._inputs,
            "provenance": self._provenance,
            "history": [_figures(entry) for entry in history],
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RUN_LOG, to_json(run_log, indent=1) + "\n")
        write_text(folder / REPORT, as_html(run_log))


def read_run_log(folder: Path) -> dict[str, Any]:
    """A run's training.json; empty if it has none yet."""
    if not (folder / RUN_LOG).is_file():
        return {}
    run_log: dict[str, Any] = json.loads((folder / RUN_LOG).read_text(encoding="utf-8"))
    return run_log


def _figures(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if not name.endswith(DULL)}


Curve = list[tuple[float, float]]
"""(Step, value) pairs."""
CHARTS = (
    ("Loss", r"(eval_)?loss"),
    ("Acceptance length: simulated (tau_sim) and decoded (tau)", r"(eval_)?tau(_sim)?"),
    ("Held-out top-1 accuracy per training-time-test step", r"eval_accuracy_\d+"),
    ("Learning rate", r"learning_rate"),
    ("Gradient norm", r"grad_norm"),
)
PAGE = Path(__file__).parent / REPORT


def as_html(run_log: Mapping[str, Any]) -> str:
    """The page of a run's log, finished or not."""
    return as_page(PAGE, curves={title: _curves(run_log["history"], names) for title, names in CHARTS}, **run_log)


def _curves(history: Sequence[Mapping[str, float]], pattern: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for entry in history:
        for name, value in entry.items():
            if re.fullmatch(pattern, name):
                curves.setdefault(name, []).append((entry["step"], value))
    return curves
