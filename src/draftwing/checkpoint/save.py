"""Write heads in the published formats."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from draftwing.checkpoint.formats import (
    HeadFile,
    HeadFormat,
    TargetSizes,
    Tensors,
    write_head,
)
from draftwing.checkpoint.load import DraftNetwork
from draftwing.checkpoint.medusa_format import MedusaHeads, write_medusa
from draftwing.models.packed import PackedLinear


def to_head(network: DraftNetwork, head_format: HeadFormat) -> HeadFile:
    """A network as a head of the given format (its parameters are not copied), as `load_head` gives it."""
    assert not any(isinstance(module, PackedLinear) for module in network.modules()), "packed for decoding"
    tensors = {name: parameter.detach() for name, parameter in network.named_parameters()}
    return HeadFile(head_format, network.config, network.vocab.target_ids, tensors)


def save_head(
    head: HeadFile, folder: Path, target: TargetSizes, dtype: torch.dtype | None = None, verifier: str = ""
) -> None:
    """Write config.json and model.safetensors; the weights in `dtype` (default: as they are)."""
    _write(*write_head(head, target, verifier), folder, "model.safetensors", dtype)


def save_medusa(heads: MedusaHeads, folder: Path, target_name: str, dtype: torch.dtype | None = None) -> None:
    """Write config.json and medusa_lm_head.safetensors; the weights in `dtype` (default: as they are)."""
    values, tensors = write_medusa(heads, target_name)
    _write(values, tensors, folder, "medusa_lm_head.safetensors", dtype)


def _write(values: dict[str, Any], tensors: Tensors, folder: Path, name: str, dtype: torch.dtype | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        key: tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).cpu().contiguous()
        for key, tensor in tensors.items()
    }
    partial = folder / f"{name}.partial"
    save_file(stored, partial, metadata={"format": "pt"})
    partial.replace(folder / name)  # a cut while writing leaves no half file under the real name
    values["torch_dtype"] = str(next(t.dtype for t in stored.values() if t.is_floating_point())).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
