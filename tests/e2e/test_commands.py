"""The life of a head through the command line: train, inspect, generate; in a temporary folder, on a few rows."""

import argparse
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Forked
from rich.console import Console
from rich.progress import Progress

import draftwing
from draftwing.cli import _noted, main
from draftwing.cli import eval as eval_command
from draftwing.embedded import EMBEDDED
from draftwing.evaluation.report import Report
from draftwing.target.load import load_tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a command that prints JSON alone on stdout."""
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained target with its heads and smaller models, and the recipe that made them."""
    folder = tmp_path_factory.mktemp("life")
    rows: list[dict[str, Any]] = [{"text": f"def add_{n}(a, b):\n    return a + b + {n}\n" * 3} for n in range(20)]
    for n in range(20):
        turns = [{"role": "user", "content": f"Add {n}."}, {"role": "assistant", "content": f"return a + {n}"}]
        rows.append({"messages": turns})
    rows.append({"text": "class Adder:\n" + "    def add(self, a, b):\n        return a + b\n" * 4})  # held out
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    common = {"data": str(folder / "data.jsonl"), "sequence_length": 32, "batch_size": 4, "bf16": False}
    common |= {"max_steps": 6, "warmup_steps": 1, "log_every": 2, "evaluate_every": 3, "save_every": 3}
    head = common | {"target": str(folder / "target")}
    stages = [
        common | {"objective": "language_model", "output": str(folder / "target"), "vocab_size": 300}
        | {"architecture": SIZES},
        head | {"objective": "eagle1", "output": str(folder / "eagle1")},
        head | {"objective": "eagle3", "output": str(folder / "eagle3"), "draft_vocab_size": 200}
        | {"aux_layers": [1, 3, 5], "ttt_steps": 3},
        common | {"objective": "language_model", "output": str(folder / "small"), "vocab_size": 300}
        | {"architecture": SIZES | {"num_hidden_layers": 2}},
        head | {"objective": "medusa", "output": str(folder / "medusa"), "medusa_heads": 2},
        head | {"objective": "language_model", "output": str(folder / "taught"), "tokenizer": str(folder / "target")}
        | {"teacher": str(folder / "target")}
        | {"architecture": SIZES | {"num_hidden_layers": 1, "hidden_size": 16}},
    ]  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder


OUTPUTS = (
    *(("target", "eval_loss"), ("eagle1", "eval_tau_sim"), ("eagle3", "eval_accuracy_2")),
    *(("medusa", "eval_accuracy_1"), ("taught", "eval_loss")),
)


def test_training_leaves_figures_and_checkpoints(folder: Path) -> None:
    for output, metric in OUTPUTS:
        record = json.loads((folder / output / "training.json").read_text(encoding="utf-8"))
        assert record["metrics"][metric] >= 0
        assert record["provenance"]["torch"]
        assert (folder / output / "checkpoints" / "checkpoint-6").is_dir()


