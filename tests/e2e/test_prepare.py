"""Data for training through the command line: prepare, train, features, train from features."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SLOW
from forked import Forked
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from draftwing.cli import main
from draftwing.data.prepared import open_prepared
from draftwing.prepare import tokens
from draftwing.target.load import load_tokenizer


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, texts and one bad row, and what `prepare` makes of them."""
    folder = tmp_path_factory.mktemp("prepare")
    rows: list[dict[str, Any]] = []
    for n in range(40):
        user = {"role": "user", "content": f"Write the Python function add_{n}."}
        rows.append({"messages": [user, {"role": "assistant", "content": f"def add_{n}(a):\n    return a + {n}\n"}]})
        rows.append({"text": f"def sub_{n}(a):\n    return a - {n}\n" * (1 + n % 5), "held_out": n % 5 == 0})
    rows.append({"question": "?"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["prepare", *prepare(folder)]) == 0
    return folder


def prepare(folder: Path) -> list[str]:
    data, output = str(folder / "data.jsonl"), str(folder / "prepared")
    return ["--data", data, "--target", "tiny", "--output", output, "--sequence-length", "64"]


def recipe(folder: Path, name: str, **values: Any) -> str:
    stage = {"objective": "eagle3", "output": str(folder / name), "target": "tiny", "data": str(folder / "prepared")}
    stage |= {"sequence_length": 64, "batch_size": 2, "max_steps": 2, "warmup_steps": 1, "bf16": False}
    stage |= {"draft_vocab_size": 512, "ttt_steps": 2, "evaluate_rows": 4, "log_every": 1}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(stage | values), encoding="utf-8")
    return str(folder / f"{name}.yaml")


def test_a_tokenizer_whose_ids_have_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "c": 2, "b": 9}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]").save_pretrained(tmp_path / "target")
    (tmp_path / "data.jsonl").write_text(json_line({"text": "a b c b"}) * 60, encoding="utf-8")
    data, output = str(tmp_path / "data.jsonl"), str(tmp_path / "prepared")
    told = call(capsys, "prepare", "--data", data, "--target", str(tmp_path / "target"), "--output", output, "--json")
    assert told["distinct_tokens"] == 3


def test_it_says_so_when_the_rows_held_out_are_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": "def f(a):\n    return a\n" * 4} for _ in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(map(json_line, [*rows, {"question": "?"}])), encoding="utf-8")
    assert main(["prepare", *prepare(tmp_path)]) == 0
    assert "nothing is held out, so no head can be trained: " in capsys.readouterr().err
    for data in ("prepared", "data.jsonl"):
        assert main(["train", recipe(tmp_path, "head", data=str(tmp_path / data))]) == 2
        assert "data: no usable held-out row: of " in capsys.readouterr().err


def test_features_of_a_file_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(folder / "data.jsonl")
    assert main(["prepare", "--features", "--data", data, "--target", "tiny", "--output", str(folder / "no")]) == 2
    assert "error: data: --features takes a folder made by `draftwing prepare`, got " in capsys.readouterr().err


