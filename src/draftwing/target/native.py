"""native.c for tensors: a CPU's products and decoder layers in float32, without torch's operations in between.

The file is compiled once, by the machine's C compiler, into the user's cache. Where there is no compiler, or it fails,
`library()` is None, and torch's operations serve. A row's result has the same bits whatever passes with it.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from shutil import which
from typing import Any

import torch

from draftwing.files import cache_folder, whole_folder
from draftwing.target.kv_cache import KVCache

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
TRIED = (("-march=native", "-fopenmp"), ("-fopenmp",))
"""What is added, if the compiler takes it. Threads are those of the libgomp that torch has loaded."""
SWITCH = "DRAFTWING_NATIVE"
"""The variable that turns this off, with the value 0."""
LEAST_WORK = 1 << 17
"""Multiplications that are worth a thread of their own: they take longer than waiting for it."""
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""What weights may be kept in: their numbers in native.c."""

_size, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("panels", "scale", "bias")),
        *((name, _size) for name in ("inputs", "outputs", "kind")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Product) for name in ("queries_keys_values", "attention_output", "gate_up", "down")),
        *((name, _pointer) for name in ("heads_norm", "mlp_norm")),
        *((name, ctypes.c_float) for name in ("heads_eps", "mlp_eps")),
        *((name, _size) for name in ("heads", "key_heads", "dim")),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("cos", "signed_sin", "slots", "visible")),
        *(
            (name, _size)
            for name in ("batch_stride", "node_stride", "batch", "nodes", "turned", "read", "slots_per_seat")
        ),
        ("scratch", _pointer),
        ("threads", _size),
    ]


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "panel_width": (),
    "multiply": (_pointer, _size, *3 * (_pointer,), ctypes.c_int),
    "normalise": (_pointer, *4 * (_size,), _pointer, _size, ctypes.c_float, _pointer, ctypes.c_int),
    "draw": (_pointer, _pointer, _size, _size, _pointer, ctypes.c_int),
    "scratch_size": (_pointer, _size, _size, _size),
    "run_layer": 7 * (_pointer,),
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled file; None if there is no compiler, if what it makes does not load, or if it is turned off."""
    if os.environ.get(SWITCH) == "0" or os.name == "nt":
        return None
    compiler = next(filter(None, map(which, (os.environ.get("CC", "gcc"), "gcc", "cc", "clang"))), None)
    if compiler is None:
        logger.warning("there is no C compiler, so passes on this CPU take torch's operations, which are slower")
        return None
    reason = ""
    for added in TRIED:
        try:
            loaded = _load(compiler, (*FLAGS, *added))
        except (OSError, subprocess.SubprocessError) as error:
            reason = reason or str(getattr(error, "stderr", None) or error)
            continue
        for name, signature in SIGNATURES.items():
            getattr(loaded, name).argtypes, getattr(loaded, name).restype = signature, _size
        return loaded
    logger.warning("passes on this CPU take torch's operations, which are slower: %s: %.300s", compiler, reason)
    return None


def serves(tensor: torch.Tensor) -> bool:
    """Whether numbers like these are multiplied here."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and library() is not None


