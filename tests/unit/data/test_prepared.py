"""Prepared folders: what is read equals what was tokenised, stopped runs go on, other tokenizers are refused."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SLOW
from transformers import PreTrainedTokenizerFast

from draftwing.data.chat_template import Example, cut, encode_row
from draftwing.data.corpus import Row
from draftwing.data.prepared import Prepared, PrepareSettings, is_prepared, open_prepared
from draftwing.data.rows import select_rows
from draftwing.prepare import tokens as module
from draftwing.prepare.data_statistics import as_coloured_text, as_tables, summarise
from draftwing.prepare.tokens import prepare
from draftwing.target.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tiny")


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Conversations, texts of several lengths, a row of ids, and two rows that cannot be used."""
    rows: list[Row] = []
    for n in range(60):
        user = {"role": "user", "content": f"Write function {n}."}
        rows.append({"messages": [user, {"role": "assistant", "content": f"def f{n}(): return {n}"}]})
        rows.append({"text": f"x_{n} = {n}\n" * (n + 1)})
    rows.insert(7, {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]})
    rows.insert(50, {"question": "?"})
    rows.insert(90, {"text": None})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 8)
    monkeypatch.setattr(module, "SHARD_TOKENS", 500)


def expected(settings: PrepareSettings, tokenizer: Any) -> list[Example]:
    """The training documents, made without a folder."""
    documents = []
    for ref in select_rows(settings.data, settings.max_rows, settings.seed).train:
        row = ref.read()
        if row.get("text") or "messages" in row or "input_ids" in row:
            documents += cut(*encode_row(row, tokenizer), settings.sequence_length)
    return documents


def assert_same(found: Any, documents: list[Example]) -> None:
    assert len(found) == len(documents)
    for ours, theirs in zip(found, documents, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids)
        assert torch.equal(ours.loss_mask, theirs.loss_mask)
        assert (ours.input_ids.dtype, ours.loss_mask.dtype) == (torch.int64, torch.bool)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "index.json"}


@pytest.mark.usefixtures("small_shards")
def test_what_is_read_is_what_was_tokenised(tmp_path: Path, data: str, tokenizer: Any) -> None:
    settings = PrepareSettings((data,), sequence_length=100, seed=4)
    made = prepare(settings, tokenizer, tmp_path / "out")
    assert len(made.splits["train"]) > 3
    assert is_prepared(str(tmp_path / "out"))
    found = open_prepared(str(tmp_path / "out"), tokenizer)
    assert_same(found.examples("train"), expected(settings, tokenizer))
    assert_same(found.examples("train", max_documents=5), expected(settings, tokenizer)[:5])
    # A recipe with shorter sequences cuts again.
    shorter = [piece for document in expected(settings, tokenizer) for piece in cut(document, 30)]
    assert_same(found.examples("train", length=30), shorter)


@pytest.mark.usefixtures("small_shards")
def test_nothing_is_lost_silently(tmp_path: Path, data: str, tokenizer: Any) -> None:
    made = prepare(PrepareSettings((data,), sequence_length=100), tokenizer, tmp_path / "out")
    assert (made.counts.rows, made.counts.rejected) == (123, 2)
    assert made.counts.cut > 0
    assert "2 of 123 rows cannot be used" in made.describe_rejects()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("num_shards", [0, 1, 3])
def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, data: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, num_shards: int
) -> None:
    settings = PrepareSettings((data,), sequence_length=100)
    whole = prepare(settings, tokenizer, tmp_path / "whole")
    written = 0

    def write_some(*arguments: Any) -> Any:
        nonlocal written
        if written == num_shards:
            (arguments[0] / f"{arguments[1]}.partial").write_bytes(b"half a fi")
            raise KeyboardInterrupt
        written += 1
        return write_shard(*arguments)

    write_shard = module.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", write_some)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, tokenizer, tmp_path / "stopped")
    if num_shards:
        with pytest.raises(ValueError, match="is unfinished; run the same `draftwing prepare` again"):
            open_prepared(str(tmp_path / "stopped"), tokenizer)
    again = prepare(settings, tokenizer, tmp_path / "stopped")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert (again.counts, again.splits) == (whole.counts, whole.splits)


def test_a_finished_folder_is_left_alone(tmp_path: Path, data: str, tokenizer: Any) -> None:
    settings = PrepareSettings((data,))
    prepare(settings, tokenizer, tmp_path / "out")
    before = (tmp_path / "out" / "index.json").read_text(encoding="utf-8")
    prepare(settings, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "index.json").read_text(encoding="utf-8") == before


def test_other_settings_are_refused_by_name(tmp_path: Path, data: str, tokenizer: Any) -> None:
    prepare(PrepareSettings((data,)), tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match=r"out was made with other settings: seed was 0, is 1"):
        prepare(PrepareSettings((data,), seed=1), tokenizer, tmp_path / "out")


