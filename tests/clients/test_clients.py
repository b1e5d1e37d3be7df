"""Clients of others against a server with the embedded model: `make clients` installs and runs them.

They want other versions than ours, so they lie in environments of their own, which the files here name:
clients.txt, aiperf.txt, vllm.txt.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from draftwing.embedded import embedded_target

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TOKENIZER = str(embedded_target("tiny"))


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
    process.wait(timeout=300)


ENVIRONMENTS = HERE.parents[1] / "build" / "engines"
"""The folder with the clients' environments."""


VLLM = str(HERE.parents[1] / "benchmarks" / "vllm_command.py")


def run(where: str, *arguments: str, is_offline: bool = True) -> str:
    """What a client of an environment prints; skips where that is not installed, fails where the client does."""
    python = ENVIRONMENTS / where / "bin" / "python"
    if not python.exists():
        pytest.skip(f"make clients ({python} is missing)")
    environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "160"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if is_offline else {}
    environment.pop("PYTHONPATH", None)
    command = [str(python), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_schemathesis(server: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    """The OpenAPI document says all that happens: no server error, no status or content type that it does not have."""
    said = run(
        *("clients", "-m", "schemathesis.cli", "run", f"{server[1]}/openapi.json", "--max-examples", "10"),
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
        "tokenizer": TOKENIZER,
        "num_concurrent": "2",
        "tokenized_requests": "True",
    }
    said = run(
        *("clients", "-m", "lm_eval", "run", "--model", "local-completions"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--include_path", str(tmp_path), "--tasks", "draftwing_likelihood,draftwing_generation"),
    )
    assert re.search(r"draftwing_likelihood.*acc", said)
    assert re.search(r"draftwing_generation.*exact_match", said)


def test_locust(server: tuple[subprocess.Popen[str], str]) -> None:
    """A short soak: no failure, no seat lost, and memory that does not grow with requests."""
    process, url = server
    soak = ("clients", "-m", "locust", "-f", str(HERE / "soak.py"), "--headless", "--host", url, "--users", "6")
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


def test_vllm_bench(server: tuple[subprocess.Popen[str], str]) -> None:
    """It finds the model, aligns lengths by /tokenize, and prints acceptance from /metrics."""
    for backend, endpoint in (("openai-chat", "chat/completions"), ("openai", "completions")):
        said = run(
            *("vllm", VLLM, "bench", "serve", "--backend", backend),
            *("--endpoint", f"/v1/{endpoint}", "--base-url", server[1], "--tokenizer", TOKENIZER),
            *("--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8"),
            *("--num-prompts", "8", "--max-concurrency", "4"),
        )
        assert re.search(r"Successful requests:\s+8\b", said)
        assert re.search(r"Total generated tokens:\s+64\b", said)
        assert re.search(r"Acceptance length:\s+[\d.]+", said)


def test_guidellm(server: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    run(
        *("clients", "-m", "guidellm", "run", "--backend", f"kind=openai_http,target={server[1]}"),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=3"),
        *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
        *("--tokenizer", f"kind=hf_auto,model={TOKENIZER}"),
        *("--output", f"kind=json,path={report}", "--disable-progress"),
    )
    (benchmark,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] >= 2  # it may leave one out at an edge of its time
    assert totals["errored"] == totals["incomplete"] == 0


def test_aiperf(server: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    """It reads /metrics every second, and believes the figures of drafting in the answers."""
    run(
        *("aiperf", "-m", "aiperf", "profile", "--model", "tiny", "--url", server[1]),
        *("--endpoint-type", "chat", "--streaming", "--tokenizer", TOKENIZER),
        *("--concurrency", "1", "--request-count", "3", "--synthetic-input-tokens-mean", "16"),
        *("--output-tokens-mean", "8", "--extra-inputs", "ignore_eos:true", "--ui", "none"),
        *("--artifact-dir", str(tmp_path)),
        is_offline=False,  # else it takes the tokenizer's folder for a repository
    )
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    figures = json.loads(report.read_text(encoding="utf-8"))
    assert figures["request_count"]["avg"] == 3
    assert not figures.get("error_summary")


def _resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096