def test_a_finished_run_does_not_start_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((folder / "eagle3" / "training.json").read_text(encoding="utf-8"))["metrics"]
    assert main(["train", str(folder / "recipe.yaml"), "--stage", "2"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    assert printed.err.splitlines()[-1] == f"saved to {folder / 'eagle3'}"


def test_data_that_is_too_short_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "short.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    (folder / "short.yaml").write_text(
        f"{{objective: eagle3, output: {folder}/short, target: {folder}/target, data: {folder}/short.jsonl,"
        " aux_layers: [1, 3, 5]}",
        encoding="utf-8",
    )
    assert main(["train", str(folder / "short.yaml")]) == 2
    assert "data: no usable training row: of " in capsys.readouterr().err


def test_other_drafts_continue_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Medusa heads from their last checkpoint, and from another run's."""
    before = json.loads((folder / "medusa" / "training.json").read_text(encoding="utf-8"))["metrics"]
    again = call(capsys, "train", str(folder / "recipe.yaml"), "--stage", "4")
    assert again["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)
    stage = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["stages"][4]
    stage |= {"output": str(folder / "medusa_more"), "init_from": str(folder / "medusa"), "learning_rate": 0.0}
    (folder / "more.yaml").write_text(yaml.safe_dump(stage), encoding="utf-8")
    more = call(capsys, "train", str(folder / "more.yaml"))
    assert more["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-2)  # its file is bfloat16
    stage |= {"output": str(folder / "medusa_none"), "init_from": str(folder / "eagle3")}
    (folder / "more.yaml").write_text(yaml.safe_dump(stage), encoding="utf-8")
    assert main(["train", str(folder / "more.yaml")]) == 2
    assert "holds an EAGLE-3 head, the objective is medusa" in capsys.readouterr().err


def test_a_taught_draft_model_has_the_targets_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = call(capsys, "inspect", str(folder / "taught"), "--target", str(folder / "target"), "--json")
    assert (report["vocab_size"], report["target_vocab_size"], report["problems"]) == (300, 300, [])
    assert not (folder / "taught" / "prompts.jsonl").exists()


def test_a_teacher_with_fewer_tokens_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["stages"][5]
    stage |= {"output": str(folder / "mistaught"), "tokenizer": "tiny"}
    (folder / "mistaught.yaml").write_text(yaml.safe_dump(stage), encoding="utf-8")
    assert main(["train", str(folder / "mistaught.yaml")]) == 2
    assert "tokenizer: it has 4096 tokens and the target 300" in capsys.readouterr().err


@pytest.mark.parametrize("draft", ["eagle1", "eagle3", "medusa", "small", "taught"])
@pytest.mark.parametrize("temperature", ["0", "1"])
def test_generate_compares_with_plain(
    folder: Path, capsys: pytest.CaptureFixture[str], draft: str, temperature: str
) -> None:
    result = call(
        capsys, "generate", "--target", str(folder / "target"), "--draft", str(folder / draft), "--prompt", "def add",
        "--dtype", "float64", "--temperature", temperature, "--max-new-tokens", "24", "--compare", "--json",
        *(("--ngram", "--draft-window", "16") if draft.startswith("eagle") else ()),
    )  # fmt: skip
    assert result["identical"] is True
    assert result["plain"]["token_ids"] == result["speculative"]["token_ids"]
    for run in (result["plain"], result["speculative"]):
        assert run["num_tokens"] == len(run["token_ids"])
        assert run["tokens_per_second"] == pytest.approx(run["num_tokens"] / run["seconds"])
    assert result["acceptance_length"] >= 1


def test_lookahead_compares_with_plain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(
        capsys, "generate", "--target", str(folder / "target"), "--method", "lookahead", "--prompt", "def add",
        "--dtype", "float64", "--plan", "lookahead:5x3x4", "--max-new-tokens", "40", "--compare", "--json",
    )  # fmt: skip
    assert result["identical"] is True
    assert result["acceptance_length"] >= 1


def test_self_generated_rows_are_what_the_target_says_and_resume(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "self.jsonl"
    recipe = {"objective": "self_generated", "output": str(output), "target": str(folder / "target"), "bf16": False}
    recipe |= {"data": str(folder / "data.jsonl"), "sequence_length": 48, "prompt_length": 8, "batch_size": 8}
    (folder / "self.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    call(capsys, "train", str(folder / "self.yaml"))
    whole, record = output.read_bytes(), (folder / "self.json").read_bytes()
    assert main(["train", str(folder / "self.yaml")]) == 0
    assert (output.read_bytes(), (folder / "self.json").read_bytes()) == (whole, record), "finished already"
    rows = [json.loads(line) for line in whole.splitlines()]
    assert any(row["held_out"] for row in rows)
    assert all(len(row["input_ids"]) == len(row["loss_mask"]) <= 48 for row in rows)
    greedy = next(row for index, row in enumerate(rows) if index % 2 == 0)
    prompt = torch.tensor([greedy["input_ids"][: greedy["loss_mask"].index(1)]])
    expected = draftwing.load(str(folder / "target")).generate(prompt, max_new_tokens=48 - prompt.shape[1])
    assert isinstance(expected, torch.Tensor)
    assert expected[0].tolist() == greedy["input_ids"]
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:8]) + b'{"input_ids": [1, ')  # cut while writing
    assert main(["train", str(folder / "self.yaml")]) == 0
    assert output.read_bytes() == whole
    resumed = json.loads((folder / "self.json").read_text(encoding="utf-8"))
    assert resumed["metrics"] == json.loads(record)["metrics"], "of all rows, not of those of the last part"
    said = capsys.readouterr().err.splitlines()
    assert f"resuming from {output}: 8 of {len(rows)} rows are there" in said
    assert said[-1] == f"saved to {output}"


def test_generate_stops_before_a_stop_string(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "--target", str(folder / "target"), "--draft", str(folder / "eagle3"), "--prompt", "def add"]
    text = call(capsys, *common, "--json", "--max-new-tokens", "24")["text"]
    stop = text[len(text) // 2 :][:2]
    stopped = call(capsys, *common, "--json", "--max-new-tokens", "24", "--stop", stop)
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_generate_streams_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "--target", str(folder / "target"), "--draft", str(folder / "eagle3"), "--prompt", "def add"]
    expected = call(capsys, *common, "--json", "--max-new-tokens", "12")["text"]
    assert main([*common, "--max-new-tokens", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == expected.strip()
    assert "tau" in captured.err


LONG = 'words = ["' + "many words that a terminal would break, " * 5 + '"]'


@pytest.mark.parametrize("compare", [False, True])
def test_what_is_no_terminal_gets_the_text_as_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, compare: bool
) -> None:
    """Nothing is wrapped at 80 columns, no tab or :name: is replaced, whatever COLUMNS and FORCE_COLOR say."""
    monkeypatch.setenv("COLUMNS", "30")
    said = LONG + "\n\tx = d[1:sum:2]  # [bold]"
    monkeypatch.setattr("draftwing.engine.stopping.TextStream.push", lambda self, token: "")
    monkeypatch.setattr("draftwing.engine.stopping.TextStream.flush", lambda self: said)
    monkeypatch.setattr("draftwing.engine.stopping.cut_at_stop", lambda text, stops, tokenizer: said)
    common = ["generate", "--target", str(folder / "target"), "--prompt", "x", "--max-new-tokens", "2"]
    assert main([*common, *(["--compare"] if compare else [])]) == 0
    assert capsys.readouterr().out.startswith(said + "\n")


def test_tables_are_not_squeezed_in_files(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert main(["inspect", str(folder / "eagle3")]) == 0
    assert "every tensor is there, known and of the expected shape" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("--prompt", "-"), ()])
def test_the_prompt_may_come_from_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """All of it but the newline that `echo` and editors leave at the end."""
    common = ("generate", "--target", str(folder / "target"), "--max-new-tokens", "12", "--json")
    expected = call(capsys, *common, "--prompt", "def add\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"def add\n\n")))
    assert call(capsys, *common, *arguments)["token_ids"] == expected["token_ids"]


@pytest.mark.parametrize(
    ("given", "message"), [(b"", "prompt: standard input is empty"), (b"\xff", "prompt: standard input is not UTF-8")]
)
def test_standard_input_without_a_text_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: bytes, message: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert main(["generate", "--target", "no/such/folder", "--prompt", "-"]) == 2
    assert message in capsys.readouterr().err


def test_without_a_prompt_a_terminal_is_not_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert main(["generate", "--target", "no/such/folder"]) == 2
    assert "prompt: expected --prompt TEXT" in capsys.readouterr().err


def test_the_version_names_what_it_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"draftwing \S+, torch \S+, transformers \S+\n", capsys.readouterr().out)


def test_inspect_reports_and_checks_the_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = call(capsys, "inspect", str(folder / "eagle3"), "--target", str(folder / "target"), "--json")
    assert (report["format"], report["draft_vocab_size"], report["aux_layers"]) == ("eagle3", 200, [1, 3, 5])
    assert report["problems"] == []
    assert main(["inspect", str(folder / "eagle3"), "--target", "tiny", "--json"]) == 1
    assert any("vocab_size" in problem for problem in json.loads(capsys.readouterr().out)["problems"])


def test_inspect_says_what_the_draft_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for draft in ("eagle3", "medusa", "small"):
        assert main(["inspect", str(folder / draft)]) == 0
        assert "fits" not in capsys.readouterr().out
        assert main(["inspect", str(folder / draft), "--target", str(folder / "target")]) == 0
        written = capsys.readouterr().out.splitlines()  # in a pipe: no frame, no padding
        assert f"fits: {folder / 'target'}" in written
        assert all(re.fullmatch(r"[a-z][^:│]*: .*\S|/.*", line) for line in written), written


def test_inspect_recognises_a_draft_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = call(capsys, "inspect", str(folder / "small"), "--target", str(folder / "target"), "--json")
    assert (report["format"], report["architecture"]) == ("language_model", "LlamaForCausalLM")
    assert (report["num_layers"], report["hidden_size"], report["max_positions"]) == (2, 32, 128)
    assert report["vocab_size"] == report["target_vocab_size"]
    assert report["problems"] == []
    assert main(["inspect", str(folder / "small")]) == 0
    assert "can draft" in capsys.readouterr().out


def test_a_draft_model_with_another_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = str(folder / "small")
    assert main(["inspect", small, "--target", "tiny", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "vocab_size" in problem
    assert "different tokenizers" in problem
    assert main(["generate", "--target", "tiny", "--draft", small, "--prompt", "x"]) == 2
    assert problem in capsys.readouterr().err


def test_a_method_that_the_draft_is_not_made_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "--target", str(folder / "target"), "--prompt", "x"]
    assert main([*common, "--draft", str(folder / "small"), "--method", "eagle3"]) == 2
    assert "method: eagle3 cannot use this draft, which is a language model" in capsys.readouterr().err
    assert main([*common, "--draft", str(folder / "eagle3"), "--method", "draft_model"]) == 2
    assert "method: draft_model cannot use this draft, which is an EAGLE-3 head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--target", "no/such/folder", "--prompt", "x"],
            "target: no folder and no reachable hub id: 'no/such/folder'",
        ),
        (["generate", "--target", "tiny", "--draft", "no/such/head", "--prompt", "x"], "draft:"),
        (["generate", "--target", "tiny", "--draft", "tiny", "--prompt", ""], "prompt 0 is empty"),
        (["generate", "--target", "tiny", "--prompt", "x", "--temperature", "-1"], "temperature"),
        (["generate", "--target", "tiny", "--prompt", "x", "--method", "eagle3"], "needs a draft head"),
        (["generate", "--target", "tiny", "--prompt", "x", "--dtype", "int3"], "dtype"),
        (["generate", "--target", "tiny", "--prompt", "x", "--method", "medusa"], "needs a draft head"),
        (["generate", "--target", "tiny", "--prompt", "x", "--method", "lookahead", "--plan", "chain:2"], "lookahead:"),
        (["generate", "--target", "tiny", "--draft", "tiny", "--prompt", "x", "--plan", "lookahead:3x3x3"], "plan:"),
        (["train", "no/recipe.yaml"], "no/recipe.yaml"),
        (["train", "recipes/tiny.yaml", "--stage", "99"], "stage"),
    ],
)
def test_mistakes_get_one_line_that_names_the_field(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") or "\nerror: " in error
    assert message in error


def test_a_target_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look for a name that the hub's client cannot reach takes half a minute."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("draftwing.target.load.load_model", lambda *_, **__: pytest.fail("looked for again"))
    with pytest.raises(ValueError, match="target: no folder and no reachable hub id: 'no/such/folder': "):
        draftwing.load("no/such/folder")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_folder_without_tokenizer_is_refused(tmp_path: Path, model_type: str) -> None:
    """transformers makes an empty tokenizer from a config alone, for most families."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    with pytest.raises(ValueError, match="target: no tokenizer in "):
        load_tokenizer(str(tmp_path))


def test_a_machine_is_measured_once_and_said_to_be(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In one line, so that the first command does not seem to hang; the library itself is silent."""
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path))
    models = ("--target", str(folder / "target"), "--draft", str(folder / "eagle3"))
    for count in (1, 0):
        assert main(["generate", *models, "--prompt", "def", "--max-new-tokens", "4", "--json"]) == 0
        output = capsys.readouterr()
        assert output.err.count("measuring this machine once") == count
        assert json.loads(output.out)["num_tokens"] == 4
    assert main(["generate", *models, "--prompt", "def", "--max-new-tokens", "4", "--json", "--remeasure"]) == 0
    assert capsys.readouterr().err.count("measuring this machine once") == 1
    monkeypatch.setenv("DRAFTWING_CACHE", str(tmp_path / "other"))
    draftwing.load(str(folder / "target"), str(folder / "eagle3")).costs(1)
    assert "measuring" not in capsys.readouterr().err


