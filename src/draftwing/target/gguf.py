"""GGUF files as targets: dequantised once by transformers, into a folder of the user's cache that is loaded instead.

The folder has the weights in bfloat16 (those of a file without quantised tensors in the file's type), the tokenizer and
the chat template, and a record of its files, written last. It is named by the GGUF file's digest and by transformers'
version, for another version may read the same file in another way.
"""

import hashlib
import json
import logging
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, __version__

from draftwing.files import cache_folder, open_to_others, whole_folder, write_text
from draftwing.target.model import one_line

logger = logging.getLogger(__name__)
RECORD = "dequantised.json"
"""A folder's file names with their sizes in bytes: without it, or with other sizes, the folder is not read."""
END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
"""Where a file has the ids that end a text and an answer; transformers knows the first."""
ROOM = 64 << 20
"""Bytes that must be free beside the weights, for the tokenizer."""
PLAIN_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""What tensors that are not quantised are stored in. A model has the first of these that it holds; norms are in F32."""


def find_gguf(name: str, role: str = "target") -> Path | None:
    """The GGUF file that a name means: a file, or the only one of a folder without other weights; None: it means none.

    Raises:
        ValueError: there is no such file, or there are several in the folder. The message begins with the `role`.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        if not files or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            return None
        if len(files) > 1:
            raise ValueError(f"{role}: {name} has {len(files)} .gguf files; name one, such as {files[0]}")
        return files[0]
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" or _begins_as_gguf(path) else None
    if path.suffix.lower() == ".gguf":
        raise ValueError(f"{role}: no such file: {name}")
    return None


def _begins_as_gguf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def dequantised(file: Path, role: str = "target") -> Path:
    """The folder of a GGUF file's weights and tokenizer, from the cache or made now, which takes a while.

    Raises:
        ValueError: the file is cut off or none, of an architecture that transformers does not read, without a
            tokenizer; `gguf` is not installed; no room in the cache. The message begins with the `role`.
    """
    folder = cache_folder() / "gguf" / f"{_digest(file)[:16]}-transformers-{__version__}"
    if _is_whole(folder):
        return folder
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ValueError(f"{role}: to read {file}, transformers needs {missing[0]}: pip install {' '.join(missing)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):  # another process may be making it
            if not _is_whole(folder):
                logger.info("dequantising %s once, into %s", file, folder)
                _write(file, folder, role)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{role}: cannot keep {file} dequantised in {folder.parent}: {one_line(error)}; "
            "$DRAFTWING_CACHE may name another folder"
        ) from error
    return folder


def _digest(file: Path) -> str:
    status = file.stat()
    return _digest_of(str(file.resolve()), status.st_size, status.st_mtime_ns)


@cache
def _digest_of(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether every file of a folder is as long as it was when the folder was made."""
    try:
        sizes = json.loads((folder / RECORD).read_text(encoding="utf-8"))["sizes"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _write(file: Path, folder: Path, role: str) -> None:
    dtype, num_bytes, end_ids = _look_into(file, role)
    free = shutil.disk_usage(folder.parent).free
    if free < num_bytes + ROOM:
        raise OSError(f"no room: it takes {num_bytes + ROOM:,} bytes, and {free:,} are free")
    model, tokenizer = _read(file, dtype, role)
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [known]
    ends = sorted({token for token in (*known, *end_ids) if token is not None})
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        open_to_others(*partial.glob("*.safetensors"))
        tokenizer.save_pretrained(partial)
        sizes = {written.name: written.stat().st_size for written in partial.iterdir()}
        write_text(partial / RECORD, json.dumps({"source": str(file), "sizes": sizes}, indent=2) + "\n")


def _look_into(file: Path, role: str) -> tuple[torch.dtype, int, list[int]]:
    """The dtype that the weights will have, their bytes, and the ids that END_TOKENS have.

    Raises:
        ValueError: it is no GGUF file, or one that ends too early.
    """
    from gguf import GGUFReader

    if not _begins_as_gguf(file):
        raise ValueError(f"{role}: {file} is no GGUF file: it does not begin with GGUF")
    try:
        reader = GGUFReader(file)
        types = {tensor.tensor_type.name for tensor in reader.tensors}
        num_numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
        fields = [reader.fields[name] for name in END_TOKENS if name in reader.fields]
        ends = [int(field.parts[field.data[0]][0]) for field in fields]
    except Exception as error:  # the reader checks nothing, so that whatever is missing is found by some operation
        raise ValueError(f"{role}: {file} cannot be read as GGUF; is it cut off? ({one_line(error)})") from error
    if not types:
        raise ValueError(f"{role}: {file} holds no tensors")
    plain = next(dtype for name, dtype in PLAIN_TYPES.items() if name in types or name == "F32")
    dtype = plain if types <= PLAIN_TYPES.keys() else torch.bfloat16
    return dtype, num_numbers * dtype.itemsize, ends


def _read(file: Path, dtype: torch.dtype, role: str) -> tuple[Any, Any]:
    """The model and the tokenizer that transformers makes of a file."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} tensors, the first is {missing[0]}")
    except Exception as error:  # of many kinds, where metadata is missing or of another form
        raise ValueError(f"{role}: transformers cannot read {file}: {one_line(error)}") from error
    try:
        return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:
        raise ValueError(f"{role}: transformers finds no tokenizer in {file}: {one_line(error)}") from error
