"""Run a target over a prepared folder and keep its features; data/features.py reads them."""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import DownloadColumn
from torch import nn

from draftwing.data.chat_template import Example
from draftwing.data.features import FORMAT, Storage, check_positions, target_fingerprint, to_fp8
from draftwing.data.prepared import SPLITS, Prepared
from draftwing.data.shards import (
    INDEX,
    as_record,
    check_files,
    read_index,
    shards_of,
    write_index,
    write_shard,
)
from draftwing.files import check_unchanged
from draftwing.progress import progress_bar
from draftwing.provenance import provenance
from draftwing.target.hidden_states import NORMED
from draftwing.target.model import TargetModel

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 29
BATCH_TOKENS = 8192
SPARE = 1.02
"""Disk space asked for, over the tensors' own."""


@dataclass(frozen=True)
class Estimate:
    """What writing features will take from here on."""

    num_tokens: int
    num_bytes: int
    free_bytes: int
    tokens_per_second: float

    @property
    def hours(self) -> float:
        return self.num_tokens / self.tokens_per_second / 3600

    def __str__(self) -> str:
        return (
            f"{self.num_tokens:,} tokens, {self.num_bytes / 1e9:.2f} GB ({self.free_bytes / 1e9:.2f} GB free), "
            f"{self.hours:.2f} hours at {self.tokens_per_second:,.0f} tokens/s, the rate of the first batch"
        )


@dataclass(frozen=True)
class Job:
    """One shard to be written: some documents of a split, in turn."""

    split: str
    file: str
    documents: range


