"""`draftwing prepare --from-target` with the embedded target: no data goes in, and a head trains on what comes out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import draftwing
from draftwing.cli import main
from draftwing.engine.options import row_seed
from draftwing.prepare import from_target
from draftwing.prepare.from_target import Dropped, Kept

ROOT = Path(__file__).parents[2]
COMMON = ["--target", "tiny", "--dtype", "float32", "--max-new-tokens", "16", "--max-request-tokens", "80"]
COMMON += ["--sequence-length", "180", "--json"]


def write(output: Path, count: int, *more: str) -> int:
    return main(["prepare", "--from-target", str(count), "--output", str(output), *COMMON, *more])


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("from_target") / "rows.jsonl"
    assert write(output, 8) == 0
    return output


def test_rows_are_what_the_target_says(made: Path) -> None:
    """Greedy or sampled in turn; a row's answer is what `generate` gives for its prompt and seed."""
    model, rows = draftwing.load("tiny", dtype="float32"), rows_of(made)
    assert len(rows) == 8
    assert len({row["messages"][0]["content"] for row in rows}) == 8
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        num_prompt = row["loss_mask"].index(1)
        assert row["loss_mask"] == [0] * num_prompt + [1] * (len(row["input_ids"]) - num_prompt)
        encoding = model.tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
        assert row["input_ids"][:num_prompt] == encoding["input_ids"]
        output = model.generate(
            torch.tensor([encoding["input_ids"]]),
            max_new_tokens=16,
            temperature=float(row["number"] % 2),
            seed=row_seed(0, 2 * row["number"] + 1),
        )
        assert output[0].tolist() == row["input_ids"]  # type: ignore[index]
        assert row["truncated"] == (row["input_ids"][-1] not in model.target.eos_token_ids)


@pytest.mark.parametrize(
    "more",
    ["4 --batch-size 1", "4 --batch-size 3", "4 --draft tiny --batch-size 2"],
)
def test_seats_and_drafts_change_nothing(made: Path, tmp_path: Path, more: str) -> None:
    count, *options = more.split()
    assert write(tmp_path / "rows.jsonl", int(count), *options) == 0
    assert_begins(made, tmp_path)


def assert_begins(made: Path, folder: Path) -> None:
    """What a folder holds is what `made` begins with."""
    for name in ("rows.jsonl", "rows.rejects.jsonl"):
        assert (made.parent / name).read_bytes().startswith((folder / name).read_bytes())


def test_requests_that_begin_as_they_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run is continued with the prefixes that it had."""
    output, file = tmp_path / "rows.jsonl", tmp_path / "prefixes.txt"
    file.write_text("Show me\nComplete this\n")
    prefixed = "--request-prefixes", str(file)
    assert write(output, 3, *prefixed) == 0
    for row in rows_of(output):
        assert row["messages"][0]["content"].startswith(("Show me", "Complete this"))
    assert write(output, 4, *prefixed, "--seed", "1") == 2
    assert write(output, 3) == 2
    assert "request_prefixes was ['Show me', 'Complete this'], is None" in capsys.readouterr().err
    assert write(output, 4, *prefixed) == 0


def test_another_seed_has_other_rows(made: Path, tmp_path: Path) -> None:
    assert write(tmp_path / "rows.jsonl", 2, "--seed", "1") == 0
    asked = [{row["messages"][0]["content"] for row in rows_of(file)} for file in (made, tmp_path / "rows.jsonl")]
    assert not asked[0] & asked[1]


def test_a_stopped_run_goes_on_where_it_was(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, take, taken = tmp_path / "rows.jsonl", Kept.take, 0

    def stop(self: Kept, result: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 4:
            raise KeyboardInterrupt
        return take(self, result)

    monkeypatch.setattr(Kept, "take", stop)
    assert write(output, 5) == 130
    monkeypatch.undo()
    num_done = len(rows_of(output))
    assert 0 < num_done < 5
    for name in ("rows.jsonl", "rows.rejects.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"number": 77, "li')  # what a kill may leave
    assert write(output, 5) == 0
    assert f"resuming from {output}: {num_done} of 5 rows are there" in capsys.readouterr().err
    assert len(rows_of(output)) == 5
    assert_begins(made, tmp_path)
    assert write(output, 5) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 0
    assert write(output, 5, "--request-temperature", "0.7") == 2
    assert "request_temperature was 1.0, is 0.7" in capsys.readouterr().err


def test_more_rows_are_written_behind_them(made: Path, tmp_path: Path) -> None:
    for count in (2, 4):
        assert write(tmp_path / "rows.jsonl", count) == 0
    assert len(rows_of(tmp_path / "rows.jsonl")) == 4
    assert_begins(made, tmp_path)


def test_shards_have_the_numbers_of_the_whole(made: Path, tmp_path: Path) -> None:
    whole, found = {row["number"]: row for row in rows_of(made)}, []
    for shard in (1, 2):
        assert write(tmp_path / f"{shard}.jsonl", 6, "--shard", f"{shard}/2") == 0
        rows = rows_of(tmp_path / f"{shard}.jsonl")
        assert len(rows) == 3
        assert {row["number"] % 2 for row in rows} == {shard - 1}
        found += rows
    same = [row == whole[row["number"]] for row in found if row["number"] in whole]
    assert len(same) >= 4
    assert all(same)


def test_what_is_dropped_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short limit cuts many requests."""
    output = tmp_path / "rows.jsonl"
    assert write(output, 2, "--max-request-tokens", "20") == 0
    figures, rejects = json.loads(capsys.readouterr().out), rows_of(tmp_path / "rows.rejects.jsonl")
    assert figures["dropped"] == len(rejects) > 0
    assert figures["cut-off_requests"] == sum(reject["reason"] == "cut-off requests" for reject in rejects)
    numbers = [reject["line"] for reject in rejects] + [row["number"] for row in rows_of(output)]
    assert sorted(numbers) == list(range(len(numbers)))


