"""Fingerprints of inputs: copies are the same, changes are not, and little is read of large files."""

import os
from pathlib import Path

import pytest
import torch

from draftwing.data import fingerprint


@pytest.mark.parametrize("size", [0, 1, fingerprint.BLOCK, 3 * fingerprint.BLOCK + 1])
def test_a_file_counts_byte_by_byte_but_not_its_time(tmp_path: Path, size: int) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(bytes(size))
    before = fingerprint.of_path(str(path))
    os.utime(path, (0, 0))
    assert fingerprint.of_path(str(path)) == before
    path.write_bytes(bytes(size) + b"\0")
    assert fingerprint.of_path(str(path)) != before
    for position in {0, size // 2, size - 1} if size else ():
        path.write_bytes(bytes(position) + b"x" + bytes(size - position - 1))
        assert fingerprint.of_path(str(path)) != before


def test_of_a_large_file_blocks_from_the_first_to_the_last_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK", 4)
    monkeypatch.setattr(fingerprint, "MAX_BLOCKS", 3)
    path, changed = tmp_path / "data.jsonl", []
    path.write_bytes(bytes(39))
    before = fingerprint.of_path(str(path))
    for position in range(39):
        path.write_bytes(bytes(position) + b"x" + bytes(38 - position))
        if fingerprint.of_path(str(path)) != before:
            changed.append(position)
    assert changed == [0, 1, 2, 3, 16, 17, 18, 19, 36, 37, 38]


def test_of_a_folder_the_weights_count(tmp_path: Path) -> None:
    assert fingerprint.of_path(str(tmp_path)) is None
    assert fingerprint.of_path("org/model") is None
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = fingerprint.of_path(str(tmp_path))
    (tmp_path / "acceptance.json").write_text("{}", encoding="utf-8")
    assert fingerprint.of_path(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"others!")
    assert fingerprint.of_path(str(tmp_path)) != before


def test_tensors_count_with_their_lengths() -> None:
    rows = [torch.tensor([1, 2]), torch.tensor([3])]
    assert fingerprint.of_tensors(rows) == fingerprint.of_tensors([row.clone() for row in rows])
    assert fingerprint.of_tensors(rows) != fingerprint.of_tensors([torch.tensor([1]), torch.tensor([2, 3])])
    assert fingerprint.of_tensors(rows) != fingerprint.of_tensors([torch.tensor([1, 2]), torch.tensor([4])])
