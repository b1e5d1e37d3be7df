"""Tokenised samples as the trainer takes them: cut to length, packed, batched."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from draftwing.config import HeadStage
from draftwing.data import fingerprint
from draftwing.data.chat_template import Example, cut, encode_row
from draftwing.data.corpus import Splits
from draftwing.data.features import FeatureExamples, check_positions
from draftwing.data.prepared import StoredExamples, is_prepared, open_prepared
from draftwing.data.rows import Rejects, describe, made_from, select_rows
from draftwing.data.sources import RowRef
from draftwing.target.model import TargetModel


def read_documents(config: HeadStage, tokenizer: Any) -> Splits[Example]:
    """The documents of a recipe's `data`: tokenised now, or read from a prepared folder.

    Rows that cannot be used go to `rejects.jsonl` in the output folder, and a line on stderr counts them.

    Raises:
        ValueError: no usable row, or a folder that was prepared for another tokenizer.
    """
    names = (config.data,) if isinstance(config.data, str) else config.data
    length = config.sequence_length
    if len(names) == 1 and is_prepared(names[0]):
        prepared = open_prepared(names[0], tokenizer)
        return Splits(prepared.examples("train", length, config.max_rows), prepared.examples("held_out", length))
    selection = select_rows(names, config.max_rows, config.seed)
    rejects = Rejects(Path(config.output) / "rejects.jsonl")
    documents = Splits(
        _tokenise(selection.train, tokenizer, length, rejects),
        _tokenise(selection.held_out, tokenizer, length, rejects),
    )
    num_rows = len(selection.train) + len(selection.held_out)
    rejects.finish(num_rows)
    if rejects.found:
        _note(describe(rejects.found, num_rows, rejects.path))
    return documents


def check_readable(documents: Splits[Example], target: TargetModel) -> None:
    """Raise a ValueError for a document that the target cannot read: longer than its positions, or with other ids."""
    train, held_out = documents.train, documents.held_out
    longest = max((*lengths_of(train), *lengths_of(held_out)), default=0)
    check_positions(longest, target.max_positions, "set it to at most")
    if (largest := max(largest_id(train), largest_id(held_out))) >= target.vocab_size:
        raise ValueError(
            f"input_ids: a document has the token {largest} and the target {target.vocab_size} embeddings; "
            "is the tokenizer the target's own?"
        )


def as_training_rows(
    documents: Splits[Example], config: HeadStage, target: TargetModel, feature_layers: tuple[int, ...]
) -> Splits[Example]:
    """What the trainer iterates over: documents with their stored `features`, packed, if the recipe says so.

    Of the held-out rows there are `evaluate_rows`.
    """
    train, held_out = documents.train, documents.held_out
    if config.features:
        if not (isinstance(train, StoredExamples) and isinstance(held_out, StoredExamples)):
            raise ValueError("features: needs as `data` the prepared folder that the features were made from")
        train, held_out = (FeatureExamples(part, config.features, target, feature_layers) for part in (train, held_out))
    if config.packing:
        train, held_out = (PackedExamples(part, config.sequence_length) for part in (train, held_out))
    return Splits(train, [held_out[i] for i in range(min(config.evaluate_rows, len(held_out)))])


def _tokenise(refs: Sequence[RowRef], tokenizer: Any, length: int, rejects: Rejects) -> list[Example]:
    shown = track(refs, "tokenising", console=Console(stderr=True), disable=len(refs) < 1000)
    encoded = list(made_from(shown, lambda row: encode_row(row, tokenizer), rejects))
    if num_split := sum(len(examples) > 1 for examples in encoded):
        _note(f"{num_split} conversations become several documents, for the chat template rewrites earlier turns")
    return [piece for examples in encoded for example in examples for piece in cut(example, length)]


def _note(text: str) -> None:
    """A line on stderr; of several processes (torchrun's) the first one writes it."""
    if os.environ.get("RANK", "0") == "0":
        Console(stderr=True).print(text, style="yellow", markup=False, soft_wrap=True)


def count_supervised(documents: Sequence[Example], vocab_size: int) -> torch.Tensor:
    """How often each token is supervised, `[V]`; of a prepared folder, in all of its split."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for ids, mask in _ids_and_masks(documents):
        counts += torch.bincount(ids[mask], minlength=vocab_size)
    return counts


def largest_id(documents: Sequence[Example]) -> int:
    """The largest token id; of a prepared folder, in all of its split."""
    return max((int(ids.max()) for ids, _ in _ids_and_masks(documents) if ids.numel()), default=0)


def _ids_and_masks(documents: Sequence[Example]) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(documents, StoredExamples):
        return documents.each_file()
    return ((document.input_ids, document.loss_mask) for document in documents)


def fingerprint_of(documents: Sequence[Example]) -> str:
    """A hash of the documents' tokens and masks; of stored ones, of their whole folder."""
    if isinstance(documents, StoredExamples):
        return documents.prepared.identity
    return fingerprint.of_tensors(part for row in documents for part in (row.input_ids, row.loss_mask))


def lengths_of(rows: Sequence[Example]) -> list[int]:
    """How many tokens each row has, without reading stored ones."""
    if isinstance(rows, StoredExamples | FeatureExamples | PackedExamples):
        return rows.lengths
    return [len(row) for row in rows]


class Collator:
    """Pads rows on the right to the longest of the batch.

    A batch has `input_ids [B, S]` and `loss_mask [B, S]`; packed rows also `document_ids [B, S]`, which is -1 on
    padding, and rows with what is stored of the target `last_hidden [B, S, D]` and, if they are others,
    `features [B, S, F]`.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._padding = {"input_ids": pad_token_id, "loss_mask": 0, "document_ids": -1, "features": 0, "last_hidden": 0}

    def __call__(self, batch: list[Example]) -> dict[str, torch.Tensor]:
        collated = {}
        for name, value in self._padding.items():
            columns = [getattr(row, name) for row in batch]
            if columns[0] is not None:
                collated[name] = nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)
        return collated


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of document indices whose lengths sum to at most `capacity`: best-fit decreasing.

    Longest first, each document goes where least room is left behind it. A function of its arguments alone. Documents
    of a row, and rows by their first document, are in the order given.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by the room left in them
    rooms = 0  # bit r is set where some row has room r
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        assert 0 < length <= capacity
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(document)
        else:
            row, room = len(rows), capacity
            rows.append([document])
        with_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return sorted(sorted(row) for row in rows)


class PackedExamples(Sequence[Example]):
    """Documents packed into rows of at most `capacity` tokens, with the number of each token's document."""

    def __init__(self, documents: Sequence[Example], capacity: int) -> None:
        lengths = lengths_of(documents)
        self._documents, self._rows = documents, pack(lengths, capacity)
        self.lengths = [sum(lengths[document] for document in row) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return as_one_row([self._documents[document] for document in self._rows[index]])


def as_one_row(documents: Sequence[Example]) -> Example:
    """One row of several documents."""
    lengths = torch.tensor([len(document) for document in documents])
    return Example(
        torch.cat([document.input_ids for document in documents]),
        torch.cat([document.loss_mask for document in documents]),
        torch.arange(len(documents)).repeat_interleave(lengths),
        _join_stored([document.features for document in documents]),
        _join_stored([document.last_hidden for document in documents]),
    )


def _join_stored(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    stored = [part for part in parts if part is not None]
    return torch.cat(stored) if stored else None
