"""The benchmarks of the field by name, fetched from the hub with `datasets` (extra `eval`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from draftwing.data.corpus import Row

if TYPE_CHECKING:  # so that the command line can name the benchmarks without what reads them
    from draftwing.data.prompts import Prompt

WITHHELD = "FULL BENCHMARK DATA SHOULD BE FETCHED"
"""Begins the turns that SPEED-Bench may not pass on itself."""


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is, as `load_dataset` takes it, and how a row of it becomes one of a prompts file."""

    path: str
    split: str
    to_row: Callable[[Mapping[str, Any]], Row]
    config: str | None = None
    data_files: str | None = None


def _turns(source: str, name: str) -> Callable[[Mapping[str, Any]], Row]:
    """Rows whose field `source` has the user's turns and whose field `name` is their number."""
    return lambda row: {"question_id": row[name], "category": row["category"], "turns": list(row[source])}


def _ask(text: Callable[[Mapping[str, Any]], str]) -> Callable[[Mapping[str, Any]], Row]:
    """Rows of one turn, which `text` makes."""
    return lambda row: {"turns": [text(row)]}


BENCHMARKS = {
    "mt_bench": Benchmark("HuggingFaceH4/mt_bench_prompts", "train", _turns("prompt", "prompt_id")),
    "humaneval": Benchmark(
        "openai/openai_humaneval", "test", _ask(lambda row: f"Complete this Python function.\n\n{row['prompt']}")
    ),
    "gsm8k": Benchmark("openai/gsm8k", "test", _ask(lambda row: str(row["question"])), config="main"),
    "alpaca": Benchmark(
        "tatsu-lab/alpaca", "train", _ask(lambda row: f"{row['instruction']}\n\n{row['input']}".strip())
    ),
    "cnn_dm": Benchmark(
        "abisee/cnn_dailymail", "test", _ask(lambda row: f"Summarize: {row['article']}"), config="3.0.0"
    ),
    "spec_bench": Benchmark(
        "json",
        "train",
        _turns("turns", "question_id"),
        data_files="https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl",
    ),
    "speed_bench": Benchmark("nvidia/SPEED-Bench", "test", _turns("turns", "question_id"), config="qualitative"),
}


def load_benchmark(name: str) -> list["Prompt"]:
    """All prompts of one of BENCHMARKS; the first time they are downloaded.

    Raises:
        ValueError: `datasets` is not installed, the hub cannot be reached, or the data are not as expected.
    """
    from draftwing.data.sources import load_hub

    benchmark = BENCHMARKS[name]
    said = f"{name} ({benchmark.path}; or name a file, {name}=PATH)"
    what = benchmark.path, benchmark.config
    rows = load_hub(said, "eval", *what, split=benchmark.split, data_files=benchmark.data_files)
    return [_read(name, index, benchmark, row) for index, row in enumerate(rows)]


def _read(name: str, index: int, benchmark: Benchmark, row: Mapping[str, Any]) -> "Prompt":
    from draftwing.data.prompts import as_prompt

    place = f"{name}, row {index}"
    try:
        values: Row = {"question_id": index} | benchmark.to_row(row)
    except KeyError as error:
        raise ValueError(f"data: {place}: no column {error}; it has {sorted(row)}") from None
    if any(turn.startswith(WITHHELD) for turn in values["turns"]):
        raise ValueError(
            f"data: {place}: the hub has only part of this benchmark; make its files as its card says, and name one: "
            f"{name}=PATH"
        )
    return as_prompt(values, place)
