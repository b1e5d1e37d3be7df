"""Model cards, and the way to the hub: against a stand-in of its HTTP API."""

import base64
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from test_export import eagle3, target, write_tokenizer_gguf  # noqa: F401  (a fixture)

from draftwing.checks.check_export import Check
from draftwing.checks.loaders import Loaded
from draftwing.cli import main
from draftwing.drafts.eagle.gguf_head import HEAD_GGUF
from draftwing.drafts.export_draft import export_draft
from draftwing.drafts.publish import ExportFacts, push_folder


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
        self.say(status, said)

    def say(self, status: int, said: Any) -> None:
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        """Who the token is of; there is no repository yet."""
        self.say(*(self.server.who if "whoami" in self.path else (404, {})))  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    url = f"http://127.0.0.1:{server.server_port}"
    server.seen, server.created = [], (200, {"url": f"{url}/org/head"})  # type: ignore[attr-defined]
    server.who = (200, {"name": "me", "orgs": [{"name": "org"}, {"name": "others", "roleInOrg": "read"}]})  # type: ignore[attr-defined]
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


def nothing_came(hub: ThreadingHTTPServer) -> bool:
    return not [path for path, _, _ in hub.seen if "/commit/" in path]  # type: ignore[attr-defined]


def test_a_folder_comes_to_the_hub_whole(hub: ThreadingHTTPServer, folder: Path) -> None:
    written = {file.name for file in folder.iterdir()}
    (folder / ".env").write_text("PASSWORD=1")
    assert push_folder(folder, "org/head").endswith("/org/head")
    files = committed(hub)
    assert files.keys() == written, "what was put there later stays"
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert '"model": "org/head"' in card and "--draft org/head" in card
    path, key, body = hub.seen[0]  # type: ignore[attr-defined]
    assert (path, key) == ("/api/repos/create", "Bearer hf_secret")
    assert not {"private", "visibility"} & json.loads(body).keys(), "the account's default, as everywhere on the hub"


