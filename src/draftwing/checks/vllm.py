"""vLLM on an exported folder: EAGLE and Medusa heads, in vLLM's own layout or in speculators'."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from draftwing.checks.job import Answer, Job, Session
from draftwing.checks.process import EngineProcess

METHODS = {"eagle1": "eagle", "eagle2": "eagle", "eagle3": "eagle3", "medusa": "medusa"}
"""vLLM's names of ours."""
SCRIPT = Path(__file__).parent / "elsewhere/in_vllm.py"


@contextmanager
def vllm_session(python: Path, job: Job) -> Iterator[Session]:
    """vLLM, once it has started; `python` is one that has it.

    Raises:
        ValueError: vLLM ended, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="draftwing-") as folder:
        asked, answers = Path(folder) / "job.json", Path(folder) / "answers.jsonl"
        answers.touch()
        asked.write_text(json.dumps(_as_asked(job)), encoding="utf-8")
        threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with EngineProcess("vLLM", [python, SCRIPT, asked, answers], job.seconds, threads) as process:
            lines = (process.until(partial(_line, answers, index)) for index in count())
            version = str(next(lines)["version"])
            yield Session(version, (Answer(said["tokens"], said["cycles"]) for said in islice(lines, len(job.prompts))))


def _as_asked(job: Job) -> dict[str, Any]:
    return {
        "target": str(job.target),
        "folder": str(job.folder),
        "method": METHODS[job.method],
        "prompts": job.prompts,
        "num_tokens": job.num_tokens,
        "depth": job.depth,
        "capacity": job.capacity,
    }


def _line(file: Path, index: int) -> dict[str, Any] | None:
    """A line of a file that grows, once it is whole."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return json.loads(lines[index]) if index < len(lines) - 1 else None