def test_a_note_does_not_break_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """It goes to whoever shows the bar, in a line of its own."""
    terminal = io.StringIO()
    with _noted(), Progress(console=Console(file=terminal, force_terminal=True, width=80)) as progress:
        progress.add_task("measuring")
        progress.refresh()
        logging.getLogger("draftwing.plans.costs").info("a note")
    assert re.search(r"(\n|\x1b\[2K)a note\s*\n", terminal.getvalue())
    assert capsys.readouterr().err == ""


def test_chat_needs_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (EMBEDDED / "target").iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    assert main(["generate", "--target", str(tmp_path), "--chat", "--prompt", "x"]) == 2
    assert "chat: the target's tokenizer has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_plan_measures_and_stores_what_it_learnt(
    folder: Path, capsys: pytest.CaptureFixture[str], temperature: str
) -> None:
    prompts = folder / "plan.jsonl"
    prompts.write_text('{"prompt": "def add_1(a, b):"}\n{"prompt": "return a"}\n{"prompt": "x"}\n', encoding="utf-8")
    models = ("--target", str(folder / "target"), "--draft", str(folder / "eagle3"))
    rest = ("--prompts", str(prompts), "--batch-size", "2", "--max-new-tokens", "12", "--temperature", temperature)
    assert main(("plan", *models, *rest, "--save", "--json")) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert printed.err.splitlines()[-1] == f"saved to {folder / 'eagle3' / 'acceptance.json'}"
    assert report["costs"]["plain"][0] > 0
    assert set(report["node_pays_from"]) == {"2", "4", "8", "12", "16", "24"}, "trees have up to 32 nodes on a CPU"
    assert report["speedup"] > 0
    stored = json.loads((folder / "eagle3" / "acceptance.json").read_text(encoding="utf-8"))
    name = "sampled" if temperature == "1" else "greedy"
    assert stored[name] == report["acceptance"]
    again = draftwing.load(str(folder / "target"), str(folder / "eagle3"))
    assert again.experience(1, sampled=temperature == "1").acceptance.as_dict() == stored[name]
    (folder / "eagle3" / "acceptance.json").unlink()


