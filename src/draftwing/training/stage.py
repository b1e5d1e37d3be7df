"""One stage of a recipe; its figures are kept beside what it made."""

import time
from pathlib import Path

from rich.console import Console

from draftwing.config import TrainConfig
from draftwing.data.fingerprint import contents_of, of_data
from draftwing.files import to_json, write_text
from draftwing.prepare.self_generated import count_answers, write_self_generated
from draftwing.provenance import provenance
from draftwing.training.checkpoints import check_continued, settings_of
from draftwing.training.display import RUN_LOG, read_run_log
from draftwing.training.processes import is_main_process, wait_for_others
from draftwing.training.train_head import train_head
from draftwing.training.train_language_model import train_language_model


def train_stage(config: TrainConfig) -> dict[str, float]:
    """Run one stage, unless it is finished; returns its metrics.

    They are written with the recipe and provenance beside its output.

    Raises:
        ValueError: a finished or interrupted run of other settings, or from other inputs, is in its place.
    """
    _check_frozen_target(config)
    if config.objective == "self_generated":
        return _generate(config)
    output = Path(config.output)
    run_log = read_run_log(output)
    wait_for_others()  # nobody writes before everyone has looked
    # Records of before `finished` was kept were written at the end only.
    if run_log and run_log.get("finished", True) and any(output.glob("*.safetensors")):
        # On one process both: how many there were no longer matters.
        made_with = settings_of(run_log["recipe"], num_processes=1) | run_log.get("inputs", {})
        wanted = settings_of(config.as_dict(), num_processes=1) | contents_of(config) | of_data(config.data)
        check_continued(made_with, wanted, output / RUN_LOG)
        if is_main_process():
            begun = run_log["provenance"]["time"]
            Console(stderr=True).print(f"finished already (begun {begun}), skipped", highlight=False, soft_wrap=True)
        metrics: dict[str, float] = run_log["metrics"]
        return metrics
    return (train_language_model if config.objective == "language_model" else train_head)(config)


def _check_frozen_target(config: TrainConfig) -> None:
    """Raise a ValueError where a target in parts does not suit a stage that runs (`--set` reaches all stages)."""
    for name in config.splits:
        if config.objective == "self_generated":
            raise ValueError(f"{name}: a target in parts cannot decode; let an endpoint answer (draftwing prepare)")
        if config.objective == "language_model" and not config.teacher:
            raise ValueError(f"{name}: a language_model without a teacher has no frozen target")


def _generate(config: TrainConfig) -> dict[str, float]:
    """Write rows in the main process; the others wait for the file."""
    metrics: dict[str, float] = {}
    if is_main_process():
        start = time.perf_counter()
        metrics = write_self_generated(config)
        seconds = round(time.perf_counter() - start)
        record = Path(config.output).with_suffix(".json")
        if metrics["new_tokens"] or not record.exists():  # else it tells of the run that has written the rows
            metrics |= count_answers(Path(config.output))
            run_log = {"metrics": metrics, "seconds": seconds, "recipe": config.as_dict(), "provenance": provenance()}
            write_text(record, to_json(run_log, indent=2) + "\n")
    wait_for_others()
    return metrics
