"""Tensors over flat tokens in safetensors files, each written whole or not at all; an index has their checksums."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from draftwing.files import save_tensors, write_text

INDEX = "index.json"
MAX_OPEN = 64
"""Files that a reader keeps open."""


@dataclass(frozen=True)
class Shard:
    """A file of a folder and what it holds: consecutive documents of one split."""

    file: str
    sha256: str
    num_bytes: int
    num_documents: int
    num_tokens: int


def write_shard(folder: Path, file: str, tensors: Mapping[str, torch.Tensor], num_documents: int) -> Shard:
    """Write `tensors`, whose first axis is the tokens' (or the documents'), so that a cut leaves no half file."""
    path = folder / file
    save_tensors(path, tensors)
    num_tokens = next(iter(tensors.values())).shape[0]
    return Shard(file, checksum(path), path.stat().st_size, num_documents, num_tokens)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_index(folder: Path, values: Mapping[str, Any]) -> None:
    """Replace a folder's index in one step."""
    write_text(folder / INDEX, json.dumps(values, indent=1) + "\n")


def read_index(folder: Path, expected_format: str) -> dict[str, Any]:
    """A folder's index.

    Raises:
        ValueError: there is none, it is unreadable, or of another kind.
    """
    try:
        values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: cannot read its {INDEX}: {error}") from None
    found = values.get("format") if isinstance(values, dict) else None
    if found != expected_format:
        raise ValueError(f"{folder}: expected the format {expected_format}, its {INDEX} says {found!r}")
    return dict(values)


def as_record(splits: Mapping[str, Sequence[Shard]]) -> dict[str, list[dict[str, Any]]]:
    """Shards as an index has them."""
    return {split: [asdict(shard) for shard in shards] for split, shards in splits.items()}


def shards_of(index: Mapping[str, Any]) -> dict[str, list[Shard]]:
    """The shards of each split, from an index."""
    return {split: [Shard(**values) for values in shards] for split, shards in index["splits"].items()}


def check_files(folder: Path, shards: Sequence[Shard], checksums: bool) -> None:
    """Raise a ValueError for the first file that is missing or not as it was written; sizes only, or checksums too."""
    for shard in shards:
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.num_bytes:
            size = path.stat().st_size if path.is_file() else "no file"
            raise ValueError(
                f"{path}: expected {shard.num_bytes} bytes, found {size}; delete the folder's index to redo it"
            )
        if checksums and checksum(path) != shard.sha256:
            raise ValueError(f"{path}: its checksum is not the index's: the file is damaged")


class ShardReader:
    """Reads tokens `[start, stop)` of a split, counted over all its files. Can be sent to another process."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self._files = [folder / shard.file for shard in shards]
        self._starts = [0, *accumulate(shard.num_tokens for shard in shards)]
        self._open: dict[int, Any] = {}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Values of tensor `name` at tokens that lie in one file."""
        index = bisect_right(self._starts, start) - 1
        first = self._starts[index]
        assert stop <= self._starts[index + 1], "a document lies in one file"
        values: torch.Tensor = self._handle(index).get_slice(name)[start - first : stop - first]
        return values

    def each(self, name: str) -> Iterator[torch.Tensor]:
        """Tensor `name` of every file."""
        for index in range(len(self._files)):
            yield self._handle(index).get_tensor(name)

    def _handle(self, index: int) -> Any:
        if index not in self._open:
            if len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[index] = safe_open(self._files[index], framework="pt")
        return self._open[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}
