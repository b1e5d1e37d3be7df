"""vLLM on an exported folder: a head in vLLM's own layout, or in speculators'."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from draftwing.checks.agreement import EngineAnswer
from draftwing.checks.engine_process import EngineProcess, EngineSession, EngineTask

RENAMED = {"eagle1": "eagle", "eagle2": "eagle"}
"""The methods that vLLM has another name for."""
SCRIPT = Path(__file__).parent / "elsewhere/in_vllm.py"


@contextmanager
def vllm_session(python: Path, task: EngineTask) -> Iterator[EngineSession]:
    """vLLM, once it has started; `python` is one that has it.

    Raises:
        ValueError: vLLM ended, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="draftwing-") as folder:
        asked, answers = Path(folder) / "task.json", Path(folder) / "answers.jsonl"
        answers.touch()
        changed = {"method": RENAMED.get(task.method, task.method), "capacity": task.capacity}
        asked.write_text(json.dumps(asdict(task) | changed, default=str), encoding="utf-8")
        threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with EngineProcess("vLLM", [python, SCRIPT, asked, answers], task.seconds, threads) as process:
            lines = (process.until(partial(_line, answers, index)) for index in count())
            version = str(next(lines)["version"])
            yield EngineSession(
                version, (EngineAnswer(said["tokens"], said["cycles"]) for said in islice(lines, len(task.prompts)))
            )


def _line(file: Path, index: int) -> dict[str, Any] | None:
    """A line of a file that grows, once it is whole."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return json.loads(lines[index]) if index < len(lines) - 1 else None
