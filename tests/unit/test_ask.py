"""An HTTP answer, or one error with the server's words: of a server that refuses, breaks off or talks nonsense."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from draftwing.ask import NoAnswer, ask


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/noise":
            self.wfile.write(b"noise\n")
            return
        status = 429 if self.path == "/busy" else 200
        self.send_response(status)
        self.send_header("Content-Length", "99" if self.path == "/cut" else "4")
        self.send_header("Retry-After", "7")
        self.end_headers()
        self.wfile.write(b"\xff\xff\xff\xff" if self.path == "/bytes" else b"text")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said = json.dumps([json.loads(body), self.headers["Authorization"]]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_answer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which is not asked for a server here
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(url) == "text"
    assert json.loads(ask(url, {"a": 1}, headers={"Authorization": "me"})) == [{"a": 1}, "me"]
    with pytest.raises(NoAnswer, match="refused"):
        ask("http://elsewhere.invalid/")


@pytest.mark.parametrize(
    ("path", "says", "status", "retry_after"),
    [
        ("busy", "status 429: text", 429, "7"),
        ("cut", "IncompleteRead", None, None),
        ("noise", "BadStatusLine", None, None),
        ("bytes", "UnicodeDecodeError", None, None),
    ],
)
def test_no_answer(url: str, path: str, says: str, status: int | None, retry_after: str | None) -> None:
    with pytest.raises(NoAnswer, match=says) as caught:
        ask(f"{url}/{path}", seconds=5)
    assert (caught.value.status, caught.value.retry_after) == (status, retry_after)