def test_rows_that_the_target_cannot_read_do_not_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded target has 1024 positions; beyond them a head would learn what it never says."""
    rows = [{"text": "def f(a):\n    return a\n" * 400} for _ in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(map(json_line, rows)), encoding="utf-8")
    data, shortest = str(tmp_path / "data.jsonl"), {"max_steps": 1, "batch_size": 1, "ttt_steps": 1, "evaluate_rows": 1}
    for objective in ("eagle3", "medusa"):
        stage = recipe(tmp_path, "head", data=data, objective=objective, sequence_length=1025)
        assert main(["train", stage]) == 2
        assert (
            "a document has 1025 tokens and the target 1024 positions; set it to at most 1024"
            in capsys.readouterr().err
        )
    assert main(["train", recipe(tmp_path, "head", data=data, sequence_length=1024, **shortest)]) == 0
    language_model = {"objective": "language_model", "target": "", "tokenizer": "tiny", "sequence_length": 65}
    language_model |= {"architecture": {"max_position_embeddings": 64, "hidden_size": 32, "num_attention_heads": 2}}
    assert main(["train", recipe(tmp_path, "model", data=data, **language_model)]) == 2
    assert "a document has 65 tokens and the target 64 positions" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_rejects_are_in_the_order_of_lines(tmp_path: Path, command: str) -> None:
    rows: list[dict[str, Any]] = [{"text": "def f(a):\n    return a\n" * 4}, {"question": "?"}] * 20
    (tmp_path / "data.jsonl").write_text("".join(map(json_line, [*rows, rows[0]])), encoding="utf-8")
    if command == "prepare":
        assert main(["prepare", *prepare(tmp_path)]) == 0
        rejects = tmp_path / "prepared" / "rejects.jsonl"
    else:
        assert main(["train", recipe(tmp_path, "head", data=str(tmp_path / "data.jsonl"), max_steps=1)]) == 0
        rejects = tmp_path / "head" / "rejects.jsonl"
    lines = [json.loads(line)["line"] for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert lines == list(range(2, 41, 2))


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def test_prepare_reports_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = call(capsys, "prepare", *prepare(folder), "--json")  # finished: read again
    assert (report["rows"], report["rejected"], report["held_out_documents"]) == (81, 1, 8)
    assert report["cut"] > 0
    assert 0 < report["supervised_share"] < 1
    assert report["supervised_tokens"] == round(report["supervised_share"] * report["tokens"])


def test_prepare_shows_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *prepare(folder), "--preview", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("green is supervised") == 2
    assert "draft vocabulary of" in captured.out
    said = captured.err.splitlines()
    assert said[0] == f"finished already: {folder / 'prepared'}"
    assert "1 of 81 rows cannot be used" in captured.err
    assert said[-1] == f"saved to {folder / 'prepared'}"


def test_training_from_the_folder_equals_training_from_the_rows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = call(capsys, "train", recipe(folder, "from_folder"))
    rows = call(capsys, "train", recipe(folder, "from_rows", data=str(folder / "data.jsonl")))
    assert prepared["eval_loss"] == rows["eval_loss"]
    assert (folder / "from_rows" / "rejects.jsonl").read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.parametrize(("storage", "tolerance"), [("fp8", 0.05), pytest.param("bf16", 0.01, marks=SLOW)])
def test_training_from_stored_features(
    folder: Path, capsys: pytest.CaptureFixture[str], storage: str, tolerance: float
) -> None:
    features = str(folder / f"features-{storage}")
    common = ["--features", "--data", str(folder / "prepared"), "--target", "tiny", "--output", features]
    written = call(capsys, "prepare", *common, "--storage", storage, "--verify", "--json")
    assert written["feature_layers"] == [2, 6, 9]
    assert written["verified_bytes"] >= written["tokens"] * written["bytes_per_token"]
    assert call(capsys, "prepare", *common, "--storage", storage, "--json")["tokens"] == 0  # nothing left to do
    online = call(capsys, "train", recipe(folder, f"online-{storage}"))
    stored = call(capsys, "train", recipe(folder, f"stored-{storage}", features=features))
    assert stored["eval_loss"] == pytest.approx(online["eval_loss"], rel=tolerance)
    # They are read: other layers than the head's are refused.
    assert main(["train", recipe(folder, "other", features=features, aux_layers=[1, 3, 5])]) == 2
    assert "was made from the layers [2, 6, 9], not (1, 3, 5)" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["eagle1", "medusa"])
def test_other_heads_read_stored_features_too(folder: Path, capsys: pytest.CaptureFixture[str], objective: str) -> None:
    """In bfloat16 and packed: the final norm's output is all that they read."""
    features = str(folder / f"features-{objective}")
    common = ["--features", "--data", str(folder / "prepared"), "--target", "tiny", "--output", features, "--json"]
    assert call(capsys, "prepare", *common, "--method", objective)["feature_layers"] == [-1]  # behind the final norm
    values = {"objective": objective, "packing": True, "feature_noise": 0.0, "medusa_heads": 2}
    online = call(capsys, "train", recipe(folder, f"online-{objective}", **values))
    stored = call(capsys, "train", recipe(folder, f"stored-{objective}", features=features, **values))
    assert stored["eval_loss"] == pytest.approx(online["eval_loss"], rel=0.01)