@pytest.mark.parametrize("command", ["plan", "doctor"])
def test_a_prompt_that_is_too_long_is_found_before_anything_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    lines = ['{"prompt": "def add"}'] * 8 + [json.dumps({"prompt": "x = 1\n" * 100})]
    (folder / "long.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for place in ("engine.generation.Generation.__init__", "plans.planner.measure_costs"):
        monkeypatch.setattr(f"draftwing.{place}", lambda *_, **__: pytest.fail("something was measured"))
    models = ("--target", str(folder / "target"), "--draft", str(folder / "eagle3"))
    more = ("--num-prompts", "9") if command == "doctor" else ()
    assert main((command, *models, "--prompts", str(folder / "long.jsonl"), *more)) == 2
    assert re.search(r"error: max_new_tokens: prompt 8 has \d+ tokens", capsys.readouterr().err)


def test_plan_shows_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("--target", str(folder / "target"), "--draft", str(folder / "eagle1"))
    (folder / "one.jsonl").write_text('{"prompt": "def add_1(a, b):"}\n', encoding="utf-8")
    assert main(("plan", *models, "--prompts", str(folder / "one.jsonl"), "--max-new-tokens", "4")) == 0
    shown = capsys.readouterr().out
    assert "A cycle's parts" in shown
    assert "Accepted, of nodes" in shown


def test_broken_acceptance_counts_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "eagle3" / "acceptance.json"
    file.write_text("[1, 2", encoding="utf-8")
    models = ("--target", str(folder / "target"), "--draft", str(folder / "eagle3"))
    assert main(("generate", *models, "--prompt", "x")) == 2
    assert "acceptance.json" in capsys.readouterr().err
    file.unlink()


@pytest.mark.parametrize("more", [["--json"], []])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(more: list[str]) -> None:
    """As `| head` does."""
    closed = "import os, sys; end, start = os.pipe(); os.close(end); os.dup2(start, sys.stdout.fileno())"
    program = Forked(f"{closed}; from draftwing.cli import main; sys.exit(main(['inspect', 'tiny', *{more}]))")
    assert program.wait() == 141
    assert program.errors == ""


def test_results_are_written_though_their_reader_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    report = Report("title", [], [], [], [], "", {}, {})
    for is_json in (False, True):
        folder = tmp_path / str(is_json)
        folder.mkdir()
        with pytest.raises(BrokenPipeError):
            eval_command._show(argparse.Namespace(json=is_json, output=folder), report)
        assert {file.name for file in folder.iterdir()} == {"results.json", "report.html"}
