"""The journal of runs: resumes, drops a cut line, refuses other settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from draftwing.evaluation.journal import FILE, Journal, Run

SETTINGS = {"target": "t", "seed": 0, "methods": ["plain"]}


def run(prompt: int, **changes: Any) -> Run:
    values: dict[str, Any] = {"data": "d", "temperature": 0.0, "prompt": prompt, "turn": 1, "method": "plain"}
    values |= {"name": "n", "category": "", "num_prompt_tokens": 3, "num_tokens": 2, "seconds": 0.5, "num_cycles": 2.0}
    values |= {"accepted_at": [1], "reached_at": [2], "stages": {"draft": 0.1}, "peak_bytes": 9, "identical": True}
    return Run(**(values | {"tokens": [1, 2], "text": None} | changes))


def test_runs_come_back(tmp_path: Path) -> None:
    journal = Journal(SETTINGS, tmp_path / "new")
    journal.add(run(0))
    journal.add(run(1, num_cycles=None))
    assert Journal(SETTINGS, tmp_path / "new").runs == journal.runs
    assert len(journal.runs) == 2


@pytest.mark.parametrize("cut", [1, 30])
def test_a_cut_last_line_is_dropped_and_written_again(tmp_path: Path, cut: int) -> None:
    journal = Journal(SETTINGS, tmp_path)
    journal.add(run(0))
    journal.add(run(1))
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-cut])
    resumed = Journal(SETTINGS, tmp_path)
    assert list(resumed.runs.values()) == [run(0)]
    resumed.add(run(1))
    assert (tmp_path / FILE).read_bytes() == whole


def test_settings_without_runs_may_change(tmp_path: Path) -> None:
    Journal(SETTINGS, tmp_path)
    Journal(SETTINGS | {"seed": 1}, tmp_path).add(run(0))
    assert len(Journal(SETTINGS | {"seed": 1}, tmp_path).runs) == 1


def test_other_settings_are_refused_by_name_and_kept(tmp_path: Path) -> None:
    Journal(SETTINGS, tmp_path).add(run(0))
    with pytest.raises(ValueError, match=r"seed was 0, is 1\. Name another folder, or start anew with --fresh"):
        Journal(SETTINGS | {"seed": 1}, tmp_path)
    with pytest.raises(ValueError, match=r"methods was \['plain'\], is None"):
        Journal({"target": "t", "seed": 0}, tmp_path)
    assert len(Journal(SETTINGS, tmp_path).runs) == 1
    assert Journal(SETTINGS | {"seed": 1}, tmp_path, fresh=True).runs == {}


@pytest.mark.parametrize("content", ['{"turns": []}\n', '{"turns": []}', "a file of mine", "[1]\n[2"])
def test_other_files_are_refused_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="does not begin with an evaluation's settings"):
        Journal(SETTINGS, tmp_path)
    assert (tmp_path / FILE).read_text(encoding="utf-8") == content


def test_a_line_that_is_no_run_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"settings": SETTINGS}) + '\n{"data": "d"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2 is no run"):
        Journal(SETTINGS, tmp_path)


def test_without_a_folder_nothing_is_written() -> None:
    journal = Journal(SETTINGS)
    journal.add(run(0))
    assert list(journal.runs.values()) == [run(0)]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^output: expected a folder, .*results is a file"):
        Journal({}, tmp_path / "results")