class FeatureWriter:
    """Runs a target over prepared documents and writes `features [T, F]` and `last_hidden [T, D]`.

    `feature_layers` are numbers of hidden states. Where they are -1 alone (EAGLE-1), `last_hidden` is all there
    is to write.

    Raises:
        ValueError: the folder was begun for other tokens, another target, layers or storage.
    """

    def __init__(
        self, prepared: Prepared, target: TargetModel, feature_layers: tuple[int, ...], storage: Storage, folder: Path
    ) -> None:
        self._target, self._layers, self._storage, self._folder = target, feature_layers, storage, folder
        self._stored_layers = () if feature_layers == (NORMED,) else feature_layers
        """The layers that are kept beside the last one."""
        self._examples = {split: prepared.examples(split) for split in SPLITS}
        self._index: dict[str, Any] = {
            "format": FORMAT,
            "prepared": prepared.identity,
            "target": target_fingerprint(target),
            "feature_layers": list(feature_layers),
            "storage": storage,
            "complete": False,
            "splits": {split: [] for split in SPLITS},
        }
        if (folder / INDEX).exists():
            earlier = read_index(folder, FORMAT)
            fixed = ("prepared", "target", "feature_layers", "storage")
            check_unchanged(earlier, {name: self._index[name] for name in fixed}, folder)
            self._index = earlier
        self._done = shards_of(self._index)
        if num_done := sum(map(len, self._done.values())):
            what = (
                "finished already: %s, %d files" if self._index["complete"] else "resuming from %s: %d files are there"
            )
            logger.info(what, folder, num_done)
        self._check_fit()
        check_files(folder, [shard for shards in self._done.values() for shard in shards], checksums=False)
        per_shard = max(1, SHARD_BYTES // self.bytes_per_token)
        self._jobs = [
            job
            for split, examples in self._examples.items()
            for job in list(_jobs(split, examples.lengths, per_shard))[len(self._done[split]) :]
        ]

    def _check_fit(self) -> None:
        target = self._target
        known = range(target.num_layers + 1)
        if not self._layers or (self._layers != (NORMED,) and not {*self._layers} <= {*known}):
            raise ValueError(f"aux_layers: expected some of 0 to {target.num_layers}, got {self._layers}")
        longest = max(length for examples in self._examples.values() for length in examples.lengths)
        check_positions(longest, target.max_positions, "prepare the data with --sequence-length")

    @property
    def bytes_per_token(self) -> int:
        width = self._target.hidden_size
        return (len(self._stored_layers) + 1) * (2 * width if self._storage == "bf16" else width + 4)

    def estimate(self) -> Estimate:
        """Bytes and time still to come; runs the first batch to time it.

        Raises:
            ValueError: the disk cannot hold it.
        """
        num_tokens = self._tokens_to_come
        num_bytes = int(num_tokens * self.bytes_per_token * SPARE)
        parent = next(folder for folder in (self._folder, *self._folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(parent).free
        rate = self._rate() if self._jobs else 1.0
        estimate = Estimate(num_tokens, num_bytes, free, rate)
        if num_bytes > free:
            raise ValueError(f"output: {self._folder}: the disk cannot hold the features: {estimate}")
        return estimate

    @property
    def _tokens_to_come(self) -> int:
        return sum(self._examples[job.split].lengths[i] for job in self._jobs for i in job.documents)

    def _rate(self) -> float:
        job = self._jobs[0]
        examples = self._examples[job.split]
        batch = next(_batches(examples.lengths, job.documents))
        start = time.perf_counter()
        self._run([examples[i] for i in batch])
        return sum(examples.lengths[i] for i in batch) / (time.perf_counter() - start)

    def write(self) -> None:
        """Write what is missing. Ctrl-C loses the shard that is being made."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._save(complete=False)
        with progress_bar(count=DownloadColumn()) as progress:
            shown = progress.add_task("features", total=self._tokens_to_come * self.bytes_per_token)
            for job in self._jobs:
                tensors = self._tensors(job, lambda tokens: progress.advance(shown, tokens * self.bytes_per_token))
                self._done[job.split].append(write_shard(self._folder, job.file, tensors, len(job.documents)))
                self._save(complete=False)
        self._save(complete=True)

    def _save(self, complete: bool) -> None:
        self._index |= {"splits": as_record(self._done), "complete": complete, "provenance": provenance()}
        write_index(self._folder, self._index)

    def _tensors(self, job: Job, advance: Any) -> dict[str, torch.Tensor]:
        """A shard's tensors. Documents run in batches of like length, and are put back in order."""
        examples = self._examples[job.split]
        hidden: dict[int, torch.Tensor] = {}
        for batch in _batches(examples.lengths, job.documents):
            hidden |= zip(batch, self._run([examples[i] for i in batch]), strict=True)
            advance(sum(examples.lengths[i] for i in batch))
        flat = torch.cat([hidden[i] for i in job.documents])  # [T, layers, D]
        stored = {"last_hidden": flat[:, -1:]}
        if flat.shape[1] > 1:
            stored["features"] = flat[:, :-1]
        if self._storage == "bf16":
            return {name: values.flatten(1).to(torch.bfloat16) for name, values in stored.items()}
        tensors = {}
        for name, values in stored.items():
            tensors[name], tensors[f"{name}_scale"] = to_fp8(values)
        return tensors

    @torch.inference_mode()
    def _run(self, documents: Sequence[Example]) -> list[torch.Tensor]:
        """Hidden states of each document, `[S, layers, D]`, the last one the input of the output head."""
        target = self._target
        ids = nn.utils.rnn.pad_sequence([document.input_ids for document in documents], batch_first=True)
        states = target.read_rows(ids.to(target.device), (*self._stored_layers, NORMED)).features
        stacked = states.unflatten(-1, (-1, target.hidden_size)).cpu()
        return [states[: len(document)].clone() for states, document in zip(stacked, documents, strict=True)]


def _jobs(split: str, lengths: Sequence[int], tokens_per_shard: int) -> Iterator[Job]:
    """Consecutive documents of about `tokens_per_shard` tokens (one document at least)."""
    first = num_tokens = number = 0
    for index, length in enumerate(lengths):
        num_tokens += length
        if num_tokens >= tokens_per_shard or index == len(lengths) - 1:
            yield Job(split, f"{split}-{number:05d}.safetensors", range(first, index + 1))
            first, num_tokens, number = index + 1, 0, number + 1


def _batches(lengths: Sequence[int], documents: range) -> Iterator[list[int]]:
    """Documents of like length, longest first, at most BATCH_TOKENS tokens of them with padding."""
    batch: list[int] = []
    for document in sorted(documents, key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(document)
    yield batch
