"""Compile our kernels for an NVIDIA GPU that need not be there; prints what each takes, as JSON.

    python tests/compile_kernels.py CAPABILITY SHARED_BYTES usual|other

The pass itself runs on tensors without storage, at the shapes of an 8B model (usual: one node, and most; other: the
row tiles between, and a tiny model in float16 whose sizes no tile divides); its launches are compiled instead, and
those of a draft's level.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from draftwing.drafts.growth import FusedLevels
from draftwing.engine import triton_cycle
from draftwing.engine.noise import KeptNoise
from draftwing.engine.tree_plan import TreePlan
from draftwing.plans.acceptance import CalibratedSize
from draftwing.target import packed, row_attention, row_products
from draftwing.target.interface import ATTENTION
from draftwing.target.row_layout import RowProduct, Tiles
from draftwing.target.row_pass import RowTarget

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
TINY = SIZES | {
    "hidden_size": 200,
    "intermediate_size": 344,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "vocab_size": 1001,
}


class Compiled:
    """What stands for launches of a kernel: it is compiled for the arguments, each kind of arguments once."""

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self._kernel, self._target = kernel, target
        self.results: dict[str, dict[str, Any]] = {}

    def launch(self, *arguments: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        values = dict(zip(self._kernel.arg_names, arguments, strict=False)) | named
        fixed = {name: value for name, value in values.items() if value is None or name in named}
        types = {name: "constexpr" if name in fixed else _type(value) for name, value in values.items()}
        aligned = [name for name in values if name not in fixed and self._is_aligned(name, values[name])]
        key = repr((types, fixed, aligned, options))
        if key in self.results:
            return
        index = self._kernel.arg_names.index
        source = ASTSource(
            self._kernel,
            types,
            {(index(name),): value for name, value in fixed.items()},
            {(index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        kernel = triton.compile(source, target=self._target, options=options)
        metadata, ptx = kernel.metadata, str(kernel.asm["ptx"])
        self.results[key] = {
            "name": self._kernel.__name__,
            "shared_bytes": metadata.shared,
            "registers": _registers(kernel.asm["cubin"]),
            "products": sorted(set(re.findall(r"wgmma\.mma_async\S*|mma\.sync\S*|tcgen05\.mma\S*", ptx))),
            "options": options,
            "fixed": fixed,
        }

    def _is_aligned(self, name: str, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return True
        parameter = self._kernel.params[self._kernel.arg_names.index(name)]
        return isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize


def _registers(binary: bytes) -> dict[str, int]:
    """What a thread takes, by Triton's cuobjdump: registers, and bytes of local memory where those do not suffice."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def main() -> None:
    capability, shared_bytes = map(int, sys.argv[1:3])
    target = GPUTarget("cuda", capability, 32)
    compiled: dict[str, Compiled] = {}
    row_products.shared_bytes = row_attention.shared_bytes = lambda device: shared_bytes

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        return compiled.setdefault(kernel.__name__, Compiled(kernel, target)).launch

    triton.runtime.JITFunction.__getitem__ = launcher
    is_usual = sys.argv[3] == "usual"
    for num_nodes in (1, 128) if is_usual else (32, 64, 128):
        run_pass(meta_model(LlamaConfig(**SIZES)), num_nodes)
    if is_usual:
        run_pass(meta_model(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)), 16)
        run_pass(meta_model(Qwen3Config(**SIZES)), 16)
    else:
        run_pass(meta_model(LlamaConfig(**TINY), torch.float16), 16)
    run_draft_products()
    run_draft()
    print(json.dumps([result for kernel in compiled.values() for result in kernel.results.values()]))


def run_draft() -> None:
    """A draft's steps besides its network, and the target's choice."""
    with torch.device("meta"):
        logits, ids = torch.empty(1, 10, 32000, dtype=torch.bfloat16), torch.empty(32000, dtype=torch.int64)
        roots = torch.zeros(1, 1, dtype=torch.int64)
        noise = KeptNoise(torch.empty(1, 64, 128256), roots, torch.empty(1))
        learnt = CalibratedSize(torch.device("meta"))
        visible, parents = torch.zeros(1, 10, 1100, dtype=torch.bool), torch.zeros(1, 10, dtype=torch.int64)
        many = torch.empty(1, 60, 128256, dtype=torch.bfloat16), replace(noise, positions=roots.expand(1, 60))
    triton_cycle.top_tokens(logits, 10)
    triton_cycle.top_tokens(logits, 10, noise, ids, 0.8)
    plans = TreePlan(10, 8, 60, sizing=learnt), TreePlan(triton_cycle.MOST_WIDTH, 3, 60)
    for plan, target_ids in zip(plans, (ids, None), strict=True):
        levels = FusedLevels(triton_cycle, plan, target_ids, roots)
        for count in (1, plan.width):
            found = torch.empty(1, count, plan.width, device="meta")
            levels.frontier = levels.add(found, found.long())
        triton_cycle.best_nodes(roots[:, 0], levels.candidates(), 60, plan.depth)
    triton_cycle.inherit_slots(visible, parents, roots, 0)
    triton_cycle.choose_tokens(*many)
    triton_cycle.choose_tokens(many[0], None)


@torch.inference_mode()
def run_pass(model: PreTrainedModel, num_nodes: int) -> None:
    """One pass over a tree of so many nodes behind a thousand tokens."""
    target = RowTarget(model)
    cache = target.new_cache(1, 1024)
    cache.bound = 1000
    tokens = torch.zeros(1, num_nodes, dtype=torch.int64, device="meta")
    ancestors = torch.ones(1, num_nodes, num_nodes, dtype=torch.bool, device="meta")
    target.forward_tree(tokens, tokens, ancestors, cache)


def run_draft_products() -> None:
    """A draft head's in 8 bits, of an 8B model: its output head, and its products whatever their splits."""
    for num_outputs, num_inputs in ((32000, 4096), (6144, 8192)):
        weight = torch.empty(num_outputs, num_inputs, dtype=torch.int8, device="meta")
        scale = torch.empty(num_outputs, device="meta")
        product = RowProduct(weight, None, Tiles.of(num_outputs, num_inputs, most_splits=1), scale)
        for num_rows in (10, 128):
            row_products.multiply(torch.empty(num_rows, num_inputs, dtype=torch.bfloat16, device="meta"), product)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model without storage, of packed products."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=dtype).eval()
    with patch.object(packed, "_can_pack", lambda layer: True):
        packed.pack_linears(model)
    return model


if __name__ == "__main__":
    main()
