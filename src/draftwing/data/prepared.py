"""A folder of tokenised documents (prepare/tokens.py writes it), read by index."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from draftwing.data.chat_template import Example
from draftwing.data.rows import describe, read_rejects
from draftwing.data.shards import (
    INDEX,
    Shard,
    ShardReader,
    check_files,
    read_index,
    shards_of,
)

REJECTS = "rejects.jsonl"
FORMAT = "draftwing-prepared-1"
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class PrepareSettings:
    """What is tokenised: `data` as in a recipe; documents are cut into pieces of `sequence_length` tokens."""

    data: tuple[str, ...]
    sequence_length: int = 2048
    max_rows: int | None = None
    seed: int = 0


@dataclass
class Counts:
    """What became of the rows so far."""

    rows: int = 0
    rejected: int = 0
    split: int = 0
    """Conversations that became several documents, for their chat template rewrites earlier turns."""
    cut: int = 0
    """Documents longer than a sequence, which became several."""
    unsupervised: int = 0
    """Pieces left out because the model says nothing in them."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Prepared:
    """A finished folder."""

    folder: Path
    settings: PrepareSettings
    counts: Counts
    splits: dict[str, list[Shard]]
    identity: str
    """Changes with any token of the folder."""

    def describe_rejects(self) -> str:
        """One line about the rows that could not be used; empty if there are none."""
        if not self.counts.rejected:
            return ""
        path = self.folder / REJECTS
        return describe(read_rejects(path), self.counts.rows, path)

    def examples(self, split: str, length: int | None = None, max_documents: int | None = None) -> "StoredExamples":
        """A split's first documents, those longer than `length` cut (pieces with nothing supervised are left out)."""
        reader = ShardReader(self.folder, self.splits[split])
        starts = [0]
        for lengths in reader.each("lengths"):
            for num_tokens in lengths.tolist():
                starts.append(starts[-1] + num_tokens)
        spans = list(pairwise(starts))[:max_documents]
        if length is not None and length < self.settings.sequence_length:
            spans = [(a, min(a + length, stop)) for start, stop in spans for a in range(start, stop, length)]
            spans = [(start, stop) for start, stop in spans if reader.read("loss_mask", start, stop)[2:].any()]
        return StoredExamples(self, split, reader, spans)


class StoredExamples(Sequence[Example]):
    """Documents of a prepared folder, read when asked for; `spans` are their tokens in the split."""

    def __init__(self, prepared: Prepared, split: str, reader: ShardReader, spans: list[tuple[int, int]]) -> None:
        self.prepared, self.split, self.spans, self._reader = prepared, split, spans, reader
        self.lengths = [stop - start for start, stop in spans]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        start, stop = self.spans[index]
        input_ids = self._reader.read("input_ids", start, stop).to(torch.int64)
        return Example(input_ids, self._reader.read("loss_mask", start, stop).clone())

    def each_file(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The token ids and loss mask of each file of the whole split."""
        return zip(self._reader.each("input_ids"), self._reader.each("loss_mask"), strict=True)


def is_prepared(folder: str) -> bool:
    """Whether a recipe's `data` names a prepared folder."""
    return (Path(folder) / INDEX).is_file()


def open_prepared(folder: str, tokenizer: Any) -> Prepared:
    """Open a prepared folder; its files are checked against their checksums.

    Raises:
        ValueError: it is unfinished or damaged, or was made with another tokenizer or chat template.
    """
    path = Path(folder)
    index = read_index(path, FORMAT)
    if not index["complete"]:
        raise ValueError(f"data: {folder} is unfinished; run the same `draftwing prepare` again to go on")
    for name, value in hashes_of(tokenizer).items():
        if index["tokenizer"][name] != value:
            raise ValueError(
                f"data: {folder} was prepared with another {name} than the target's; prepare it for this target"
            )
    splits = shards_of(index)
    check_files(path, [shard for shards in splits.values() for shard in shards], checksums=True)
    return as_prepared(path, index)


def as_prepared(folder: Path, index: dict[str, Any]) -> Prepared:
    settings = index["settings"] | {"data": tuple(index["settings"]["data"])}
    hashes = json.dumps(index["splits"]).encode()
    return Prepared(
        folder,
        PrepareSettings(**settings),
        Counts(**index["counts"]),
        shards_of(index),
        hashlib.sha256(hashes).hexdigest(),
    )


def hashes_of(tokenizer: Any) -> dict[str, str]:
    """What the ids and masks of a prepared folder depend on, hashed: the vocabulary and the chat template."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    template = json.dumps(tokenizer.chat_template)
    return {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat template": hashlib.sha256(template.encode()).hexdigest(),
    }
