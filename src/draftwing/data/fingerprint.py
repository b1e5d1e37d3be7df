"""Whether inputs are still those of an earlier run: short hashes of files, and of tokens, that are cheap to take."""

import zlib
from collections.abc import Iterable
from pathlib import Path

import torch

from draftwing.config import Stage

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
BLOCK = 1 << 16
MAX_BLOCKS = 256
"""Blocks read of a file; one that has more is read in so many places."""


def of_path(name: str) -> str | None:
    """The contents of a file, or of the weights in a folder, hashed; None where there is neither (a hub id, `tiny`).

    Times and places do not count, so that a copy is the same.
    """
    path = Path(name)
    if path.is_file():
        return f"{_of_file(path):08x}"
    files = sorted(file for file in path.glob("*") if file.suffix in WEIGHTS and file.is_file())
    listed = "".join(f"{file.name} {_of_file(file):08x}\n" for file in files)
    return f"{zlib.crc32(listed.encode()):08x}" if files else None


def of_data(names: str | Iterable[str]) -> dict[str, str]:
    """Hashes of the files, or of the prepared folder, that `data` names; empty if it names none."""
    names = (names,) if isinstance(names, str) else names
    found = [value for name in names if (value := of_path(name)) is not None]
    return {"content of data": " ".join(found)} if found else {}


def contents_of(config: Stage) -> dict[str, str]:
    """Hashes of the models that a stage reads, as far as they are in folders."""
    names, recipe = ("target", "teacher", "init_from"), config.as_dict()
    found = {name: of_path(recipe[name]) for name in names if recipe.get(name)}
    return {f"content of {name}": value for name, value in found.items() if value is not None}


def of_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """The values of tensors on the CPU and their lengths, hashed."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().numpy().tobytes(), zlib.crc32(str(tuple(tensor.shape)).encode(), value))
    return f"{value:08x}"


def _of_file(path: Path) -> int:
    """The size and at most MAX_BLOCKS blocks, evenly spread, the first and the last among them."""
    size = path.stat().st_size
    value, num_blocks = zlib.crc32(str(size).encode()), -(-size // BLOCK)
    num_read = min(num_blocks, MAX_BLOCKS)
    with path.open("rb") as file:
        for index in range(num_read):
            file.seek(index * (num_blocks - 1) // max(1, num_read - 1) * BLOCK)
            value = zlib.crc32(file.read(BLOCK), value)
    return value
