"""Quantising a target's linear layers while it is loaded, by torchao. Files that are quantised already need none of it.

int8 and float8 keep a weight in one byte, with a scale for each output row; int4 in half a byte, in groups of 128.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig, TorchAoConfig

from draftwing.config import QUANTIZATIONS


def quantization_config(name: str, device: torch.device) -> TorchAoConfig:
    """What transformers' `from_pretrained` takes as `quantization_config`.

    Raises:
        ValueError: an unknown name, torchao is not installed, or it has no kernels for this device.
    """
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantize: expected one of {', '.join(QUANTIZATIONS)}, got {name!r}")
    if name == "int4" and device.type != "cuda":
        raise ValueError(f"quantize: torchao has kernels for int4 on CUDA alone, and the device is {device}; try int8")
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError(f"quantize: needs torchao: pip install 'draftwing[quant]' ({error})") from None
    configs = {
        "int8": Int8WeightOnlyConfig,
        "int4": lambda: Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d"),  # the others need more packages
        "float8": Float8WeightOnlyConfig,
    }
    return TorchAoConfig(configs[name]())


def is_quantized_file(name: str, **options: Any) -> bool:
    """Whether a model's files say that they are quantised; `options` are those of `from_pretrained`.

    Raises:
        OSError: the model has no config that can be read.
    """
    values, _ = PreTrainedConfig.get_config_dict(name, **options)
    parts = (values, values.get("text_config") or {})
    return any(part.get(key) for part in parts for key in ("quantization_config", "compression_config"))
