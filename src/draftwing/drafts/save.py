"""Write drafts as they are published: config.json and one file of tensors."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from draftwing.drafts.fit import Tensors


def write_draft(
    values: dict[str, Any], tensors: Tensors, folder: Path, name: str, dtype: torch.dtype | None = None
) -> None:
    """Write config.json and the file `name`; the weights in `dtype` (default: as they are)."""
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
