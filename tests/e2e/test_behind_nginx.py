"""Two servers behind nginx, by the configuration in docs/serving.md."""

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason='pip install "draftwing[serve]"')

import httpx
from forked import Forked
from test_serve import LONG, start, wait_for

from draftwing.serving.process import bind

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx"),
]
FRAME = """daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
events {{}}
http {{ access_log off; {temporary} {servers} }}"""
DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
KINDS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def configuration(folder: Path, port: int, upstreams: list[str]) -> str:
    """The document's, at this port and in front of these servers."""
    (servers,) = re.findall(r"```nginx\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    servers = servers.replace("listen 80;", f"listen 127.0.0.1:{port};")
    for place, url in enumerate(upstreams):
        written = f"server 127.0.0.1:{8000 + place};"
        assert written in servers
        servers = servers.replace(written, f"server {url.removeprefix('http://')};")
    temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in KINDS)
    return FRAME.format(folder=folder, temporary=temporary, servers=servers)


@pytest.fixture(scope="module")
def servers() -> Iterator[list[tuple[Forked, str]]]:
    started = [start(), start()]
    yield started
    for process, _ in started:
        process.kill()


@pytest.fixture(scope="module")
def front(servers: list[tuple[Forked, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """nginx's address."""
    folder = tmp_path_factory.mktemp("nginx")
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    written = configuration(folder, port, [url for _, url in servers])
    (folder / "nginx.conf").write_text(written, encoding="utf-8")
    command = ["nginx", "-p", str(folder), "-e", f"{folder}/errors", "-c", f"{folder}/nginx.conf"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: _answers(url))
    yield url
    process.terminate()
    process.wait(timeout=20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False


def running(url: str) -> int:
    """Requests that a server has in its seats."""
    page = httpx.get(f"{url}/metrics", timeout=30).text
    (count,) = re.findall(r"^draftwing_requests_running\S* (\S+)$", page, re.MULTILINE)
    return int(float(count))


def test_streams_are_not_buffered(servers: list[tuple[Forked, str]], front: str) -> None:
    """Two streams at once, one at each server; their first events are there long before the last."""
    with (
        httpx.stream("POST", f"{front}/v1/completions", json=LONG, timeout=120) as one,
        httpx.stream("POST", f"{front}/v1/completions", json=LONG, timeout=120) as two,
    ):
        lines = [one.iter_lines(), two.iter_lines()]
        assert all(next(each).startswith("data: {") for each in lines)
        assert [running(url) for _, url in servers] == [1, 1]
        ends = [[line for line in each if line][-1] for each in lines]
    assert ends == ["data: [DONE]"] * 2


def test_with_one_of_two_killed_all_requests_are_answered(servers: list[tuple[Forked, str]], front: str) -> None:
    """But the one that it was at work on."""
    short = LONG | {"max_tokens": 4, "stream": False}
    with httpx.stream("POST", f"{front}/v1/completions", json=LONG, timeout=120) as lost:
        lines = lost.iter_lines()
        next(lines)
        (victim,) = [process for process, url in servers if running(url)]
        victim.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    answers = [httpx.post(f"{front}/v1/completions", json=short, timeout=120) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 6
