"""Clients of others against a server with the embedded model: `make clients` installs and runs them."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from draftwing.embedded import embedded_target

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "draftwing", "serve", "--port", "0", "--json", "--seats", "4", "--plan", "chain:4"]
    command += ["--max-new-tokens", "48"]  # so that nobody waits for whole contexts
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    with process.stdout as stdout:
        url: str = json.loads(stdout.readline())["url"]
    for _ in range(600):
        try:
            httpx.get(f"{url}/ready").raise_for_status()
            break
        except httpx.HTTPError:
            time.sleep(0.1)
    yield process, url
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)


def run(module: str, *arguments: str) -> str:
    """What a client prints; skips where it is not installed, fails where it does."""
    if find_spec(module) is None:
        pytest.skip(f'pip install "draftwing[clients]" ({module})')
    command = [sys.executable, "-m", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_schemathesis(server: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    """The OpenAPI document says all that happens: no server error, no status or content type that it does not have."""
    said = run(
        *("schemathesis", "schemathesis.cli", "run", f"{server[1]}/openapi.json", "--max-examples", "10"),
        *("--phases", "examples,coverage,fuzzing", "--seed", "1", "--request-timeout", "60", "--checks", CHECKS),
    )
    assert re.search(r"(\d{3,}) generated, \1 passed", said)


CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_lm_eval(server: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    """A generation and a likelihood task, on rows of its own."""
    rows = [{"question": "def add(a, b):\n", "answer": "    return a + b", "wrong": "    raise a"}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    for name in ("likelihood", "generation"):
        task = (HERE / f"{name}.yaml").read_text(encoding="utf-8").replace("ROWS", str(tmp_path / "rows.json"))
        (tmp_path / f"{name}.yaml").write_text(task, encoding="utf-8")
    arguments = {
        "model": "tiny",
        "base_url": f"{server[1]}/v1/completions",
        "tokenizer": str(embedded_target("tiny")),
        "num_concurrent": "2",
        "tokenized_requests": "True",
    }
    said = run(
        *("lm_eval", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--include_path", str(tmp_path), "--tasks", "draftwing_likelihood,draftwing_generation"),
    )
    assert re.search(r"draftwing_likelihood.*acc", said)
    assert re.search(r"draftwing_generation.*exact_match", said)


def test_locust(server: tuple[subprocess.Popen[str], str]) -> None:
    """A short soak: no failure, no seat lost, and memory that does not grow with requests."""
    process, url = server
    soak = ("locust", "locust", "-f", str(HERE / "soak.py"), "--headless", "--host", url, "--users", "6")
    run(*soak, "--run-time", "15s", "--only-summary")
    before = _resident(process.pid)
    said = run(*soak, "--run-time", "30s", "--only-summary")
    assert re.search(r"Aggregated\s+\d+\s+0\(0.00%\)", said)
    for _ in range(100):
        if "draftwing_requests_running" in (page := httpx.get(f"{url}/metrics").text) and re.search(
            r"draftwing_requests_running\{[^}]*\} 0\.0", page
        ):
            break
        time.sleep(0.1)
    else:
        pytest.fail("a seat was lost")
    assert _resident(process.pid) < before + 64 * 2**20
    assert httpx.get(f"{url}/health").status_code == 200


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096