class Panels:
    """A product's weight `[outputs, inputs]` in native.c's layout, and its bias `[outputs]`.

    A float32 weight is kept in 16 bits where these hold it. An int8 one comes with the `scale [outputs]` of its sums.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None = None) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        width = _library().panel_width()
        self.kept_in = next(dtype for dtype in (torch.bfloat16, torch.float16, weight.dtype) if _holds(dtype, weight))
        missing = -self.num_outputs % width
        padded = torch.nn.functional.pad(weight.to(self.kept_in), (0, 0, 0, missing))
        panels = padded.view(-1, width, self.num_inputs).transpose(1, 2).contiguous()
        self._kept = panels, *(None if part is None else part.float().contiguous() for part in (scale, bias))
        addresses = map(_address, self._kept)
        self.struct = _Product(*addresses, self.num_inputs, self.num_outputs, KINDS[self.kept_in])

    def multiply(self, x: torch.Tensor, added: torch.Tensor | None = None, overwrite: bool = False) -> torch.Tensor:
        """`x [..., inputs] @ weight.T + bias`, plus `added [R, outputs]`, which it may `overwrite`.

        Raises:
            TypeError: they are not float32, or not on the CPU.
        """
        for read in (x, added):
            if read is not None and (read.dtype != torch.float32 or read.device.type != "cpu"):
                raise TypeError(f"expected float32 on the CPU, got {read.dtype} on {read.device}")
        rows = x.reshape(-1, self.num_inputs).contiguous()
        if added is not None and not added.is_contiguous():
            added, overwrite = added.contiguous(), False
        out = rows.new_empty(len(rows), self.num_outputs) if added is None or not overwrite else added
        work = len(rows) * self.num_inputs * self.num_outputs
        pointers = rows.data_ptr(), _address(added), out.data_ptr()
        _library().multiply(ctypes.byref(self.struct), len(rows), *pointers, _threads(work))
        return out.view(*x.shape[:-1], self.num_outputs)


class NativeLayer:
    """A decoder layer as native.c runs it.

    Its panels are those of queries, keys and values, of the attention's output, of gate and up, and of the MLP's
    output. Norms are pairs of a weight and an epsilon.
    """

    def __init__(
        self,
        panels: Sequence[Panels],
        heads_norm: tuple[torch.Tensor, float] | None,
        mlp_norm: tuple[torch.Tensor, float],
        num_heads: int,
        num_key_heads: int,
    ) -> None:
        self._kept = panels, heads_norm, mlp_norm
        self._num_weights = sum(part.num_outputs * part.num_inputs for part in panels)
        dim = panels[0].num_outputs // (num_heads + 2 * num_key_heads)
        heads, heads_eps = heads_norm or (None, 0.0)
        structs = (part.struct for part in panels)
        self._struct = _Layer(
            *structs, _address(heads), mlp_norm[0].data_ptr(), heads_eps, mlp_norm[1], num_heads, num_key_heads, dim
        )

    def threads(self, num_rows: int) -> int:
        """How many threads share a pass over so many rows."""
        return _threads(num_rows * self._num_weights)

    def scratch_size(self, num_rows: int, num_read: int, threads: int) -> int:
        """Numbers of room for a pass over so many rows that read so many slots of each seat."""
        size: int = _library().scratch_size(ctypes.byref(self._struct), num_rows, num_read, threads)
        return size

    def run(
        self, nodes: "NativePass", index: int, residual: torch.Tensor, inputs: torch.Tensor, overwrite: bool
    ) -> torch.Tensor:
        """The output `[R, D]` of layer `index` from its residual, which it may `overwrite`, and normed inputs."""
        if not residual.is_contiguous():
            residual, overwrite = residual.contiguous(), False
        inputs = inputs.contiguous()
        out = residual if overwrite else torch.empty_like(residual)
        tensors = (*nodes.cache.layer(index), residual, inputs, out)
        pointers = [tensor.data_ptr() for tensor in tensors]
        _library().run_layer(ctypes.byref(self._struct), nodes.struct(self), *pointers)
        return out


class NativePass:
    """What the layers of a pass share: rotations `[R, 1, turned]`, and the cache, in whose `slots [B, N]` keys and
    values are written, and of whose first S slots of each seat the nodes read the `visible [B, N, S]` ones."""

    def __init__(
        self, cos: torch.Tensor, signed_sin: torch.Tensor, cache: KVCache, slots: torch.Tensor, visible: torch.Tensor
    ) -> None:
        self.cache = cache
        visible = visible if visible.stride(-1) == 1 else visible.contiguous()
        cos, signed_sin, slots = (tensor.contiguous() for tensor in (cos, signed_sin, slots))
        self._kept, self._scratch = (cos, signed_sin, slots, visible), torch.empty(0)
        self._struct = _Pass(
            *(tensor.data_ptr() for tensor in self._kept),
            *visible.stride()[:2],
            *slots.shape,
            cos.shape[-1],
            visible.shape[-1],
            cache.num_slots,
        )

    def struct(self, layer: NativeLayer) -> Any:
        """For this layer, whose sizes may be others than the last one's."""
        num_rows = self._struct.batch * self._struct.nodes
        self._struct.threads = threads = layer.threads(num_rows)
        size = layer.scratch_size(num_rows, self._struct.read, threads)
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=torch.float32)
            self._struct.scratch = self._scratch.data_ptr()
        return ctypes.byref(self._struct)


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """As fused.py's, of `x [R, D]` or `[R, H, dim]`."""
    heads, dim = (1, x.shape[1]) if x.dim() == 2 else x.shape[1:]
    out = x.new_empty(x.shape)
    weight_stride = dim if weight.dim() == 2 else 0
    sizes = x.stride(0), len(x), heads, dim
    pointers = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    _library().normalise(pointers[0], *sizes, pointers[1], weight_stride, eps.item(), pointers[2], _threads(x.numel()))
    return out


def draw(first: torch.Tensor, second: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform numbers `[P, count]` by two keys `[P, 1]` for each row; noise.py writes them out."""
    out = torch.empty(len(first), count, dtype=torch.float32)
    _library().draw(first.data_ptr(), second.data_ptr(), *out.shape, out.data_ptr(), _threads(16 * out.numel()))
    return out


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def _threads(work: int) -> int:
    """Of torch's threads as many as have enough to do."""
    return max(1, min(torch.get_num_threads(), work // LEAST_WORK))


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _holds(dtype: torch.dtype, weight: torch.Tensor) -> bool:
    return dtype == weight.dtype or (
        weight.is_floating_point() and torch.equal(weight.to(dtype).to(weight.dtype), weight)
    )


def _load(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library, from the cache or compiled now, and kept there if that can be written.

    Raises:
        OSError, subprocess.SubprocessError: the compiler failed, or what it made does not load.
    """
    machine = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    parts = SOURCE.read_text("utf-8"), os.path.realpath(compiler), *flags, machine
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    with suppress(OSError, RuntimeError):  # not compiled yet; no home, and so no cache
        return ctypes.CDLL(str(cache_folder() / "native" / name / "native.so"))
    with tempfile.TemporaryDirectory() as folder:
        compiled, linked = f"{folder}/native.o", f"{folder}/native.so"
        # Linked without -fopenmp: it finds torch's libgomp, where it would else load one with threads of its own.
        for command in ((*flags, "-c", str(SOURCE), "-o", compiled), ("-shared", compiled, "-o", linked)):
            subprocess.run((compiler, *command), check=True, capture_output=True, text=True, timeout=120)
        loaded = ctypes.CDLL(linked)
        with suppress(OSError, RuntimeError), whole_folder(cache_folder() / "native" / name) as kept:
            shutil.copy(linked, kept / "native.so")
    return loaded
