"""Load drafts from a folder, a hub id or the embedded assets. Strict: every tensor is accounted for."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from draftwing.drafts.eagle.formats import FROM_FILE, HeadOptions
from draftwing.drafts.eagle.gguf_head import is_head, read_gguf
from draftwing.drafts.family import Draft, DraftFiles, Family
from draftwing.drafts.fit import Tensors, check_finite
from draftwing.drafts.kinds import FAMILIES, family_of_draft, family_of_files
from draftwing.embedded import EMBEDDED_DRAFTS, RECIPES
from draftwing.target.gguf import dequantised, find_gguf
from draftwing.target.model import TargetModel
from draftwing.target.packed import multiplies_in_c
from draftwing.target.rounded import round_linears

TOKENIZER_FILES = ("*.model", "*.txt", "*.tiktoken")
ACCEPTANCE_FILE = "acceptance.json"
"""Beside a draft's weights: how often its tokens were accepted, from `draftwing plan --save`."""
TRAINING_STATE = re.compile(r"(training_args|optimizer\w*|scheduler\w*|sampler\w*|random_states\w*|rng_state\w*)\.")
"""What trainers leave beside the weights."""


def resolve_draft(name: str) -> Path:
    """The folder of the draft `name`: one of EMBEDDED_DRAFTS, a folder, a GGUF file, or a hub id that is fetched.

    Raises:
        ValueError: no such folder, and the hub has no such draft or cannot be reached; a GGUF file that cannot be read.
    """
    if name in EMBEDDED_DRAFTS:
        if not EMBEDDED_DRAFTS[name].is_dir():
            recipe = RECIPES[name.partition("-")[0]]
            raise ValueError(f"draft: {name} is not part of this installation; {recipe} trains it")
        return EMBEDDED_DRAFTS[name]
    if (file := find_gguf(name, "draft")) is not None:
        return file if is_head(file) else dequantised(file, "draft")
    folder = Path(name)
    if folder.is_dir():
        return folder
    try:
        patterns = ["*.json", "*.safetensors", "*.bin", *_published_files(), *TOKENIZER_FILES]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds; the user needs the name and the reason
        raise ValueError(
            f"draft: no folder and no reachable hub id: {name!r} ({type(error).__name__}: {error})"
        ) from error


def read_draft_files(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """A draft's config.json and tensors (safetensors, which are mapped and not yet read, .bin or GGUF).

    Raises:
        ValueError: a file is missing or unreadable.
    """
    if folder.is_file():
        return read_gguf(folder)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ValueError(f"draft: {folder} has no config.json")
    values = _read_json(config_path)
    tensors: Tensors = {}
    for file in _weight_files(folder):
        tensors |= _read_tensors(file)
    return values, tensors


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a draft's weights.

    A training folder has others beside them: the optimizer's state, and under numbered names (model_1.safetensors) what
    else was prepared for training, as the target's output head.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / file for file in sorted({*_read_json(index)["weight_map"].values()})]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    files = [file for file in files if not TRAINING_STATE.match(file.name)]
    files = files or [folder / name for name in _published_files() if (folder / name).is_file()]
    if not files:
        raise ValueError(f"draft: {folder} has neither .safetensors nor .bin files")
    return files


def _published_files() -> list[str]:
    """The weight files that have names of their own."""
    return [name for family in FAMILIES for name in family.files]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"draft: cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"draft: cannot read {file}: expected an object, got {type(values).__name__}")
    return values


def _read_tensors(file: Path) -> Tensors:
    try:
        part = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"draft: cannot read {file}: {error}") from error
    if not isinstance(part, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in part.values()):
        raise ValueError(f"draft: {file} holds other things than tensors by name; is it a trainer's state?")
    return part


def load_draft(
    name: str,
    target: TargetModel,
    dtype: torch.dtype | None = None,
    options: HeadOptions = FROM_FILE,
    tokenizer: Any = None,
) -> Draft:
    """Load what a folder holds to draft for `target`.

    `options` override what a head's file says. `tokenizer` is the target's; with it a language model may have another
    number of ids.

    Raises:
        ValueError: a missing, unknown or misshapen tensor or one that is not finite, or a draft that does not fit.
    """
    files = open_draft(name)
    family = family_of_files(files.values, files.tensors)
    check_head_options(options, family, files.folder)
    draft = family.kind.build(files, target, dtype, options, tokenizer)
    if family.kind.reads_tensors:
        check_finite(files.tensors)
    return draft


def load_packed(
    name: str,
    target: TargetModel,
    options: HeadOptions = FROM_FILE,
    tokenizer: Any = None,
    draft_dtype: str | None = None,
    compiles: bool | None = None,
) -> Draft:
    """As `load_draft`, prepacked for decoding. `draft_dtype` is `draftwing.load`'s, `compiles` is `pack_target`'s.

    Raises:
        ValueError: as `load_draft`, or 8 bits for a draft that is no head.
    """
    draft = load_draft(name, target, options=options, tokenizer=tokenizer)
    family = family_of_draft(draft)
    if draft_dtype == "int8" and not family.has_int8:
        raise ValueError(f"draft_dtype: for draft heads, and {name} is {family.name}")
    if draft_dtype is None and family.has_int8 and multiplies_in_c(target.dtype, target.device):
        draft_dtype = "int8"
    if draft_dtype == "int8":
        round_linears(family.kind.network(draft))
    return family.kind.prepack(draft, compiles)


def open_draft(name: str) -> DraftFiles:
    """A draft's files; arguments and errors as those of `resolve_draft` and `read_draft_files`."""
    folder = resolve_draft(name)
    return DraftFiles(folder, *read_draft_files(folder))


def check_head_options(options: HeadOptions, family: Family, folder: Path) -> None:
    """Raise a ValueError for options that files of this family do not have."""
    if options.given and not family.has_head_options:
        raise ValueError(f"{', '.join(options.given)}: {folder} holds {family.name}, only EAGLE heads have them")


def read_acceptance(name: str) -> dict[str, Any]:
    """The acceptance counts stored with a draft (`greedy`, `sampled`); empty if it has none.

    Raises:
        ValueError: the file is no JSON object.
    """
    file = resolve_draft(name) / ACCEPTANCE_FILE
    return _read_json(file) if file.is_file() else {}
