"""Names of the Hugging Face hub, all the way through: a cache as the hub's client leaves it, and no network."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from draftwing.cli.arguments import add_execution, execution
from draftwing.embedded import EMBEDDED, EMBEDDED_DRAFTS

REVISION = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
import draftwing
from draftwing.cli import main

def run(command):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main(command)
    return [status, out.getvalue(), err.getvalue()]

def load(options):
    try:
        model = draftwing.load("org/two", **options)
    except ValueError as error:
        return str(error)
    return [model.tokenizer.chat_template, model.target.eos_token_ids, model.tokenizer("hi")["input_ids"]]

for line in sys.stdin:
    what, argument = json.loads(line)
    print(json.dumps({"run": run, "load": load}[what](argument)), flush=True)
"""
"""Does what it reads, line by line, in a process of its own: the hub's client reads its environment when imported."""
Offline = Callable[[str, Any], Any]


def put(cache: Path, name: str, folder: Path, ref: str = "main", commit: str = REVISION) -> None:
    """Lay a folder into the cache as the repository `org/name`: blobs, and a snapshot of links to them."""
    repository = cache / f"models--org--{name}"
    snapshot = repository / "snapshots" / commit
    for path in (repository / "refs", repository / "blobs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit, encoding="utf-8")
    for number, file in enumerate(sorted(folder.iterdir())):
        (repository / "blobs" / f"{commit}-{number}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{commit}-{number}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the embedded models under the names of an organisation."""
    cache = tmp_path_factory.mktemp("hub")
    folders = {"model": EMBEDDED / "target", "head": EMBEDDED / "eagle3", "small": EMBEDDED_DRAFTS["tiny-draft"]}
    for name, folder in folders.items():
        put(cache, name, folder)
    return cache


@pytest.fixture(scope="module")
def offline(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offline]:
    """What PROGRAM answers without a network: `("run", command)` or `("load", options)`."""
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["HF_MODULES_CACHE"] = str(cache / "modules")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    errors = tmp_path_factory.mktemp("offline") / "errors"
    with (
        errors.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def ask(what: str, argument: Any) -> Any:
            print(json.dumps([what, argument]), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, errors.read_text(encoding="utf-8")
            return json.loads(answer)

        yield ask


def test_targets_tokenizers_and_drafts_have_hub_names(offline: Offline) -> None:
    """The tokens are those of the embedded models by their own names."""
    options = ["--prompt", "def read(path):", "--max-new-tokens", "12", "--plan", "tree:3x2x6", "--json"]
    generate = ["generate", *options, "--target"]
    commands = [
        [*generate, "org/model", "--draft", "org/head"],
        [*generate, "org/model", "--draft", "org/small"],
        [*generate, "tiny", "--draft", "tiny"],
        ["inspect", "org/head", "--target", "org/model", "--json"],
        ["inspect", "org/small", "--target", "org/model", "--json"],
    ]
    outcomes = [offline("run", command) for command in commands]
    assert [status for status, _, _ in outcomes] == [0] * 5, outcomes
    of_head, of_small, embedded, head, small = (json.loads(out) for _, out, _ in outcomes)
    assert len(embedded["token_ids"]) == 12
    assert of_head["token_ids"] == of_small["token_ids"] == embedded["token_ids"]
    assert of_head["statistics"]["acceptance_length"] == embedded["statistics"]["acceptance_length"] > 1
    assert (head["format"], head["problems"]) == ("eagle3", [])
    assert (small["format"], small["problems"]) == ("language_model", [])


def test_what_is_not_there_is_said_in_one_line(offline: Offline, tmp_path: Path) -> None:
    generate = ["generate", "--prompt", "x", "--target"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{objective: eagle3, output: {tmp_path}/out, target: org/gone, data: stdlib}}", encoding="utf-8"
    )
    expected = {
        "target: no folder and no reachable hub id: 'org/gone': ": [*generate, "org/gone", "--draft", "org/head"],
        "draft: no folder and no reachable hub id: 'org/gone' (": [*generate, "org/model", "--draft", "org/gone"],
        "target: no folder and no reachable hub id: 'not a name': Repo id must": [*generate, "not a name"],
        "target: the tensors of 'org/head' have other shapes than": [*generate, "org/head"],
        "draft: no folder and no reachable hub id: 'org/away' (": ["inspect", "org/away"],
        "target: cannot read the config of 'org/gone': ": ["inspect", "org/head", "--target", "org/gone"],
        "target: cannot read the config of 'org/gone': We": ["train", str(recipe)],
    }
    for message, command in expected.items():
        status, out, err = offline("run", command)
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {message}")
        assert err.splitlines()[-1] == line
        assert (status, out) == (2, "")


TOKENIZER_IN_PYTHON = """
from transformers import PreTrainedTokenizer

class Bytes(PreTrainedTokenizer):
    vocab_size = 256
    def get_vocab(self):
        return {str(i): i for i in range(256)} | self.added_tokens_encoder
    def _tokenize(self, text, **_):
        return [str(byte) for byte in text.encode()]
    def _convert_token_to_id(self, token):
        return int(token)
    def _convert_id_to_token(self, index):
        return str(index)
    def convert_tokens_to_string(self, tokens):
        return bytes(map(int, tokens)).decode(errors="replace")
"""


def test_a_revision_and_trust_are_those_of_all_files(cache: Path, offline: Offline, tmp_path: Path) -> None:
    """The tokenizer and the generation config come from where the weights do, and code is run where it is trusted."""
    for name in ("old", "new"):
        shutil.copytree(EMBEDDED / "target", tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(name, encoding="utf-8")
        eos = {"eos_token_id": 3 if name == "old" else 9}
        (tmp_path / name / "generation_config.json").write_text(json.dumps(eos), encoding="utf-8")
    shutil.copytree(tmp_path / "new", tmp_path / "code")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "code" / file).unlink()
    own = {"tokenizer_class": "Bytes", "auto_map": {"AutoTokenizer": ["own_tokenizer.Bytes", None]}}
    (tmp_path / "code" / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    (tmp_path / "code" / "own_tokenizer.py").write_text(TOKENIZER_IN_PYTHON, encoding="utf-8")
    for commit, (name, ref) in enumerate((("new", "main"), ("old", "v1"), ("code", "v2"))):
        put(cache, "two", tmp_path / name, ref, str(commit) * 40)
    asked = [{}, {"revision": "v1"}, {"revision": "v2", "trust_remote_code": True}]
    asked += [{"revision": "v2", "trust_remote_code": False}, {"cache_dir": str(tmp_path / "empty")}]
    new, old, code, untrusted, elsewhere = (offline("load", options) for options in asked)
    assert (new[:2], old[:2], code[:2]) == (["new", [9]], ["old", [3]], ["new", [9]])
    assert new[2] == old[2] != code[2] == list(b"hi")
    assert untrusted.startswith("target: no tokenizer in 'org/two': ")
    assert "trust_remote_code=True" in untrusted
    assert elsewhere.startswith("target: no folder and no reachable hub id: 'org/two'")


def test_the_command_line_passes_them_on() -> None:
    parser = argparse.ArgumentParser()
    add_execution(parser)
    given = execution(parser.parse_args(["--revision", "v2", "--trust-remote-code"]))
    assert given == execution(parser.parse_args([])) | {"revision": "v2", "trust_remote_code": True}
