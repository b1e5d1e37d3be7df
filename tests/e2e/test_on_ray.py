"""The document's program on Ray Serve, with two replicas of the embedded model."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason='pip install "draftwing[serve]"')

import httpx
from forked import is_up
from test_serve import LONG, wait_for

from draftwing.serving.process import bind

pytestmark = pytest.mark.slow
DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
EMBEDDED = {
    '"path/to/model", draft="path/to/head"': '"tiny", draft="tiny"',
    'plan="auto"': 'plan="chain:3"',
    "num_replicas=2": 'num_replicas=2, ray_actor_options={"num_cpus": 0.5}',
    "ray.init(": 'ray.init(num_cpus=2, _node_ip_address="127.0.0.1", ',
    "4096": "512",
}
PATIENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120", "RAY_USAGE_STATS_ENABLED": "0"}


def test_the_documents_program_serves_from_two_replicas(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='pip install "draftwing[ray]"')
    text = DOCUMENT.read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(import ray\n.*?)```", text, re.DOTALL)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    for written, here in (EMBEDDED | {'"port": 8000': f'"port": {port}'}).items():
        assert written in program
        program = program.replace(written, here)
    (tmp_path / "app.py").write_text(program, encoding="utf-8")
    url = f"http://127.0.0.1:{port}"
    command, environment = [sys.executable, str(tmp_path / "app.py")], os.environ | PATIENT
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: process.poll() is not None or is_up(url), seconds=600)
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > 100
        began = re.compile(r"^draftwing_prompt_tokens_created\S* (\S+)$", re.MULTILINE)
        pages = [httpx.get(f"{url}/metrics", timeout=30).text for _ in range(30)]
        assert len({began.findall(page)[0] for page in pages}) == 2, "both replicas answer"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