def test_training_packed_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", recipe(folder, "packed", packing=True))["eval_loss"] > 0


def test_features_need_the_folder_that_they_were_made_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"features": str(folder / "x"), "data": str(folder / "data.jsonl")}
    assert main(["train", recipe(folder, "wrong", **values)]) == 2
    assert "features: needs as `data` the prepared folder" in capsys.readouterr().err


def test_regenerated_rows_are_prepared_like_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(folder / "answers.jsonl")
    common = ["prepare", "--regenerate", "--data", str(folder / "data.jsonl"), "--target", "tiny", "--output", output]
    common += [
        "--max-rows",
        "3",
        "--max-new-tokens",
        "12",
        "--prompt-length",
        "8",
        "--batch-size",
        "8",
        "--temperatures",
        "0",
        "--json",
    ]
    made = call(capsys, *common)
    assert made["rows"] == 3
    assert 0 < made["new_tokens"] <= 12 * made["rows"]
    assert call(capsys, *common)["new_tokens"] == 0  # all are there
    assert main([*common[:-1], "--max-rows", "1"]) == 2
    assert "max_rows: --regenerate writes at least 2 rows (one is held out), got 1" in capsys.readouterr().err
    call(capsys, "prepare", "--data", output, "--target", "tiny", "--output", str(folder / "again"), "--json")
    found = open_prepared(str(folder / "again"), load_tokenizer("tiny"))
    rows = [json.loads(line) for line in Path(output).read_text(encoding="utf-8").splitlines()]
    expected = sorted(row["input_ids"] for row in rows if not row["held_out"])
    assert sorted(document.input_ids.tolist() for document in found.examples("train")) == expected


def test_ctrl_c_leaves_a_folder_that_is_finished_later(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real process, interrupted while it tokenises."""
    program = (
        "import os, signal, sys\n"
        "from draftwing.cli import main\n"
        "from draftwing.prepare import tokens as prepared\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in a shell's background ignores it
        "write = prepared.write_shard\n"
        "def write_and_interrupt(*arguments):\n"
        "    shard = write(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return shard\n"
        "prepared.SHARD_TOKENS, prepared.CHUNK_ROWS, prepared.write_shard = 500, 8, write_and_interrupt\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["prepare", *prepare(folder), "--json"]
    command[command.index("--output") + 1] = str(tmp_path / "out")
    process = Forked(program, command)
    assert process.wait() == 130, process.errors
    assert "stopped" in process.errors
    assert "Traceback" not in process.errors
    monkeypatch.setattr(tokens, "SHARD_TOKENS", 500)
    monkeypatch.setattr(tokens, "CHUNK_ROWS", 8)
    assert main(command) == 0
    expected = open_prepared(str(folder / "prepared"), load_tokenizer("tiny")).examples("train")
    found = open_prepared(str(tmp_path / "out"), load_tokenizer("tiny")).examples("train")
    assert [document.input_ids.tolist() for document in found] == [d.input_ids.tolist() for d in expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.jsonl", "--output", "out"], "data: no such file: nowhere.jsonl"),
        (["--data", "x", "--output", "out", "--regenerate", "--features"], "one of --regenerate, --features and"),
        (["--data", "x", "--output", "out", "--regenerate"], "--regenerate writes a .jsonl file, got 'out'"),
        (["--data", "x", "--output", "o.jsonl", "--regenerate", "--preview", "1"], "preview: is for what is tokenised"),
        (["--data", "x", "--output", "out", "--features", "--preview", "1"], "preview: is for what is tokenised"),
        (
            ["--data", "x", "--output", "out", "--features", "--method", "eagle1", "--aux-layers", "1,2"],
            "aux_layers: are what --method eagle3 stores, and the method is eagle1",
        ),
        (["--data", "x", "y", "--output", "out", "--features"], "--features takes one prepared folder, got 2"),
        (
            ["--data", "nowhere", "--output", "out", "--features"],
            "--features takes a folder made by `draftwing prepare`, got nowhere",
        ),
    ],
)
def test_mistakes_get_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--target", "tiny", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 or "error: " in error.splitlines()[-1]
