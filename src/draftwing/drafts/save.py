"""Write drafts as they are published: config.json and one file of tensors."""

import json
from pathlib import Path
from typing import Any

import torch

from draftwing.drafts.fit import Tensors, dtype_name
from draftwing.files import save_tensors, write_text


def write_draft(
    values: dict[str, Any],
    tensors: Tensors,
    folder: Path,
    dtype: torch.dtype | None = None,
    name: str = "model.safetensors",
) -> None:
    """Write config.json and the file `name`; the weights in `dtype` (default: as they are)."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        key: tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).cpu()
        for key, tensor in tensors.items()
    }
    save_tensors(folder / name, stored)
    write_text(folder / "config.json", json.dumps(values | {"torch_dtype": dtype_name(stored)}, indent=2) + "\n")