def test_rows_that_have_changed_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    path, settings = tmp_path / "a.jsonl", PrepareSettings((str(tmp_path / "a.jsonl"),))
    for text, refused in (("a row of text", False), ("another row", True), ("a row of text", False)):
        path.write_text(f'{{"text": "{text}"}}\n' * 3, encoding="utf-8")
        expected = r"out was made with other settings: content of data was"
        with pytest.raises(ValueError, match=expected) if refused else nullcontext():
            prepare(settings, tokenizer, tmp_path / "out")


@pytest.mark.parametrize("are_threads", [True, pytest.param(False, marks=SLOW)])
def test_several_processes_write_the_same(
    tmp_path: Path, data: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, are_threads: bool
) -> None:
    settings = PrepareSettings((data,), sequence_length=100)
    prepare(settings, tokenizer, tmp_path / "one")
    monkeypatch.setattr(module, "ROWS_WORTH_A_POOL", 100)
    if are_threads:  # processes import torch, which takes long
        monkeypatch.setattr(module, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    prepare(settings, tokenizer, tmp_path / "two", workers=2)
    assert files(tmp_path / "two") == files(tmp_path / "one")


def other(tokenizer: Any, chat_template: str | None = None, further: str | None = None) -> Any:
    copy = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(tokenizer.name_or_path) / "tokenizer.json"),
        chat_template=chat_template or tokenizer.chat_template,
    )
    if further:
        copy.add_tokens([further])
    return copy


def test_another_tokenizer_is_refused(tmp_path: Path, data: str, tokenizer: Any) -> None:
    folder = str(prepare(PrepareSettings((data,)), tokenizer, tmp_path / "out").folder)
    open_prepared(folder, other(tokenizer))
    with pytest.raises(ValueError, match="prepared with another tokenizer than the target's"):
        open_prepared(folder, other(tokenizer, further="<|new|>"))
    with pytest.raises(ValueError, match="prepared with another chat template than the target's"):
        open_prepared(folder, other(tokenizer, chat_template="{{ messages }}"))


def damage(folder: Path, how: str) -> None:
    file = folder / "train-00000.safetensors"
    whole = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[:-1] if how == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize(
    ("how", "message"), [("missing", "found no file"), ("cut", "expected .* bytes"), ("flipped", "checksum")]
)
def test_damage_is_noticed(tmp_path: Path, data: str, tokenizer: Any, how: str, message: str) -> None:
    prepare(PrepareSettings((data,)), tokenizer, tmp_path / "out")
    damage(tmp_path / "out", how)
    with pytest.raises(ValueError, match=f"train-00000.safetensors: .*{message}"):
        open_prepared(str(tmp_path / "out"), tokenizer)


def test_statistics_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "ids.jsonl"
    lengths = [4] * 6 + [10] * 3 + [20]
    rows = [{"input_ids": [7] * length, "loss_mask": [0] + [1] * (length - 1)} for length in lengths]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    made: Prepared = prepare(PrepareSettings((str(path),)), tokenizer, tmp_path / "out")
    statistics = summarise(made, len(tokenizer))
    assert (statistics.documents, statistics.held_out_documents, statistics.tokens) == (9, 1, 74)
    assert statistics.supervised_tokens == 64
    assert statistics.length_percentiles == {50: 4, 90: 10, 99: 20, 100: 20}
    assert statistics.length_histogram == {2: 0, 4: 6, 6: 0, 8: 0, 10: 3, 12: 0, 14: 0, 16: 0, 18: 0, 20: 1}
    assert statistics.distinct_tokens == 1
    assert set(statistics.coverage.values()) == {1.0}
    figures, plot = as_tables(statistics)
    assert (figures.row_count, plot.row_count) == (13, 10)


def test_conversations_that_the_template_rewrites_are_split_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    template = tokenizer.chat_template.replace(
        "message.content", "'' if loop.index == 2 and not loop.last else message.content"
    )
    path, turns = tmp_path / "chats.jsonl", [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path.write_text((json.dumps(row) + "\n") * 3, encoding="utf-8")
    made = prepare(PrepareSettings((str(path),)), other(tokenizer, template), tmp_path / "out")
    assert (made.counts.rows, made.counts.split, len(made.examples("train"))) == (3, 3, 4)


def test_a_document_is_coloured_by_what_is_supervised(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "def f"}]
    text = as_coloured_text(*encode_row({"messages": messages}, tokenizer), tokenizer)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "green")
    assert green == "def f<|end|>"
    assert text.plain == "<|user|>\nhi<|end|>\n<|assistant|>\ndef f<|end|>\n"