@pytest.mark.parametrize("name", ["vllm", "out", "it's mine", "für/mich"])
@pytest.mark.parametrize("is_moved", [False, True])
def test_no_place_of_this_machine_is_published(
    name: str,
    is_moved: bool,
    hub: ThreadingHTTPServer,
    target: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Folders called like a word of the card, with characters that are quoted, and such as lie elsewhere now."""
    monkeypatch.chdir(tmp_path)
    draft, out = eagle3(tmp_path / "secret/draft"), Path(name)
    export_draft(draft, target, "vllm", out, verifier="org/it", license="mit")
    if is_moved:
        out = out.rename(tmp_path / "elsewhere")
    push_folder(out, "org/head")
    files = committed(hub)
    facts = ExportFacts(**json.loads(files["export.json"]))
    card = files["README.md"].decode()
    assert facts == ExportFacts.read(out)
    assert card == facts.card("org/head")
    assert "# A draft of org/it for vLLM 0.32.0" in card and "vllm serve org/it --speculative-config" in card
    for text in (card, files["export.json"].decode()):
        assert not [private for private in (str(tmp_path), "secret", "mine", "mich", "f\\u00fcr") if private in text]


def test_a_gguf_folder_is_fetched_before_it_is_served(
    hub: ThreadingHTTPServer,
    target: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    gguf, out = write_tokenizer_gguf(tmp_path / "target-f32.gguf"), tmp_path / "out"
    export_draft(eagle3(tmp_path / "draft"), target, "llama.cpp", out, verifier="org/it", target_gguf=gguf)
    assert str(gguf) in (out / "README.md").read_text(), "here it runs as it is"
    push_folder(out, "org/head")
    files = committed(hub)
    assert files.keys() == {"README.md", "export.json", HEAD_GGUF}
    card = files["README.md"].decode()
    assert "hf download org/head --local-dir head\nllama-server -m target-f32.gguf -md head/head.gguf " in card
    assert "--draft head " in card and str(tmp_path) not in card + files["export.json"].decode()


def test_the_command_publishes(hub: ThreadingHTTPServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(folder), "--push-to-hub", "org/head", "--private", "--json"]
    assert main([*command, "--license", "apache-2.0", "--target", "org/other"]) == 0
    assert json.loads(capsys.readouterr().out)["url"].endswith("/org/head")
    asked = json.loads(hub.seen[0][2])  # type: ignore[attr-defined]
    assert asked.get("private") is True or asked["visibility"] == "private", "as the client's version says it"
    files = committed(hub)
    card = files["README.md"].decode()
    assert "license: apache-2.0\n" in card and "base_model: org/other\n" in card and "No licence" not in card
    assert json.loads(files["export.json"])["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--dtype", "bfloat16"], "dtype: has no use without --output"),
        (["--force"], "force: has no use without --output"),
        (["--to", "vllm"], "to: has no use without --check or --output"),
        (["--target-gguf", "x.gguf"], "target-gguf: has no use without --check or --output"),
        (["--target", "tiny"], "push-to-hub: tiny: others load the target by its hub id"),
        (["--verifier", "some/where"], "push-to-hub: some/where: others load"),  # a folder that is there
        (["--target", "org/it/deeper"], "push-to-hub: org/it/deeper: others load"),
    ],
)
def test_what_has_no_use_is_told(
    options: list[str],
    says: str,
    hub: ThreadingHTTPServer,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    (folder / "some/where").mkdir(parents=True)
    assert main(["export", str(folder), "--push-to-hub", "org/head", *options]) == 2
    assert says in capsys.readouterr().err
    assert nothing_came(hub)


def test_what_keeps_a_folder_from_the_hub(
    hub: ThreadingHTTPServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(says: str, folder: Path = folder, repository: str = "org/head") -> None:
        with pytest.raises(ValueError, match=says):
            push_folder(folder, repository)

    refused(r"export: .*draft has no export.json", tmp_path / "draft")
    hub.created = (403, {"error": "You don't have the rights"})  # type: ignore[attr-defined]
    refused(r"push-to-hub: org/head: .*rights")
    refused(r"push-to-hub: a b/c: expected ORG/NAME", repository="a b/c")
    refused(r"push-to-hub: the token may not write to others, only to me, org", repository="others/head")
    hub.who = (200, {"name": "me", "auth": {"accessToken": {"role": "read"}}})  # type: ignore[attr-defined]
    refused(r"push-to-hub: the token may only read")
    hub.who = (401, {"error": "no such token"})  # type: ignore[attr-defined]
    refused(r"push-to-hub: org/head: ")
    record = (folder / "export.json").read_text()
    for name, value in (("target", 3), ("files", None), ("faults", "x"), ("more", "")):
        (folder / "export.json").write_text(json.dumps(json.loads(record) | {name: value}))
        refused(r"export: cannot read .*export.json: .*; export the draft again")
    (folder / "export.json").write_text(record[:-9])
    refused(r"export: cannot read .*export.json: .*; export the draft again")
    (folder / "export.json").write_text(json.dumps(json.loads(record) | {"files": ["../secret", "README.md"]}))
    (tmp_path / "secret").write_text("")
    refused(r"push-to-hub: .* lacks \.\./secret")
    (folder / "export.json").write_text(record)
    (folder / "README.md").unlink()
    refused(r"push-to-hub: .* lacks README.md; export the draft again")
    assert nothing_came(hub)


def test_no_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"push-to-hub: no token .*HF_TOKEN"):
        push_folder(folder, "org/head")


def test_a_configuration_with_another_targets_name_stays(
    hub: ThreadingHTTPServer,
    target: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The format of speculators names the target in config.json, too."""
    export_draft(eagle3(tmp_path / "draft"), target, "speculators", tmp_path / "out")
    with pytest.raises(ValueError, match=r"config.json names .*; export the draft again with --verifier org/it"):
        push_folder(tmp_path / "out", "org/head", target="org/it")
    assert nothing_came(hub)


def test_what_cannot_be_published_is_not_even_exported(
    hub: ThreadingHTTPServer,
    target: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = ["export", eagle3(tmp_path / "draft"), "--to", "vllm", "--output", str(out), "--push-to-hub", "org/head"]
    assert main([*command, "--target", target]) == 2
    assert "--verifier ORG/NAME" in capsys.readouterr().err and not out.exists()
    assert main([*command, "--target", target, "--verifier", "org/it", "--check", "nowhere"]) == 2
    assert "check: no such program" in capsys.readouterr().err and not out.exists()


def test_a_failed_check_publishes_nothing(
    hub: ThreadingHTTPServer, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Check("vllm", "transformers", "5", loaded=Loaded("5", 3, 0, ["hidden_size"]))
    monkeypatch.setattr("draftwing.checks.check_export.check_export", lambda request, say: found)
    command = ["export", str(folder), "--check", sys.executable, "--push-to-hub", "org/head", "--json"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "nothing was published at org/head" in said.err
    assert json.loads(said.out)["check"]["problems"] == ["hidden_size: it reads something else"]
    assert nothing_came(hub)
    right = Check("vllm", "transformers", "5", loaded=Loaded("5", 3, 0, []))
    monkeypatch.setattr("draftwing.checks.check_export.check_export", lambda request, say: right)
    hub.created = (403, {"error": "You don't have the rights"})  # type: ignore[attr-defined]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "rights" in said.err and json.loads(said.out)["check"]["agrees"], "the check's result is not lost"


def test_a_card_says_what_is_on_record(target: str, tmp_path: Path) -> None:  # noqa: F811
    """Of the draft itself: not of other methods and drafts in the same table, nor where nothing was drafted."""
    draft = Path(eagle3(tmp_path / "draft"))
    export_draft(str(draft), target, "vllm", tmp_path / "bare")
    bare = (tmp_path / "bare/README.md").read_text()
    assert "## " not in bare and "No licence was stated" in bare
    training = {"recipe": {"data": ["x/rows.jsonl"], "max_steps": 7}, "metrics": {"eval_tau_sim": 3.4}, "seconds": 5}
    (draft / "training.json").write_text(json.dumps(training))
    tau = [{"acceptance_length": {"value": value}} for value in (4.9, 5.5)]
    row = {"data": "mt_bench", "temperature": 0.0, "figures": tau[0]}
    nothing = {"acceptance_length": None}
    rows = [
        row | {"method": "eagle3", "by_category": {"math": tau[1], "none": nothing}},
        row | {"method": "eagle3:chain:7+ngram", "figures": tau[1]},
        row | {"method": "eagle3", "data": "empty", "figures": nothing},
        row | {"method": "eagle3", "data": "failed", "figures": None},
        *(row | {"method": method} for method in ("plain", "ngram", "medusa", "eagle3@other:chain:7")),
    ]
    (draft / "results.json").write_text(json.dumps({"rows": rows}))
    export_draft(str(draft), target, "vllm", tmp_path / "out", license="apache-2.0")
    card = (tmp_path / "out/README.md").read_text()
    for line in ("license: apache-2.0", "| data | rows.jsonl |", "| max_steps | 7 |", "| tau_sim | 3.4 |"):
        assert line in card
    assert card.partition("| method | tau |\n|---|---|---|---|\n")[2] == (
        "| mt_bench | 0 | eagle3 | 4.90 |\n| mt_bench, math | 0 | eagle3 | 5.50 |\n"
        "| mt_bench | 0 | eagle3:chain:7+ngram | 5.50 |\n"
    )