def test_a_target_that_asks_nothing_new_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At temperature 0 every request is the same."""
    monkeypatch.setattr(from_target, "MOST_IN_A_ROW", 5)
    output = tmp_path / "rows.jsonl"
    assert write(output, 2, "--request-temperature", "0") == 2
    assert (
        "from_target: 5 numbers in a row gave no row, the last one for: duplicate requests" in capsys.readouterr().err
    )
    assert [row["number"] for row in rows_of(output)] == [0]
    assert [reject["reason"] for reject in rows_of(tmp_path / "rows.rejects.jsonl")] == ["duplicate requests"] * 5
    kept, row = Kept.of_file(output), rows_of(output)[0]
    respelled = f" {row['messages'][0]['content'].upper()}\n"
    assert kept.take(row | {"messages": [{"content": respelled}]}) == Dropped("duplicate requests", respelled)


def test_heads_train_on_them_and_are_measured(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """benchmarks/chat_rig.py, and so the stages of recipes/smollm2.yaml, with another target and two steps."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import chat_rig

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Write the Python function clamp."}\n', encoding="utf-8")
    common = ["--tiny", "--target", "tiny", "--folder", str(tmp_path), "--data", f"own={tmp_path / 'prompts.jsonl'}"]
    assert chat_rig.main([*common, "--parts", "rows"]) == 0
    assert len(rows_of(tmp_path / "rows.jsonl")) == 2
    (tmp_path / "rows.jsonl").write_bytes(made.read_bytes())
    assert chat_rig.main([*common, "--parts", "eagle3,eagle1,medusa,tables"]) == 0
    capsys.readouterr()
    for kind in ("eagle3", "eagle1", "medusa"):
        assert main(["inspect", str(tmp_path / kind), "--target", "tiny"]) == 0
    methods = {row["method"] for row in json.loads((tmp_path / "tables" / "results.json").read_text())["rows"]}
    assert methods >= {"plain", "medusa", "eagle1:chain:5", "eagle3:tree:10x8x60+uncoupled"}
    assert {*json.loads((tmp_path / "seconds.json").read_text())} == {*chat_rig.PARTS}
    with pytest.raises(SystemExit):
        chat_rig.main([*common, "--parts", "rows,nothing"])
    assert "expected some of rows, eagle3, eagle1, medusa, tables, got 'nothing'" in capsys.readouterr().err


def test_people_see_rows_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [argument for argument in COMMON if argument != "--json"]
    output = ["--output", str(tmp_path / "rows.jsonl"), "--preview", "2"]
    assert main(["prepare", "--from-target", "2", *output, *common]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("green is supervised") == 2
    assert "tokens_per_second" in captured.out
    assert captured.err.splitlines()[-1] == f"saved to {tmp_path / 'rows.jsonl'}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "out", "--from-target", "3"], "--from-target writes a .jsonl file, got 'out'"),
        (["--output", "o.jsonl", "--from-target", "3", "--data", "x"], "data: expected --data, or --from-target N"),
        (["--output", "o", "--data", "x", "--request-prefixes", "f"], "request_prefixes: is for --from-target"),
        (["--output", "o", "--data", "x", "--shard", "1/2"], "shard: is for --regenerate and --from-target"),
        (["--output", "o", "--data", "x", "--verify"], "verify: is for --features"),
        (["--output", "o", "--data", "x", "--model", "m"], "model: is for --endpoint"),
        (["--output", "o.jsonl"], "data: expected --data, or --from-target N"),
        (["--output", "o.jsonl", "--from-target", "3", "--regenerate"], "one of --regenerate, --features and"),
        (["--output", "o.jsonl", "--from-target", "3", "--max-rows", "3"], "--endpoint and --max-rows are not for it"),
        (["--output", "o.jsonl", "--from-target", "3", "--request-prefixes", "none"], "none cannot be read"),
        (["--output", "o.jsonl", "--from-target", "0"], "from-target: expected a whole number from 1 on, got 0"),
        (["--output", "o.jsonl", "--from-target", "3", "--sequence-length", "200"], "no room for an answer"),
    ],
)
def test_mistakes(
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--target", "tiny", *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_target_without_a_chat_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from draftwing.embedded import EMBEDDED

    shutil.copytree(EMBEDDED / "target", tmp_path / "target")
    (tmp_path / "target" / "chat_template.jinja").unlink()
    monkeypatch.setattr(from_target, "write_from_target", lambda *_: pytest.fail("nothing is written"))
    options = ["--target", str(tmp_path / "target"), "--output", str(tmp_path / "rows.jsonl")]
    assert main(["prepare", "--from-target", "2", *options]) == 2
    assert "error: from_target: the target's tokenizer has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_of_another_kind_are_not_gone_on_with(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.jsonl"
    output.write_text('{"text": "one"}\n')
    assert write(output, 2) == 2
    assert "rows that were not written by --from-target; use another output" in capsys.readouterr().err
