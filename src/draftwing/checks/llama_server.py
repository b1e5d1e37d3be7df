"""llama.cpp's server on an exported GGUF head, with all sums in float32."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draftwing.checks.engine_process import EngineProcess
from draftwing.checks.engine_task import EngineAnswer, EngineSession, EngineTask
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
        process.until(lambda: _ask(port, "health", None, 1))
        version = str(_answered(process, port, "props", None).get("build_info", "unknown"))
        yield EngineSession(version, (_decode(process, port, prompt, task.num_tokens) for prompt in task.prompts))


def _decode(process: EngineProcess, port: int, prompt: list[int], num_tokens: int) -> EngineAnswer:
    """A prompt's tokens, and its cycles from a stream, which leaves tokens out that end within a character."""
    asked = {"prompt": prompt, "n_predict": num_tokens, "temperature": 0, "cache_prompt": False}
    tokens = _answered(process, port, "completion", asked | {"return_tokens": True})["tokens"]
    chunks = _answered(process, port, "completion", asked | {"stream": True, "timings_per_token": True})
    return EngineAnswer(tokens, cycles_of([chunk.get("timings", {}) for chunk in chunks]))


def cycles_of(timings: list[dict[str, Any]]) -> list[int]:
    """How many tokens each cycle brought, by the counts that stand beside every token of a stream.

    A cycle adds what it drafts to draft_n, and what is accepted of it to draft_n_accepted, before its tokens are sent.
    """
    counts = [(count.get("draft_n", 0), count.get("draft_n_accepted", 0)) for count in timings]
    seen = dict(counts)  # the last count of each cycle
    accepted = [seen[drafted] for drafted in sorted(seen) if drafted]
    return [after - before + 1 for before, after in zip([0, *accepted], accepted, strict=False)]


def _options(task: EngineTask, port: int) -> list[str]:
    sizes = {"-c": task.capacity, "-np": 1, "-t": 1, "--spec-draft-n-max": task.depth, "--spec-draft-p-min": 0}
    named = {"-m": task.target_gguf, "-md": task.folder / HEAD_GGUF, "--spec-type": "draft-eagle3"}
    address = {"--host": HOST, "--port": port}
    return [*(str(part) for pair in (named | address | sizes).items() for part in pair), *IN_FLOAT32]


def _answered(process: EngineProcess, port: int, path: str, body: dict[str, Any] | None) -> Any:
    answer = _ask(port, path, body, process.seconds)
    if answer is None:
        raise ValueError(process.failure(f"does not answer at /{path}"))
    return answer


def _ask(port: int, path: str, body: dict[str, Any] | None, seconds: float) -> Any:
    """The server's JSON, or the list of a stream's; None where it does not answer, or says that it is not ready."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{HOST}:{port}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            text = response.read().decode()
    except (OSError, urllib.error.URLError):
        return None
    if body is not None and body.get("stream"):
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return json.loads(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
    return port
