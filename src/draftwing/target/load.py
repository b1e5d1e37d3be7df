"""Load targets, and the tokenizers that belong to them, from a folder, a GGUF file, a hub id or the embedded assets."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, TorchAoConfig

from draftwing.config import DTYPES, QUANTIZATIONS
from draftwing.embedded import EMBEDDED_TARGETS, embedded_target
from draftwing.target.gguf import dequantised, find_gguf
from draftwing.target.interface import ATTENTION, Role
from draftwing.target.model import TargetModel, one_line
from draftwing.target.packed import multiplies_bfloat16, multiplies_in_c, pack_linears

HUB_OPTIONS = ("cache_dir", "code_revision", "force_download", "local_files_only", "proxies") + (
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""What of `from_pretrained`'s options says where files come from and whether their code is run."""


def resolve_target(name: str | PathLike[str], role: str = "target") -> str:
    """A folder or hub id for the target `name`: one of EMBEDDED_TARGETS, a GGUF file, a folder (of one), a hub id.

    Raises:
        ValueError: a GGUF file that cannot be read, an embedded target that is not installed.
    """
    path = str(embedded_target(str(name)) if name in EMBEDDED_TARGETS else name)
    file = find_gguf(path, role)
    return path if file is None else str(dequantised(file, role))


def load_target(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    role: Role = "target",
    quantize: str | None = None,
    **options: Any,
) -> TargetModel:
    """Load a causal language model with our attention function. `options` go to transformers' `from_pretrained`.

    Without a `dtype` it is the file's; float32 on a CPU without bf16 products, for float16 files on a CPU, and with
    int8 of our own. `quantize` is one of QUANTIZATIONS. On a CPU with a C compiler int8 is our own, unless the `dtype`
    is another than float32; the rest is torchao's.

    Raises:
        ValueError: a name that cannot be loaded, missing tensors, a model that cannot verify trees. The message begins
            with the `role`. A quantisation that cannot be had.
    """
    return TargetModel(_load_on(torch.device(device), name, dtype, role, quantize, **options), role)


