"""A target's features of a prepared folder's tokens, read beside them; prepare/target_features.py writes them.

A token costs F + D values (EAGLE-3: four hidden states): bf16, or fp8 e4m3 with a scale per token and hidden state.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from draftwing.data.chat_template import Example
from draftwing.data.prepared import StoredExamples
from draftwing.data.shards import (
    Shard,
    ShardReader,
    check_files,
    read_index,
    shards_of,
)
from draftwing.target.hidden_states import NORMED
from draftwing.target.model import TargetModel

FORMAT = "draftwing-features-2"
Storage = Literal["bf16", "fp8"]
LARGEST_FP8 = float(torch.finfo(torch.float8_e4m3fn).max)


def check_positions(longest: int, limit: int | None, advice: str) -> None:
    """Raise a ValueError where a document is longer than a model has positions, which it cannot read as it should."""
    if limit is not None and longest > limit:
        raise ValueError(
            f"sequence_length: a document has {longest} tokens and the target {limit} positions; {advice} {limit}"
        )


def to_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, layers, D]` -> e4m3 `[T, layers * D]` and float32 scales `[T, layers]`: the largest value becomes 448."""
    values = values.float()
    scale = values.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST_FP8
    return (values / scale[..., None]).flatten(1).to(torch.float8_e4m3fn), scale


def from_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The bf16 tensor `[T, layers * D]` that `to_fp8` was given, to 3 bits of mantissa."""
    by_layer = values.float().unflatten(1, (scale.shape[1], -1))
    restored: torch.Tensor = by_layer * scale[..., None]
    return restored.flatten(1).to(torch.bfloat16)


def target_fingerprint(target: TargetModel) -> str:
    """A hash that tells targets apart: sizes, and the output head's first row (in bf16)."""
    sizes = [target.hidden_size, target.num_layers, target.vocab_size]
    row = next(target.output_head.parameters())[0].detach().to(torch.bfloat16).float().cpu().tolist()
    return hashlib.sha256(json.dumps([sizes, row]).encode()).hexdigest()


class FeatureExamples(Sequence[Example]):
    """Prepared documents with their stored features, read when asked for; fit for a DataLoader with workers.

    Raises:
        ValueError: features that are unfinished, or made from other tokens, another target or other layers.
    """

    def __init__(
        self, documents: StoredExamples, folder: str, target: TargetModel, feature_layers: tuple[int, ...]
    ) -> None:
        path = Path(folder)
        index = read_index(path, FORMAT)
        if not index["complete"]:
            raise ValueError(f"features: {folder} is unfinished; run the same `draftwing prepare --features` again")
        expected: dict[str, tuple[Any, str]] = {
            "prepared": (documents.prepared.identity, "other tokens than those of `data`"),
            "target": (target_fingerprint(target), "another target"),
        }
        self._has_own_features = feature_layers != (NORMED,)
        if self._has_own_features:  # the final norm's output is in every folder
            problem = f"the layers {index['feature_layers']}, not {feature_layers}"
            expected["feature_layers"] = list(feature_layers), problem
        for name, (value, problem) in expected.items():
            if index[name] != value:
                raise ValueError(f"features: {folder} was made from {problem}")
        shards: list[Shard] = shards_of(index)[documents.split]
        check_files(path, shards, checksums=False)
        self.lengths = documents.lengths
        self._documents, self._reader = documents, ShardReader(path, shards)
        self._is_fp8 = index["storage"] == "fp8"

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        document, (start, stop) = self._documents[index], self._documents.spans[index]
        last_hidden = self._read("last_hidden", start, stop)
        features = self._read("features", start, stop) if self._has_own_features else None
        return Example(document.input_ids, document.loss_mask, None, features, last_hidden)

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        values = self._reader.read(name, start, stop)
        return from_fp8(values, self._reader.read(f"{name}_scale", start, stop)) if self._is_fp8 else values.clone()


def check_features(folder: str) -> int:
    """Check every file of a folder of features against its checksum; returns the bytes read."""
    shards = [shard for part in shards_of(read_index(Path(folder), FORMAT)).values() for shard in part]
    check_files(Path(folder), shards, checksums=True)
    return sum(shard.num_bytes for shard in shards)
