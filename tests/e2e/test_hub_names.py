"""Names of the Hugging Face hub, all the way through: a cache as the hub's client leaves it, and no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from draftwing.checkpoint.load import EMBEDDED, EMBEDDED_DRAFTS

REVISION = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from draftwing.cli import main

results = []
for command in json.loads(sys.argv[1]):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main(command)
    results.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
"""Runs commands one after another; the client of the hub reads its environment when it is imported."""
Result = tuple[int, str, str]


def put(cache: Path, name: str, folder: Path) -> None:
    """Lay a folder into the cache as the repository `org/name`: blobs, and a snapshot of links to them."""
    repository = cache / f"models--org--{name}"
    snapshot = repository / "snapshots" / REVISION
    for path in (repository / "refs", repository / "blobs", snapshot):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION, encoding="utf-8")
    for number, file in enumerate(sorted(folder.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the embedded models under the names of an organisation."""
    cache = tmp_path_factory.mktemp("hub")
    folders = {"model": EMBEDDED / "target", "head": EMBEDDED / "eagle3", "small": EMBEDDED_DRAFTS["tiny-draft"]}
    for name, folder in folders.items():
        put(cache, name, folder)
    return cache


def run(cache: Path, *commands: list[str]) -> list[Result]:
    """Status, stdout and stderr of each command, without a network."""
    offline = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = os.environ | offline | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return [tuple(item) for item in json.loads(result.stdout)]  # type: ignore[misc]


def test_targets_tokenizers_and_drafts_have_hub_names(cache: Path) -> None:
    """The tokens are those of the embedded models by their own names."""
    options = ["--prompt", "def read(path):", "--max-new-tokens", "12", "--plan", "tree:3x2x6", "--json"]
    generate = ["generate", *options, "--target"]
    outcomes = run(
        cache,
        [*generate, "org/model", "--draft", "org/head"],
        [*generate, "org/model", "--draft", "org/small"],
        [*generate, "tiny", "--draft", "tiny"],
        ["inspect", "org/head", "--target", "org/model", "--json"],
        ["inspect", "org/small", "--target", "org/model", "--json"],
    )
    assert [status for status, _, _ in outcomes] == [0] * 5, outcomes
    of_head, of_small, embedded, head, small = (json.loads(out) for _, out, _ in outcomes)
    assert len(embedded["token_ids"]) == 12
    assert of_head["token_ids"] == of_small["token_ids"] == embedded["token_ids"]
    assert of_head["statistics"]["acceptance_length"] == embedded["statistics"]["acceptance_length"] > 1
    assert (head["format"], head["problems"]) == ("eagle3", [])
    assert (small["format"], small["problems"]) == ("language_model", [])


def test_what_is_not_there_is_said_in_one_line(cache: Path, tmp_path: Path) -> None:
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
        "target: cannot read the configuration of 'org/gone': We": ["train", str(recipe)],
    }
    for message, (status, out, err) in zip(expected, run(cache, *expected.values()), strict=True):
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {message}")
        assert err.splitlines()[-1] == line
        assert (status, out) == (2, "")
