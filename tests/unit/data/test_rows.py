"""JSONL data files: what is held out, and errors that name the line."""

import json
from pathlib import Path

import pytest

from draftwing.data.rows import read_rows


def jsonl(folder: Path, num_rows: int) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"text": str(row)}) + "\n" for row in range(num_rows)), encoding="utf-8")
    return str(path)


def numbers(rows: list[dict[str, str]]) -> list[int]:
    return [int(row["text"]) for row in rows]


@pytest.mark.parametrize(("num_rows", "num_held_out"), [(2, 1), (49, 1), (100, 2), (250, 5)])
def test_the_last_2_percent_are_held_out(tmp_path: Path, num_rows: int, num_held_out: int) -> None:
    corpus = read_rows(jsonl(tmp_path, num_rows))
    assert numbers(corpus.held_out) == list(range(num_rows - num_held_out, num_rows))
    assert sorted(numbers(corpus.train)) == list(range(num_rows - num_held_out))


def test_training_rows_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    path = jsonl(tmp_path, 50)
    first, again, other = (numbers(read_rows(path, seed=seed).train) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != sorted(first)


def test_max_rows_limits_training_rows_only(tmp_path: Path) -> None:
    corpus = read_rows(jsonl(tmp_path, 100), max_rows=10)
    assert (len(corpus.train), len(corpus.held_out)) == (10, 2)
    assert numbers(corpus.train) == numbers(read_rows(str(tmp_path / "data.jsonl")).train)[:10]


def test_empty_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "0"}\n\n{"text": "1"}\n   \n{broken}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"data: .*data\.jsonl, line 5: no JSON object: Expecting property name"):
        read_rows(str(path))


def test_a_row_that_is_no_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "0"}\n["text"]\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: expected an object, got list"):
        read_rows(str(path))


def test_a_file_of_another_kind_is_no_short_one(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r"data: .*data\.bin, line 1: not UTF-8: "):
        read_rows(str(tmp_path / "data.bin"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"data: no such file: nowhere\.jsonl"):
        read_rows("nowhere.jsonl")


@pytest.mark.parametrize("num_rows", [0, 1])
def test_too_few_rows_to_hold_one_out(tmp_path: Path, num_rows: int) -> None:
    with pytest.raises(ValueError, match=f"has {num_rows} rows; at least 2 are needed"):
        read_rows(jsonl(tmp_path, num_rows))
