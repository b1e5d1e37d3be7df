"""`draftwing eval` on the embedded models: figures, files, stops and resumes, failures, mistakes."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from draftwing.api import SpeculativeModel
from draftwing.cli import eval_setup, main
from draftwing.engine.generation import Generation

Method = Callable[..., Generation]


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """The embedded target is loaded once for all tests."""
    loaded: dict[Any, SpeculativeModel] = {}
    real = eval_setup.load

    def load(target: str, **options: Any) -> SpeculativeModel:
        key = target, *options.values()
        if key not in loaded:
            loaded[key] = real(target, **options)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_setup, "load", load)
        yield


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two conversations, one of two turns, in two categories."""
    rows = [
        {"question_id": 1, "category": "chat", "turns": ["Write the Python function clamp.", "Add a docstring."]},
        {"question_id": 2, "category": "code", "turns": ["Write the Python function mean."]},
    ]
    (tmp_path / "mt_bench.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path / "mt_bench.jsonl"


METHODS = "plain,ngram,eagle3:chain:3,eagle3:tree:3x3x10,eagle3:tree:3x3x10+uncoupled,eagle1,eagle2:tree:4x5x26"
NAMES = METHODS.split(",")
COMMON = ("eval", "--dtype", "float32", "--max-new-tokens", "10")


def call(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert main((*COMMON, *arguments, "--json")) == status
    return json.loads(capsys.readouterr().out)


def test_all_figures_of_both_turns(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    result = call(capsys, "--methods", METHODS, "--data", str(prompts), "--output", str(output))
    rows = {(row["temperature"], row["method"]): row for row in result["rows"]}
    assert list(rows) == [(temperature, name) for temperature in (0.0, 1.0) for name in NAMES]
    for (_, name), row in rows.items():
        figures = row["figures"]
        assert figures["identical_share"] == 1.0, name
        assert figures["num_turns"] == row["num_expected"] == len(row["runs"]) == 3
        assert figures["tokens_per_second"]["low"] <= figures["tokens_per_second"]["value"]
        assert set(row["by_category"]) == {"chat", "code"}
        assert row["peak_bytes"] > 2**20
        assert sum(row["stage_seconds"].values()) <= figures["seconds"]
        cycles = sum(run["num_cycles"] for run in row["runs"])
        assert figures["acceptance_length"]["value"] == pytest.approx(figures["num_tokens"] / cycles)
        assert (row["n_alpha"] is not None) == (name == "eagle3:chain:3")
    assert rows[0.0, "plain"]["figures"]["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert {one["what"] for one in result["ablations"]} == {
        "tree against chain",
        "drafting without the target's noise",
        "dynamic against static tree",
    }
    record = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert record["rows"] == result["rows"]
    assert record["provenance"]["torch"]
    assert "Acceptance by step on chains" in (output / "report.html").read_text(encoding="utf-8")
    # The second turn's prompt holds plain decoding's first answer.
    runs = [json.loads(line) for line in (output / "runs.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    lengths = {(run["prompt"], run["turn"]): run["num_prompt_tokens"] for run in runs if run["temperature"] == 0}
    assert lengths[0, 2] > lengths[0, 1] + 10


def failing(monkeypatch: pytest.MonkeyPatch, plan: str, error: BaseException, after: int) -> None:
    """Make decoding with a plan raise from its so-many-th generation on."""
    real, num_calls = SpeculativeModel.start, [0]

    def start(self: SpeculativeModel, prompts: Any, **options: Any) -> Generation:
        num_calls[0] += options.get("plan") == plan
        if options.get("plan") == plan and num_calls[0] > after:
            raise error
        return real(self, prompts, **options)

    monkeypatch.setattr(SpeculativeModel, "start", start)


def figures_without_seconds(result: Any) -> Any:
    keep = ("num_tokens", "num_cycles", "accepted_at", "reached_at", "identical", "prompt", "turn")
    return [[{name: run[name] for name in keep} for run in row["runs"]] for row in result["rows"]]


def test_a_stopped_run_leaves_a_report_and_goes_on(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = "plain,eagle3:tree:2x2x6+ngram,eagle3:chain:3"  # lookups pause after a while
    command = ("--methods", methods, "--data", str(prompts), "--temperatures", "0", "--max-new-tokens", "24")
    whole = call(capsys, *command)
    output = ("--output", str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        failing(patch, "chain:3", KeyboardInterrupt(), after=2)  # the warm-up and the first turn
        stopped = call(capsys, *command, *output, status=130)
    assert [len(row["runs"]) for row in stopped["rows"]] == [1, 1, 1]
    assert (tmp_path / "out" / "report.html").is_file()
    journal = tmp_path / "out" / "runs.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"data": "mt_')  # and cut while writing
    before = journal.read_text(encoding="utf-8").splitlines()[1:4]
    assert main((*COMMON, *command, *output, "--json")) == 0
    printed = capsys.readouterr()
    resumed = json.loads(printed.out)
    assert f"resuming from {journal}: 3 runs are there" in printed.err
    assert printed.err.splitlines()[-1].startswith(f"saved to {tmp_path / 'out' / 'results.json'}, ")
    assert journal.read_text(encoding="utf-8").splitlines()[1:4] == before
    assert figures_without_seconds(resumed) == figures_without_seconds(whole)
    # Other settings do not mix with these.
    assert main((*COMMON, *command, *output, "--seed", "1")) == 2
    assert "seed was 0, is 1" in capsys.readouterr().err
    assert len(call(capsys, *command, *output, "--seed", "1", "--fresh")["rows"]) == 3


def test_a_model_that_was_trained_on_is_another_one(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()
    before = eval_setup._stamped("mine", tmp_path)
    assert before == eval_setup._stamped("mine", tmp_path)
    os.utime(weights, (0, 10**9))
    assert eval_setup._stamped("mine", tmp_path) == "mine of 2001-09-09T01:46:40+00:00" != before
    assert eval_setup._stamped("org/name", tmp_path / "nowhere") == "org/name"
    file = tmp_path / "head.gguf"
    file.touch()
    os.utime(file, (0, 10**9))
    assert eval_setup._stamped("mine", file) == "mine of 2001-09-09T01:46:40+00:00"


def test_a_method_that_fails_is_marked_and_the_others_are_written(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "chain:3", RuntimeError("the machine is on fire"), after=2)
    methods = ("--methods", "plain,eagle3:chain:3,eagle3:tree:3x3x10", "--temperatures", "0")
    result = call(capsys, *methods, "--data", str(prompts), "--output", str(tmp_path / "out"), status=1)
    by_method = {row["method"]: row for row in result["rows"]}
    assert "RuntimeError: the machine is on fire" in by_method["eagle3:chain:3"]["failure"]
    assert len(by_method["eagle3:chain:3"]["runs"]) == 1
    assert len(by_method["eagle3:tree:3x3x10"]["runs"]) == 3
    assert "on fire" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_drafts_have_names_and_rows_tell_them_apart(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drafts = ("--draft", "one=tiny-eagle1", "--draft", "two=tiny-eagle1", "--temperatures", "0", "--num-prompts", "1")
    result = call(capsys, *drafts, "--methods", "eagle1,eagle1@two:chain:2", "--data", str(prompts))
    assert [row["method"] for row in result["rows"]] == ["plain", "eagle1@one", "eagle1@two", "eagle1@two:chain:2"]
    assert main((*COMMON, *drafts, "--methods", "eagle3", "--data", str(prompts))) == 2
    assert "none of the drafts (one, two) serves eagle3" in capsys.readouterr().err


def test_the_table_on_the_console(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (prompts.parent / "long.jsonl").write_text(json.dumps({"name": "novel", "prompt": "x = 1\n" * 2000}) + "\n"
                                               + json.dumps({"prompt": "x = "}), encoding="utf-8")  # fmt: skip
    command = ("--methods", "plain,eagle3:chain:3", "--data", str(prompts.parent / "long.jsonl"), "--temperatures", "0")
    assert main((*COMMON, *command)) == 0
    captured = capsys.readouterr()
    for expected in ("long, T = 0", "eagle3:chain:3", "1/1"):
        assert expected in captured.out
    assert "long: novel, turn 1 skipped" in captured.err


def test_transformers_is_measured_beside(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("--methods", "plain", "--against", "transformers", "--num-prompts", "1", "--temperatures", "0")
    command += ("--dtype", "float64")  # where no rounding can tell the two apart
    rows = call(capsys, *command, "--data", str(prompts))["rows"]
    assert [row["method"] for row in rows] == ["plain", "transformers", "transformers:prompt_lookup"]
    assert all(row["figures"]["identical_share"] == 1.0 for row in rows)
    assert rows[1]["figures"]["acceptance_length"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "egle3"], "methods: unknown method 'egle3'; did you mean 'eagle3'"),
        (["--methods", "eagle3:tree:4"], "plan: expected"),
        (["--methods", "eagle3@mine"], "methods: eagle3@mine: no draft is called mine; there are: tiny"),
        (["--target", "x", "--methods", "eagle3"], "methods: eagle3 needs a draft"),
        (["--draft", "a=x", "--draft", "a=y"], "draft: two drafts are called a"),
        (["--data", "mt_bech"], "data: expected NAME=PATH, a file, or one of embedded, mt_bench"),
        (["--data", "mt_bench="], "data: expected NAME=PATH, got 'mt_bench='"),
        (["--data", "mine=no/such.jsonl"], "no such file: no/such.jsonl"),
        (["--data", "{empty}"], "empty.jsonl is empty"),
        (["--data", "{other}"], "line 1: expected one of prompt, messages, conversations, turns"),
        (["--data", "{good},{good}"], "data: two data sets are called good"),
        (["--data", "gsm8k"], "draftwing[eval]"),
        (["--device", "gpu"], "device"),
        (["--against", "vllm"], "against: expected transformers or a URL"),
        (["--against", "http://127.0.0.1:9/v1"], "against: no OpenAI-compatible server answers"),
        (["--assistant", "tiny"], "assistant: needs --against transformers"),
        (["--endpoint-model", "m"], "endpoint-model: needs --against URL"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    files = {"empty": "", "other": '{"question": "a"}\n', "good": '{"prompt": "a"}\n'}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(content, encoding="utf-8")
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in files}
    monkeypatch.setattr(eval_setup, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(("eval", *(argument.format(**paths) for argument in arguments))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
