"""Model cards, and the way to the hub: against a stand-in of its HTTP API."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_export import eagle3, target  # noqa: F401  (a fixture)

from draftwing.cli import main
from draftwing.drafts.export_draft import export_draft
from draftwing.drafts.publish import model_card, push_folder


class Hub(BaseHTTPRequestHandler):
    """What the hub's client asks for: a repository, how files are to come, and a commit with all of them."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers["Authorization"], body))  # type: ignore[attr-defined]
        if self.path.endswith("/create"):
            status, said = self.server.created  # type: ignore[attr-defined]
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            status, said = 200, {"files": [file | {"shouldIgnore": False} for file in files]}
        else:
            at = f"http://127.0.0.1:{self.server.server_port}/org/head"  # type: ignore[attr-defined]
            status, said = 200, {"commitUrl": f"{at}/commit/1", "commitOid": "1", "success": True}
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    server.seen, server.created = [], (200, {"url": f"{url}/org/head"})  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(target: str, tmp_path: Path) -> Path:  # noqa: F811
    out = tmp_path / "out"
    export_draft(eagle3(tmp_path / "draft"), target, "vllm", out, verifier="org/it", license="mit")
    return out


def committed(hub: ThreadingHTTPServer) -> dict[str, bytes]:
    """The files of the one commit, by name."""
    commits = [body for path, _, body in hub.seen if "/commit/" in path]  # type: ignore[attr-defined]
    assert len(commits) == 1, "all of a folder, or nothing"
    lines = [json.loads(line) for line in commits[0].splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


def test_a_folder_comes_to_the_hub_whole(hub: ThreadingHTTPServer, folder: Path) -> None:
    assert push_folder(folder, "org/head").endswith("/org/head")
    files = committed(hub)
    assert files.keys() == {file.name for file in folder.iterdir()}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert '"model": "org/head"' in card and "--draft org/head" in card
    assert str(folder) not in card + files["export.json"].decode(), "no path of this machine"
    path, key, body = hub.seen[0]  # type: ignore[attr-defined]
    assert (path, key) == ("/api/repos/create", "Bearer hf_secret")
    assert not {"private", "visibility"} & json.loads(body).keys(), "the account's default, as everywhere on the hub"


def test_the_command_publishes(hub: ThreadingHTTPServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder), "--push-to-hub", "org/head", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"].endswith("/org/head")
    asked = json.loads(hub.seen[0][2])  # type: ignore[attr-defined]
    assert asked.get("private") is True or asked["visibility"] == "private", "as the client's version says it"


def test_what_keeps_a_folder_from_the_hub(
    hub: ThreadingHTTPServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"push-to-hub: .*draft has no export.json"):
        push_folder(tmp_path / "draft", "org/head")
    hub.created = (403, {"error": "You don't have the rights"})  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"push-to-hub: org/head: .*rights"):
        push_folder(folder, "org/head")
    with pytest.raises(ValueError, match=r"push-to-hub: a b/c: "):
        push_folder(folder, "a b/c")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"push-to-hub: no token .*HF_TOKEN"):
        push_folder(folder, "org/head")
    facts = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(facts | {"target": "/somewhere/target"}))
    with pytest.raises(ValueError, match=r"export with its hub id \(--verifier\)"):
        push_folder(folder, "org/head")
    assert not [path for path, _, _ in hub.seen if "/commit/" in path]  # type: ignore[attr-defined]


def test_a_card_says_what_is_on_record(tmp_path: Path) -> None:
    facts = {
        "target": "org/it",
        "engine": "vLLM",
        "draft": "d",
        "command": "vllm serve",
        "faults": [],
        "notes": ["short"],
    }
    bare = model_card(facts, tmp_path, tmp_path / "out")
    assert "## " not in bare and "No licence was stated" in bare and "- short" in bare
    training = {"recipe": {"data": ["x/rows.jsonl"], "max_steps": 7}, "metrics": {"eval_tau_sim": 3.4}, "seconds": 5}
    (tmp_path / "training.json").write_text(json.dumps(training))
    figures = {"acceptance_length": {"value": 4.9}}
    rows = [{"data": "mt_bench", "temperature": 0.0, "method": "eagle3", "figures": figures,
             "by_category": {"math": {"acceptance_length": {"value": 5.5}}}}]  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    card = model_card(facts, tmp_path, tmp_path / "out", "apache-2.0")
    for line in ("license: apache-2.0", "| data | rows.jsonl |", "| max_steps | 7 |", "| tau_sim | 3.4 |",
                 "| mt_bench | 0 | eagle3 | 4.90 |", "| mt_bench, math | 0 | eagle3 | 5.50 |"):  # fmt: skip
        assert line in card
