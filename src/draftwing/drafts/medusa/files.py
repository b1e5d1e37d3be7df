"""The published format of Medusa heads, translated to ours and back in this file only.

Head i holds residual blocks i.j.linear, then the output matrix i.L.weight; config.json is three lines. vLLM has names
of its own for the same tensors, and leaves out without a word what it does not know: `to_vllm`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftwing.drafts.fit import TargetSizes, Tensors
from draftwing.drafts.medusa.network import MedusaConfig, MedusaModel
from draftwing.drafts.save import write_draft

MEDUSA_TENSOR = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)$")
VLLM_TENSOR = re.compile(r"(?:blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)|lm_heads\.(\d+)\.weight)$")


@dataclass(frozen=True)
class MedusaHeads:
    """A file of Medusa heads in our terms; `tensors` are named as the network's parameters."""

    config: MedusaConfig
    tensors: Tensors


def to_vllm(heads: MedusaHeads) -> tuple[dict[str, Any], Tensors]:
    """The config.json and tensors of Medusa heads as vLLM names them."""
    config = heads.config
    values = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "medusa_fc_bias": True,
    }
    tensors: Tensors = {}
    for name, tensor in heads.tensors.items():
        head, block, kind = name.split(".", 2)
        is_output = kind == "weight"
        renamed = f"lm_heads.{head}.weight" if is_output else f"blocks.{head}.layers.{block}.{kind.split('.')[1]}"
        tensors[renamed] = tensor
    return values, tensors


def _from_vllm(tensors: Tensors) -> Tensors:
    """Tensors under the published names; those of others are left as they are."""
    blocks = [int(match[2]) for name in tensors if (match := VLLM_TENSOR.match(name)) and match[2]]
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        match = VLLM_TENSOR.match(name)
        if match is None:
            renamed[name] = tensor
        elif match[4]:
            renamed[f"{match[4]}.{max(blocks, default=-1) + 1}.weight"] = tensor
        else:
            renamed[f"{match[1]}.{match[2]}.linear.{match[3]}"] = tensor
    return renamed


def is_medusa(values: Mapping[str, Any], tensors: Tensors) -> bool:
    """Whether files hold Medusa heads."""
    names = _from_vllm(tensors)
    return "medusa_num_heads" in values or (bool(names) and all(map(MEDUSA_TENSOR.match, names)))


def read_medusa(values: Mapping[str, Any], tensors: Tensors) -> MedusaHeads:
    """Translate Medusa heads. They are counted in the tensors: published configurations name fewer than there are.

    Raises:
        ValueError: a tensor that the format does not have, or lacks.
    """
    renamed, heads, blocks = {}, set(), set()
    for name, tensor in _from_vllm(tensors).items():
        match = MEDUSA_TENSOR.match(name)
        if match is None:
            raise ValueError(f"{name}: unknown tensor of shape {tuple(tensor.shape)}; Medusa heads have none")
        renamed[name.removeprefix("medusa_head.")] = tensor
        heads.add(int(match[1]))
        if match[3] == "linear.weight":
            blocks.add(int(match[2]))
    output = renamed.get(f"0.{len(blocks)}.weight")
    if output is None or output.ndim != 2:
        raise ValueError(f"0.{len(blocks)}.weight: missing; head 0 needs an output matrix [vocabulary, hidden size]")
    vocab_size, hidden_size = output.shape
    return MedusaHeads(MedusaConfig(hidden_size, vocab_size, max(heads) + 1, len(blocks)), renamed)


def save_medusa(heads: MedusaHeads, folder: Path, target_name: str, dtype: torch.dtype | None = None) -> None:
    """Write config.json and medusa_lm_head.safetensors; the weights in `dtype` (default: as they are)."""
    values = {
        "medusa_num_heads": heads.config.num_heads,
        "medusa_num_layers": heads.config.num_layers,
        "base_model_name_or_path": target_name,
    }
    write_draft(values, heads.tensors, folder, dtype, "medusa_lm_head.safetensors")


def expected_medusa_shapes(config: MedusaConfig) -> dict[str, torch.Size]:
    """The parameters of Medusa heads."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in MedusaModel(config).named_parameters()}


def medusa_problems(config: MedusaConfig, target: TargetSizes) -> list[str]:
    """One sentence for each way in which Medusa heads do not fit their target."""
    problems = []
    if config.hidden_size != target.hidden_size:
        problems.append(
            f"hidden_size: the heads read features of width {config.hidden_size}, the target's have "
            f"{target.hidden_size}"
        )
    if config.vocab_size != target.vocab_size:
        problems.append(
            f"vocab_size: the heads were made for {config.vocab_size} tokens, the target has {target.vocab_size}"
        )
    return problems
