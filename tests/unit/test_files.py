"""Files and folders that are there whole or not at all, beside neighbours that are left alone."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftwing.files import UNFINISHED, save_tensors, whole_folder, write_text


def test_no_neighbour_is_touched(tmp_path: Path) -> None:
    """Whatever it is called, and whether the writing succeeds or fails."""
    neighbour = tmp_path / "made.partial"
    neighbour.mkdir()
    (neighbour / "mine").write_text("x", encoding="utf-8")
    (tmp_path / "text.partial").write_text("mine", encoding="utf-8")
    with whole_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("whole", encoding="utf-8")
    with pytest.raises(KeyError), whole_folder(tmp_path / "other") as folder:
        raise KeyError
    write_text(tmp_path / "text", "whole")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "text", "\ud800")
    assert (neighbour / "mine").exists()
    assert (tmp_path / "text.partial").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "text").read_text(encoding="utf-8") == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "made.partial", "text", "text.partial"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_tensors_are_for_whom_other_files_are(tmp_path: Path, umask: int) -> None:
    """Whatever a cut has left behind."""
    (tmp_path / "one.safetensors.partial").touch(0o400)
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "one.safetensors", {"a": torch.arange(3)})
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["one.safetensors", "other"]
    assert (tmp_path / "one.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert torch.equal(load_file(tmp_path / "one.safetensors")["a"], torch.arange(3))


def test_what_a_killed_process_has_left_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / f".made.0123abcd{UNFINISHED}").mkdir()
    (tmp_path / f".made.mine{UNFINISHED}").mkdir()
    (tmp_path / f".made[0].0123abcd{UNFINISHED}").mkdir()
    for name in ("made", "made[0]"):
        with whole_folder(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".made.mine{UNFINISHED}", "made", "made[0]"]
