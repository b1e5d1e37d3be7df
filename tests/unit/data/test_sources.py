"""Sources of rows: several at once, the hub, and rows that cannot be used, none of which is lost silently."""

import builtins
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from draftwing.config import TrainConfig
from draftwing.data.examples import read_documents
from draftwing.data.rows import Reject, Rejects, read_rejects, read_rows, select_rows
from draftwing.data.sources import HubSource, JsonlSource, open_source

from draftwing.target.load import load_tokenizer  # isort: skip

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "def f(): pass"}]}


def write(path: Path, *lines: Any) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tiny")


def test_a_jsonl_file_is_read_by_index(tmp_path: Path) -> None:
    source = JsonlSource(write(tmp_path / "a.jsonl", {"text": "naïve"}, "", {"text": "b"}))
    assert (len(source), source.read(1), source.read(0)) == (2, {"text": "b"}, {"text": "naïve"})
    assert (source.line(0), source.line(1)) == (1, 3)


def test_held_out_rows_are_those_that_say_so(tmp_path: Path) -> None:
    rows = [{"text": str(n), "held_out": n in (1, 4)} for n in range(6)]
    rows.append({"text": 'a text that speaks of "held_out": true'})
    corpus = read_rows(write(tmp_path / "a.jsonl", *rows))
    assert [row["text"] for row in corpus.held_out] == ["1", "4"]
    assert len(corpus.train) == 5


@pytest.mark.parametrize("value", ["no", "true", "", 2, [True]])
def test_only_a_flag_holds_a_row_out(tmp_path: Path, value: object) -> None:
    """A text such as "no" is true to Python; the row is listed as one that cannot be used."""
    rows = [{"text": str(n), "held_out": flag} for n, flag in enumerate([True, 1, False, 0, None, value])]
    found = Rejects(tmp_path / "rejects.jsonl")
    corpus = read_rows(write(tmp_path / "a.jsonl", *rows), rejects=found)
    assert sorted(row["text"] for row in corpus.held_out) == ["0", "1"]
    assert sorted(row["text"] for row in corpus.train) == ["2", "3", "4"]
    ((line, reason),) = [(reject.line, reject.reason) for reject in found.found]
    assert (line, reason) == (6, f"held_out: expected true or false, got {value!r}")


class TestFiles:
    def test_an_array_is_read_as_its_rows_are(self, tmp_path: Path) -> None:
        rows = [{"text": "naïve"}, {"text": "b", "held_out": True}, 5]
        for indent in (None, 2):
            path = tmp_path / "a.json"
            path.write_text("\ufeff\n " + json.dumps(rows, indent=indent), encoding="utf-8")
            source = open_source(str(path))
            assert (len(source), source.read(0), source.line(1), source.marked()) == (3, rows[0], 2, {1})
            with pytest.raises(ValueError, match="expected an object, got int"):
                source.read(2)

    def test_a_row_per_line_may_be_named_json(self, tmp_path: Path) -> None:
        assert len(open_source(write(tmp_path / "a.json", {"text": "a"}, {"text": "b"}))) == 2

    @pytest.mark.parametrize(
        ("content", "texts", "lines"),
        [
            ("one\ntwo\nthree\n", ["one", "two", "three"], [1, 2, 3]),
            ("\n\none\ntwo\n", ["one", "two"], [3, 4]),
            ("one\n two\n\n \nthree\n", ["one\n two", "three"], [1, 5]),
            ("", [], []),
        ],
    )
    def test_texts_stand_apart(self, tmp_path: Path, content: str, texts: list[str], lines: list[int]) -> None:
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        source = open_source(str(tmp_path / "a.txt"))
        assert [source.read(index) for index in range(len(source))] == [{"text": text} for text in texts]
        assert [source.line(index) for index in range(len(source))] == lines

    def test_texts_and_arrays_train(self, tmp_path: Path, tokenizer: Any) -> None:
        (tmp_path / "a.txt").write_text("def f(): pass\n" * 4, encoding="utf-8")
        turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "def f(): pass"}]
        (tmp_path / "b.json").write_text(json.dumps([{"id": "x", "conversations": turns}] * 3), encoding="utf-8")
        data = (str(tmp_path / "a.txt"), str(tmp_path / "b.json"))
        documents = read_documents(TrainConfig("eagle3", str(tmp_path / "out"), target="tiny", data=data), tokenizer)
        assert (len(documents.train), len(documents.held_out)) == (5, 2)

    def test_a_file_that_is_no_text_or_no_array_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"\xff\n")
        with pytest.raises(ValueError, match=r"data: .*a.txt is not UTF-8"):
            open_source(str(tmp_path / "a.txt"))
        (tmp_path / "a.json").write_text('[{"text": "cut o', encoding="utf-8")
        with pytest.raises(ValueError, match=r"data: .*a.json begins as an array and is no JSON"):
            open_source(str(tmp_path / "a.json"))


