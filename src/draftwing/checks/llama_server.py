"""llama.cpp's server on an exported GGUF head, with all sums in float32."""

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from draftwing.ask import NoAnswer, ask
from draftwing.checks.agreement import EngineAnswer
from draftwing.checks.engine_process import EngineProcess, EngineSession, EngineTask
from draftwing.drafts.eagle.gguf_head import HEAD_GGUF

HOST = "127.0.0.1"
IN_FLOAT32 = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "-ctkd", "f32", "-ctvd", "f32")
"""Caches, of both models, are in float16 by default."""


@contextmanager
def llama_session(server: Path, task: EngineTask) -> Iterator[EngineSession]:
    """The server, once it is ready.

    Raises:
        ValueError: it ended, took too long, or answers something else.
    """
    port = _free_port()
    with EngineProcess("llama-server", [server, *_options(task, port)], task.seconds) as process:
        process.until(lambda: _is_ready(port))
        version = str(_answered(process, port, "props").get("build_info", "unknown"))
        yield EngineSession(version, (_decode(process, port, prompt, task) for prompt in task.prompts))


def _is_ready(port: int) -> str | None:
    """What the server says once it has loaded the models; until then it gives no answer, or an error."""
    try:
        return ask(f"http://{HOST}:{port}/health", seconds=1)
    except NoAnswer:
        return None


def _decode(process: EngineProcess, port: int, prompt: list[int], task: EngineTask) -> EngineAnswer:
    """A prompt's tokens, and its cycles from a stream."""
    asked = {"prompt": prompt, "n_predict": task.num_tokens, "temperature": 0, "cache_prompt": False}
    whole = _answered(process, port, "completion", asked | {"return_tokens": True})
    tokens = whole.get("tokens")
    if not isinstance(tokens, list):
        raise ValueError(process.failure(f"answers at /completion without tokens: {str(whole)[:200]}"))
    stream = _text(process, port, "completion", asked | {"stream": True, "timings_per_token": True})
    chunks = [_object(process, "completion", line[6:]) for line in stream.split("\n") if line.startswith("data: {")]
    return EngineAnswer(tokens, cycles_of([chunk.get("timings", {}) for chunk in chunks], task.depth))


def cycles_of(timings: Sequence[dict[str, Any]], depth: int) -> list[int]:
    """How many tokens each cycle brought, by the counts that stand beside the tokens of a stream.

    A cycle adds what it drafts, `depth` at most, to draft_n, and what is accepted of it to draft_n_accepted, before its
    tokens are sent. Tokens that end within a character are not sent: where that hides a whole cycle, the list ends.
    """
    counts = [(count.get("draft_n", 0), count.get("draft_n_accepted", 0)) for count in timings]
    seen = {0: 0, **dict(counts)}  # the last count of each cycle
    cycles: list[int] = []
    for before, after in pairwise(sorted(seen)):
        if after - before > depth:
            break
        cycles.append(seen[after] - seen[before] + 1)
    return cycles


def _options(task: EngineTask, port: int) -> list[str]:
    sizes = {"-c": task.capacity, "-np": 1, "-t": 1, "--spec-draft-n-max": task.depth, "--spec-draft-p-min": 0}
    named = {"-m": task.target_gguf, "-md": task.folder / HEAD_GGUF, "--spec-type": "draft-eagle3"}
    address = {"--host": HOST, "--port": port}
    return [*(str(part) for pair in (named | address | sizes).items() for part in pair), *IN_FLOAT32]


def _answered(process: EngineProcess, port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    return _object(process, path, _text(process, port, path, body))


def _text(process: EngineProcess, port: int, path: str, body: dict[str, Any] | None) -> str:
    try:
        return ask(f"http://{HOST}:{port}/{path}", body, process.seconds)
    except NoAnswer as error:
        raise ValueError(process.failure(f"does not answer at /{path}: {error}")) from None


def _object(process: EngineProcess, path: str, text: str) -> dict[str, Any]:
    """A JSON object that says of no error."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or "error" in found:
        raise ValueError(process.failure(f"answers at /{path}: {text[:200]}"))
    return found


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
    return port
