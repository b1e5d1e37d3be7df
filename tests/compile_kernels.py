"""Compile the row pass's kernels for an NVIDIA GPU that need not be there; prints what each takes, as JSON.

    python tests/compile_kernels.py CAPABILITY SHARED_BYTES

The pass's own functions run on tensors without storage, at the shapes of an 8B model; launches are compiled instead.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from draftwing.target import row_attention, row_products
from draftwing.target.row_layout import TAIL, Places, RowNorm, RowProduct, Tiles, part_starts

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
HIDDEN, INNER, HEADS, KEY_HEADS, DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256


class Compiled:
    """Stands for a kernel: a launch compiles it for the arguments, each kind of arguments once."""

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self._kernel, self._target = kernel, target
        self.results: dict[str, dict[str, Any]] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **named: Any) -> None:
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
    capability, shared_bytes = map(int, sys.argv[1:])
    target = GPUTarget("cuda", capability, 32)
    compiled = []
    for module in (row_products, row_attention):
        module.shared_bytes = lambda device: shared_bytes
        for name, part in list(vars(module).items()):
            if isinstance(part, triton.runtime.JITFunction):
                compiled.append(Compiled(part, target))
                setattr(module, name, compiled[-1])
    for num_nodes in (1, 128):
        run_layer(num_nodes, has_options=False)
    run_layer(16, has_options=True)
    print(json.dumps([result for kernel in compiled for result in kernel.results.values()]))


def run_layer(num_nodes: int, has_options: bool) -> None:
    """A layer and the output head; with a bias on each product and a norm on each head, if `has_options`."""
    empty = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    ints = partial(torch.empty, device="meta", dtype=torch.int32)

    def product(num_outputs: int, num_inputs: int, most_splits: int = 4) -> RowProduct:
        bias = empty(num_outputs) if has_options else None
        return RowProduct(empty(num_outputs, num_inputs), bias, Tiles.of(num_outputs, num_inputs, most_splits))

    x, norm = empty(num_nodes, HIDDEN), RowNorm(empty(HIDDEN), 1e-5)
    heads_norm = RowNorm(empty(HEADS + KEY_HEADS, DIM), 1e-5) if has_options else None
    rows, starts = (ints(num_nodes) for _ in range(4)), ints(len(part_starts(1024)))
    places = Places(num_nodes, *rows, ints(num_nodes, TAIL), starts)
    keys, values = empty(2048, KEY_HEADS, DIM), empty(2048, KEY_HEADS, DIM)
    tables = empty(2048, DIM // 2), empty(2048, DIM // 2)
    qkv, output = product((HEADS + 2 * KEY_HEADS) * DIM, HIDDEN), product(HIDDEN, HIDDEN)
    inputs = row_products.normalise(x, norm)
    sums = row_products.multiply_split(inputs, qkv)
    queries = row_attention.rotate_and_store(sums, qkv.bias, heads_norm, *tables, keys, values, places)
    attended = row_attention.attend(queries, keys, values, places, 1.0)
    x, inputs = row_products.add_splits(x, row_products.multiply_split(attended, output), output.bias, norm)
    gated = row_products.multiply_gated(inputs, product(2 * INNER, HIDDEN, 1))
    row_products.add_splits(x, row_products.multiply_split(gated, product(HIDDEN, INNER)), None, norm)
    row_products.multiply(inputs, product(VOCAB, HIDDEN, 1))


if __name__ == "__main__":
    main()
