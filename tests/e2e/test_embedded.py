"""The embedded models: they are what the README says, they load, and speculation keeps their tokens."""

import json
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import draftwing
from draftwing.api import GenerateOutput, SpeculativeModel
from draftwing.cli import main
from draftwing.data.prompts import Prompt, read_prompts
from draftwing.embedded import EMBEDDED, EMBEDDED_DRAFTS, EMBEDDED_PROMPTS, SMOLLM2_PACKAGE

METHODS = {"eagle1": "tiny-eagle1", "eagle2": "tiny-eagle1", "eagle3": "tiny"}
PLANS = {"eagle2": "tree:4x4x16", "draft_model": "tree:4x4x16"}
"""The others have their own."""
RIVALS = {"medusa": "tiny-medusa", "draft_model": "tiny-draft"}


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return read_prompts(EMBEDDED_PROMPTS)


@pytest.fixture(scope="module")
def models() -> dict[str, SpeculativeModel]:
    """In float32, where a row's bits do not depend on what passes with it."""
    return {
        method: draftwing.load("tiny", draft=draft, method=method, draft_dtype="target")
        for method, draft in METHODS.items()
    }


def decode(model: SpeculativeModel, prompt: Prompt, **options: object) -> GenerateOutput:
    ids = torch.tensor([prompt.token_ids(model.tokenizer)])
    output = model.generate(ids, max_new_tokens=32, return_dict_in_generate=True, **options)
    assert isinstance(output, GenerateOutput)
    return output


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_speculation_keeps_the_tokens(
    models: dict[str, SpeculativeModel], prompts: list[Prompt], method: str, temperature: float
) -> None:
    for prompt in prompts[:3]:
        fast = decode(models[method], prompt, temperature=temperature, plan=PLANS.get(method))
        plain = decode(models[method].with_method("plain"), prompt, temperature=temperature)
        assert fast.tokens == plain.tokens


@cache
def rival(draft: str | None, method: str) -> SpeculativeModel:
    return draftwing.load("tiny", draft=draft, method=method)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["lookahead", *RIVALS])
def test_rivals_keep_the_tokens(prompts: list[Prompt], method: str, temperature: float) -> None:
    draft = RIVALS.get(method)
    if draft and not EMBEDDED_DRAFTS[draft].is_dir():
        pytest.skip(f"{draft} is not embedded yet")
    model = rival(draft, method)
    fast = decode(model, prompts[0], temperature=temperature, plan=PLANS.get(method))
    assert fast.tokens == decode(model.with_method("plain"), prompts[0], temperature=temperature).tokens
    assert fast.statistics.acceptance_length > 1


def test_acceptance_ranks_as_in_the_papers(models: dict[str, SpeculativeModel], prompts: list[Prompt]) -> None:
    """A regression test of the heads: EAGLE-3 above EAGLE-2 above EAGLE-1, all with 26 nodes."""
    tau = {}
    for method, model in models.items():
        figures = draftwing.Statistics()
        for prompt in prompts[:6]:
            figures.merge(decode(model, prompt, plan=None if method == "eagle1" else "tree:4x5x26").statistics)
        tau[method] = figures.acceptance_length
    assert tau["eagle3"] > tau["eagle2"] > tau["eagle1"] > 1.5
    assert tau["eagle3"] > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_chat_models_head_keeps_its_tokens(temperature: float) -> None:
    """Its target is in a package that `make chat` installs."""
    if not all(map(find_spec, (SMOLLM2_PACKAGE, "gguf"))):
        pytest.skip("it is not installed")
    model = draftwing.load("smollm2", draft="smollm2", dtype="float32")
    prompt = Prompt("colours", messages=({"role": "user", "content": "Name three colours."},))
    fast = decode(model, prompt, temperature=temperature, plan="tree:3x4x12")
    assert fast.tokens == decode(model.with_method("plain"), prompt, temperature=temperature).tokens
    assert fast.statistics.acceptance_length > 1


def test_the_chat_models_head_is_whole_and_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "smollm2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "eagle3"
    folder = EMBEDDED_DRAFTS["smollm2"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25e6
    assert "Apache-2.0" in (folder.parent / "README.md").read_text(encoding="utf-8")


def test_the_demo_prints_its_table_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json", "--prompts", "1", "--max-new-tokens", "12", "--repeats", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["method"], row["temperature"]) for row in rows] == [
        (method, temperature) for temperature in (0.0, 1.0) for method in ("plain", "eagle1", "eagle2", "eagle3")
    ]
    keys = {"method", "temperature", "tokens_per_second", "acceptance_length", "speedup", "identical"}
    assert all(set(row) == keys and row["identical"] for row in rows)


def test_the_demo_shows_completions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--prompts", "1", "--max-new-tokens", "8", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert "identical" in shown
    assert "target passes" in shown
    assert "NO" not in shown


def test_the_demo_takes_any_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chat model is asked questions; what needs no draft is shown beside a draft's own method."""
    shutil.copytree(EMBEDDED / "target", tmp_path / "model")
    options = ["--target", str(tmp_path / "model"), "--prompts", "1", "--max-new-tokens", "8", "--repeats", "1"]
    assert main(["demo", *options]) == 0
    shown = capsys.readouterr().out
    assert "Why does the sky turn red in the evening?" in shown
    assert "identical" in shown and "NO" not in shown
    assert main(["demo", *options, "--draft", "tiny-draft", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows if row["temperature"] == 0] == ["plain", "lookahead", "ngram", "draft_model"]
    assert all(row["identical"] for row in rows)


def test_the_assets_are_small_bfloat16_and_licence_clean() -> None:
    files = list(EMBEDDED.rglob("*"))
    assert sum(path.stat().st_size for path in files if path.is_file()) < 60e6
    for name in ("target", "eagle1", "eagle3"):
        config = json.loads(Path(EMBEDDED / name / "config.json").read_text(encoding="utf-8"))
        assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    for word in ("standard library", "licence", "hardware", "tau"):
        assert word in card.lower()