def empty_model(folder: str, role: Role = "target") -> TargetModel:
    """A causal language model without its weights: parameters can be counted, and what the cycle needs is checked.

    Raises:
        ValueError: no model can be made of its configuration, or it cannot be run over trees.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation=ATTENTION)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{role}: cannot make the model of {folder!r}: {one_line(error)}") from error
    return TargetModel(model.eval(), role=role)


def load_stock(
    name: str, dtype: torch.dtype, device: str | torch.device, quantize: str | None = None, **options: Any
) -> Any:
    """A causal language model as transformers runs it, to compare with; `options` are its `from_pretrained`'s.

    Raises:
        ValueError: a name that cannot be loaded.
    """
    return _load_on(torch.device(device), name, dtype, "model", quantize, attn_implementation=None, **options)


def _load_on(
    device: torch.device, name: str, dtype: torch.dtype | None, role: str, quantize: str | None, **options: Any
) -> Any:
    """A model on its device, or where a `device_map` in the options puts it; arguments as those of `load_target`."""
    lacks_bfloat16 = device.type == "cpu" and not multiplies_bfloat16()
    has_ours = multiplies_in_c(torch.float32, device) and "device_map" not in options
    is_our_int8 = quantize == "int8" and has_ours and dtype in (None, torch.float32)
    if is_our_int8:
        dtype = None  # as in the file until it is rounded
    elif quantize is not None:
        options["quantization_config"] = quantization_config(quantize, device)
        if dtype is None and lacks_bfloat16:
            dtype = torch.float32  # a quantised model cannot be converted
    try:
        is_quantized = is_quantized_file(resolve_target(name, role), **options) or "quantization_config" in options
    except OSError as error:
        reason = "cannot load" if Path(resolve_target(name, role)).is_dir() else "no folder and no reachable hub id:"
        raise ValueError(f"{role}: {reason} {name!r}: {one_line(error)}") from error
    if is_quantized and is_our_int8:
        raise ValueError(f"quantize: expected none, got {quantize!r}: {name!r} is quantised already")
    if is_quantized and device.type != "cpu":
        # Weights are packed for the device that they are on, and must not be moved. accelerate places them.
        options = {"device_map": str(device)} | options
    model = load_model(name, dtype, role, **options)
    if is_our_int8:
        return _in_int8(model)
    if is_quantized or "device_map" in options:
        return model
    is_slow = model.dtype == torch.float16 or (model.dtype == torch.bfloat16 and lacks_bfloat16)
    return model.float() if dtype is None and device.type == "cpu" and is_slow else model.to(device)


def _in_int8(model: Any) -> Any:
    """A model in float32 with products of 8 bits, rounded one by one: those in float32 are never all in memory.

    Raises:
        ValueError: some of its products cannot be.
    """
    pack_linears(model, rounded_in=torch.float32)
    if left := {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}:
        raise ValueError(
            f"quantize: int8 in float32 on a CPU is for plain linear layers, and {type(model).__name__} has "
            f"{', '.join(sorted(left))}; dtype bfloat16 takes torchao's"
        )
    return model.float()


def load_model(name: str, dtype: torch.dtype | None = None, role: str = "target", **options: Any) -> Any:
    """The transformers model of a target, where the `options` (`device_map`) put it; arguments as `load_target`'s.

    Raises:
        ValueError: a name that cannot be loaded, missing tensors.
    """
    options.setdefault("attn_implementation", ATTENTION)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            resolve_target(name, role), dtype=dtype or "auto", output_loading_info=True, **options
        )
    except (OSError, ImportError, TypeError) as error:  # no such model; a package that an option needs; no such option
        raise ValueError(f"{role}: cannot load {name!r}: {one_line(error)}") from error
    except ValueError as error:  # among others: a model of another kind, with a list of all that are of this one
        reason = one_line(error)
        if reason.startswith("Unrecognized configuration class"):
            reason = f"{_architecture(name, options)} is no causal language model that transformers loads as one"
        raise ValueError(f"{role}: cannot load {name!r}: {reason}") from error
    except KeyError as error:  # older modules pick their attention from a table of their own (Falcon, GPT-J)
        if error.args != (options["attn_implementation"],):
            raise
        raise ValueError(
            f"{role}: {name!r} does not know the attention {error}; pass attn_implementation='sdpa' or 'eager'"
        ) from error
    except RuntimeError as error:  # also raised for lack of memory
        if "mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{role}: the tensors of {name!r} have other shapes than its config.json says; is it a draft head?"
        ) from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random values
        raise ValueError(f"{role}: {name!r} lacks {len(missing)} tensors, the first is {missing[0]}")
    return model.eval()


def _architecture(name: str, options: Mapping[str, Any]) -> str:
    """What a model's config.json says that it is."""
    known = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    config = AutoConfig.from_pretrained(resolve_target(name), **known)
    return ", ".join(config.architectures or ()) or str(config.model_type)


def read_target_config(name: str) -> Any:
    """A target's configuration, from a folder (of which only config.json is read), the hub or its cache.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(resolve_target(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"target: cannot read the config of {name!r}: {one_line(error)}") from error


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer that belongs to a target. Of the model's `options` it takes HUB_OPTIONS.

    Raises:
        ValueError: it has none, or it cannot be loaded.
    """
    options = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_target(name), **options)
    except (OSError, ValueError, ImportError) as error:  # one written in Python may need a package
        needs_trust = "trust_remote_code" in str(error) and not options.get("trust_remote_code")
        hint = "; pass trust_remote_code=True to run it" if needs_trust else ""
        raise ValueError(f"target: no tokenizer in {name!r}: {one_line(error)}{hint}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one without files, from the config
        raise ValueError(f"target: no tokenizer in {name!r}")
    return tokenizer


def find_tokenizer(name: str) -> Any:
    """The tokenizer that lies beside a model, None if there is none."""
    try:
        return load_tokenizer(name)
    except (OSError, ValueError):  # transformers has no way to ask
        return None


def check_device(device: str | torch.device) -> None:
    """Raise a ValueError for a device that torch does not know or does not see."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {str(device)!r} is not available: {str(error).splitlines()[0]}") from None


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name; None stays None."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    known: torch.dtype = getattr(torch, dtype)
    return known


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