def test_several_sources_are_one(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{name}.jsonl", *({"text": f"{name}{n}"} for n in range(100))) for name in "ab"]
    selection = select_rows(names, max_rows=40, seed=3)
    first = [ref.read()["text"] for ref in selection.train]
    assert {text[0] for text in first} == {"a", "b"}
    assert first == [ref.read()["text"] for ref in select_rows(names, max_rows=40, seed=3).train]
    assert sorted(ref.read()["text"] for ref in selection.held_out) == ["a98", "a99", "b98", "b99"]


class TestHub:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """What `datasets` was asked for; it answers with three rows whose columns may be empty."""
        asked: list[Any] = []

        class Rows(list[dict[str, Any]]):
            column_names = ["messages", "text"]

        def load_dataset(*arguments: Any, **options: Any) -> Rows:
            asked.append((*arguments, options["split"]))
            if arguments[0] == "org/gone":
                raise FileNotFoundError("no such data set")
            return Rows({"messages": None, "text": str(n)} for n in range(3))

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        return asked

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("hub:org/name", ("org/name", None, "train")),
            ("hub:org/name:train_sft", ("org/name", None, "train_sft")),
            ("hub:org/name/config:test[:10%]", ("org/name", "config", "test[:10%]")),
        ],
    )
    def test_names_give_config_and_split(self, asked: list[Any], name: str, expected: tuple[Any, ...]) -> None:
        assert HubSource(name).read(1) == {"text": "1"}  # empty columns are no fields
        assert asked == [expected]

    def test_fields_of_other_rows_are_not_this_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A table has every nested field in every row: null where a row has none."""
        call = {"id": None, "function": {"name": "add", "arguments": {"a": 2, "city": None}}}
        turn = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
        rows = [{"messages": [turn], "tools": None}]
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows))
        calls = [{"function": {"name": "add", "arguments": {"a": 2}}}]
        assert HubSource("hub:org/name").read(0) == {"messages": [{"role": "assistant", "tool_calls": calls}]}

    def test_rows_are_split_as_those_of_files(self, asked: list[Any]) -> None:
        assert [row["text"] for row in read_rows("hub:org/name").held_out] == ["2"]

    def test_a_data_set_that_cannot_be_had_is_named(self, asked: list[Any]) -> None:
        with pytest.raises(ValueError, match="data: cannot load hub:org/gone: FileNotFoundError: no such data set"):
            HubSource("hub:org/gone")

    def test_a_name_of_another_form_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"data: expected hub:org/name\[/config\]\[:split\], got 'hub:name'"):
            HubSource("hub:name")

    def test_without_the_package_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without_datasets(name: str, *arguments: Any, **options: Any) -> Any:
            if name == "datasets":
                raise ImportError(name)
            return real(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", without_datasets)
        with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'draftwing\[train\]'"):
            HubSource("hub:org/name")


class TestRejects:
    def test_training_leaves_out_bad_rows_and_lists_them(
        self, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        bad = ['{"text": "cut off', {"question": "?"}, {"text": 5}, {"input_ids": [1, 99999]}]
        data = write(tmp_path / "a.jsonl", GOOD, *bad, GOOD, GOOD)
        config = TrainConfig("eagle3", str(tmp_path / "out"), target="tiny", data=data)
        documents = read_documents(config, tokenizer)
        assert (len(documents.train), len(documents.held_out)) == (2, 1)
        rejects = {reject.line: reject for reject in read_rejects(tmp_path / "out" / "rejects.jsonl")}
        assert set(rejects) == {2, 3, 4, 5}
        assert rejects[2].row == bad[0]
        assert "no JSON object" in rejects[2].reason
        assert "got the fields ['question']" in rejects[3].reason
        assert "text: expected a string, got int" in rejects[4].reason
        assert "99999 is outside the tokenizer's vocabulary" in rejects[5].reason
        assert "4 of 7 rows cannot be used" in capsys.readouterr().err

    def test_what_is_no_text_is_no_row(self, tmp_path: Path) -> None:
        half = '{"text": "half a pair: \\ud83d"}'
        found = Rejects(tmp_path / "rejects.jsonl")
        read_rows(
            write(tmp_path / "a.jsonl", GOOD, half, "[" * 100000, GOOD, '{"text": "\\ud83d\\ude00"}'), rejects=found
        )
        reasons = {reject.line: reject.reason for reject in read_rejects(found.path)}
        assert reasons.keys() == {2, 3}
        assert "not Unicode: 'utf-8' codec can't encode character '\\ud83d'" in reasons[2]
        assert "no JSON object: maximum recursion depth" in reasons[3]

    def test_neither_is_it_in_an_array(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(
            '[{"text": "one"}, {"text": "\\ud83d"}, {"question": "\\ud83d"}, {"text": "two"}]'
        )
        found = Rejects(tmp_path / "rejects.jsonl")
        read_rows(str(tmp_path / "a.json"), rejects=found)
        assert [(reject.line, reject.reason[:11]) for reject in read_rejects(found.path)] == [
            (2, "not Unicode"),
            (3, "not Unicode"),
        ]

    @pytest.mark.parametrize("text", ["a\u2028b\u2029c\x85d", "half \ud83d of a pair", "\n\r\x0c"])
    def test_rejects_come_back_as_they_were(self, tmp_path: Path, text: str) -> None:
        """Line breaks of other kinds stand in them as they are."""
        found = Rejects(tmp_path / "rejects.jsonl")
        for line in (1, 2):
            found.add(Reject("a.jsonl", line, text, text))
        assert read_rejects(found.path) == found.found
        assert len(Rejects(found.path, keep=1)) == 1

    def test_a_later_run_does_not_add_to_the_file(self, tmp_path: Path, tokenizer: Any) -> None:
        data = write(tmp_path / "a.jsonl", GOOD, {"question": "?"}, GOOD)
        config = TrainConfig("eagle3", str(tmp_path / "out"), target="tiny", data=data)
        for _ in range(2):
            read_documents(config, tokenizer)
            assert len(read_rejects(tmp_path / "out" / "rejects.jsonl")) == 1

    def test_if_no_row_is_good_the_first_reason_is_told(self, tmp_path: Path, tokenizer: Any) -> None:
        data = write(tmp_path / "a.jsonl", {"question": "?"}, {"question": "?"})
        config = TrainConfig("eagle3", str(tmp_path / "out"), target="tiny", data=data)
        with pytest.raises(ValueError, match=r"data: 2 of 2 rows cannot be used, .*expected one of messages"):
            read_documents(config, tokenizer)

    def test_rows_of_before_are_kept_when_a_run_goes_on(self, tmp_path: Path) -> None:
        path = tmp_path / "rejects.jsonl"
        rows = write(tmp_path / "a.jsonl", "{1", "{2", "{3")
        read = Rejects(path)
        with pytest.raises(ValueError, match="3 of 3"):
            read_rows(rows, rejects=read)
        before = path.read_text(encoding="utf-8").splitlines()
        assert len(Rejects(path, keep=2)) == 2
        assert path.read_text(encoding="utf-8").splitlines() == before[:2]
        assert len(Rejects(path)) == 0
        assert not path.exists()
