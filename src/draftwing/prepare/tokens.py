"""Tokenise rows into a folder, shard by shard; a stopped run goes on. data/prepared.py reads it."""

import logging
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from draftwing.data import fingerprint
from draftwing.data.chat_template import Example, cut, encode_row
from draftwing.data.in_order import map_in_order
from draftwing.data.prepared import (
    FORMAT,
    REJECTS,
    SPLITS,
    Counts,
    Prepared,
    PrepareSettings,
    as_prepared,
    hashes_of,
    open_prepared,
)
from draftwing.data.rows import FoundRow, Reject, Rejects, find_row, select_rows
from draftwing.data.shards import (
    INDEX,
    as_record,
    read_index,
    shards_of,
    write_index,
    write_shard,
)
from draftwing.data.sources import RowRef
from draftwing.files import check_unchanged
from draftwing.progress import progress_bar
from draftwing.provenance import provenance

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
CHUNK_ROWS = 64
SHARD_TOKENS = 1 << 24
ROWS_WORTH_A_POOL = 4096
"""Fewer are tokenised sooner than other processes have started."""


@dataclass(frozen=True)
class Chunk:
    """Some rows tokenised: flat `input_ids [T]` (int32), `loss_mask [T]` (bool), and each document's length."""

    input_ids: Array
    loss_mask: Array
    lengths: list[int]
    rejects: list[Reject]
    counts: Counts


class _Writer:
    """The state of a run: what is collected for the next shard, and the index of those that are done."""

    def __init__(self, folder: Path, settings: PrepareSettings, tokenizer: Any, num_rows: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._index: dict[str, Any] = {
            "format": FORMAT,
            "settings": asdict(settings),
            "tokenizer": hashes_of(tokenizer),
            "num_rows": num_rows,
            "complete": False,
            "counts": asdict(Counts()),
            "splits": {split: [] for split in SPLITS},
        }
        contents = fingerprint.of_data(settings.data)
        self._index |= contents
        if (folder / INDEX).exists():
            earlier = read_index(folder, FORMAT)
            check_unchanged(earlier["settings"], asdict(settings), folder)
            known = {name: value for name, value in contents.items() if name in earlier}
            fixed = {name: self._index[name] for name in ("tokenizer", "num_rows")}
            check_unchanged(earlier, fixed | known, folder)
            self._index = earlier
        self.is_complete: bool = self._index["complete"]
        self.counts = Counts(**self._index["counts"])
        self.rejects = Rejects(folder / REJECTS, keep=self.counts.rejected)
        self._splits = shards_of(self._index)
        self._chunks: list[Chunk] = []

    def add(self, split: str, chunk: Chunk) -> None:
        """Take in the next rows; full shards are written."""
        self._chunks.append(chunk)
        self.counts += chunk.counts
        for reject in chunk.rejects:
            self.rejects.add(reject)
        self.counts.rejected = len(self.rejects)
        if sum(chunk.input_ids.size for chunk in self._chunks) >= SHARD_TOKENS:
            self.flush(split)

    def flush(self, split: str) -> None:
        """Write what has been collected, and the index."""
        lengths = [length for chunk in self._chunks for length in chunk.lengths]
        if lengths:
            tensors = {
                "input_ids": torch.from_numpy(np.concatenate([chunk.input_ids for chunk in self._chunks])),
                "loss_mask": torch.from_numpy(np.concatenate([chunk.loss_mask for chunk in self._chunks])),
                "lengths": torch.tensor(lengths, dtype=torch.int32),
            }
            file = f"{split}-{len(self._splits[split]):05d}.safetensors"
            self._splits[split].append(write_shard(self.folder, file, tensors, len(lengths)))
        self._chunks = []
        self._save()

    def finish(self) -> Prepared:
        self.rejects.finish(self.counts.rows)
        if not self._splits["train"]:
            raise ValueError("data: nothing is supervised in any training row")
        self._index["provenance"] = provenance()
        self._index["complete"] = True
        self._save()
        return as_prepared(self.folder, self._index)

    def _save(self) -> None:
        self._index |= {"counts": asdict(self.counts), "splits": as_record(self._splits)}
        write_index(self.folder, self._index)


def prepare(settings: PrepareSettings, tokenizer: Any, folder: Path, workers: int = 1) -> Prepared:
    """Tokenise rows into `folder` with several processes; a run that was stopped goes on after its last shard.

    Raises:
        ValueError: no row can be used, or the folder was begun with other settings.
    """
    selection = select_rows(settings.data, settings.max_rows, settings.seed)
    by_split = {"train": selection.train, "held_out": selection.held_out}
    num_rows = sum(map(len, by_split.values()))
    writer = _Writer(folder, settings, tokenizer, num_rows)
    if writer.is_complete:
        logger.info("finished already: %s", folder)
        return open_prepared(str(folder), tokenizer)
    if writer.counts.rows:
        logger.info("resuming from %s: %d of %d rows are there", folder, writer.counts.rows, num_rows)
    with progress_bar() as progress:
        shown = progress.add_task("tokenising rows", total=num_rows, completed=writer.counts.rows)
        for split, refs in by_split.items():
            refs = refs[max(0, writer.counts.rows - (num_rows - len(refs) if split == "held_out" else 0)) :]
            for chunk in _tokenise(refs, tokenizer, settings.sequence_length, workers):
                writer.add(split, chunk)
                progress.advance(shown, chunk.counts.rows)
            if refs:
                writer.flush(split)
    return writer.finish()


def _tokenise(refs: Sequence[RowRef], tokenizer: Any, length: int, workers: int) -> Iterator[Chunk]:
    """Yield chunks of rows in order."""
    tasks = ([find_row(ref) for ref in refs[i : i + CHUNK_ROWS]] for i in range(0, len(refs), CHUNK_ROWS))
    if workers == 1 or len(refs) < ROWS_WORTH_A_POOL:
        yield from (tokenise_chunk(task, tokenizer, length) for task in tasks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _ignore_interrupts) as executor:
        work = partial(_tokenise_elsewhere, name=tokenizer.name_or_path, length=length)
        yield from map_in_order(executor, work, tasks, ahead=4 * workers)


def _tokenise_elsewhere(found: list[FoundRow | Reject], name: str, length: int) -> Chunk:
    return tokenise_chunk(found, _tokenizer(name), length)


@cache
def _tokenizer(name: str) -> Any:
    return AutoTokenizer.from_pretrained(name)


def _ignore_interrupts() -> None:
    """Ctrl-C goes to every process; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def tokenise_chunk(found: Sequence[FoundRow | Reject], tokenizer: Any, length: int) -> Chunk:
    """Tokenise rows and cut them into pieces of at most `length` tokens."""
    pieces: list[Example] = []
    rejects: list[Reject] = []
    counts = Counts(len(found))
    for item in found:
        examples = item if isinstance(item, Reject) else item.make(lambda row: encode_row(row, tokenizer))
        if isinstance(examples, Reject):
            rejects.append(examples)
            continue
        counts.split += len(examples) > 1
        for example in examples:
            supervised = cut(example, length)
            pieces += supervised
            num_pieces = max(1, -(-len(example) // length))
            counts.cut += num_pieces > 1
            counts.unsupervised += num_pieces - len(supervised)
    ids, mask = (
        np.concatenate([np.empty(0, dtype), *(getattr(piece, name).numpy() for piece in pieces)]).astype(dtype)
        for name, dtype in (("input_ids", np.int32), ("loss_mask", np.bool_))
    )
    return Chunk(ids, mask, [len(piece) for piece in pieces], rejects, counts)
