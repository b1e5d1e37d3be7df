"""What a CPU computes in C, without torch's operations in between: layers.c, and the rest of a cycle, cycle.c.

The files are compiled once, by the machine's C compiler, into the user's cache. Where there is no compiler, or it
fails, `library()` is None, and torch's operations serve. A row's result has the same bits whatever passes with it.
target/native_layers.py and engine/native_cycle.py call them.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from shutil import which
from typing import Any

import torch

from draftwing.files import cache_folder, whole_folder

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-psabi")
TRIED = (("-march=native", "-fopenmp"), ("-fopenmp",))
"""What is added, if the compiler takes it. Threads are those of the libgomp that torch has loaded."""
SWITCH = "DRAFTWING_NATIVE"
"""The variable that turns this off, with the value 0."""
LEAST_WORK = 1 << 17
"""Multiplications that are worth a thread of their own: they take longer than waiting for it."""

size, pointer = ctypes.c_int64, ctypes.c_void_p
"""What the files' structures and functions take."""
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "panel_width": (),
    "multiply": (pointer, size, *3 * (pointer,), ctypes.c_int),
    "normalise": (pointer, *4 * (size,), pointer, size, ctypes.c_float, pointer, ctypes.c_int),
    "scratch_size": (pointer, *4 * (size,)),
    "run_layers": (pointer, size, *5 * (pointer,)),
    "run_draft": 8 * (pointer,),
    "read_out": (*2 * (pointer,), size, *3 * (pointer,), ctypes.c_int),
    "draw": (pointer, pointer, size, size, pointer, ctypes.c_int),
    "top_tokens": (pointer, *3 * (size,), *2 * (pointer,), ctypes.c_float, size, *2 * (pointer,), ctypes.c_int),
    "choose_tokens": (pointer, *3 * (size,), *2 * (pointer,), ctypes.c_int),
    "grow_level": (
        *2 * (pointer,), *3 * (size,), *3 * (pointer,), size, pointer, ctypes.c_float, *2 * (size,), *2 * (pointer,)
    ),
    "inherit_slots": (pointer, *3 * (size,), *2 * (pointer,), *3 * (size,), pointer),
    "best_nodes": (*2 * (pointer,), *2 * (size,), pointer),
    "ancestors": (pointer, *2 * (size,), pointer),
    "visible_slots": (*2 * (pointer,), *4 * (size,), pointer),
    "walk": (*5 * (pointer,), *3 * (size,), *4 * (pointer,)),
}  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled files; None if there is no compiler, if what it makes does not load, or if it is turned off."""
    if os.environ.get(SWITCH) == "0" or os.name == "nt":
        return None
    compiler = next(filter(None, map(which, (os.environ.get("CC", "gcc"), "gcc", "cc", "clang"))), None)
    if compiler is None:
        logger.warning("there is no C compiler, so passes on this CPU take torch's operations, which are slower")
        return None
    reason = ""
    for added in TRIED:
        try:
            found = _load(compiler, (*FLAGS, *added))
        except (OSError, subprocess.SubprocessError) as error:
            reason = reason or str(getattr(error, "stderr", None) or error)
            continue
        for name, signature in SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = signature, size  # which those that return nothing leave open
        return found
    logger.warning("passes on this CPU take torch's operations, which are slower: %s: %.300s", compiler, reason)
    return None


def serves(tensor: torch.Tensor) -> bool:
    """Whether numbers like these are computed with here."""
    return tensor.dtype == torch.float32 and reads(tensor)


def reads(tensor: torch.Tensor) -> bool:
    """Whether token ids, or what else is no float, are read here."""
    return tensor.device.type == "cpu" and library() is not None


def visible_slots(lengths: torch.Tensor, ancestors: torch.Tensor, num_read: int) -> torch.Tensor:
    """As kv_cache.visible_slots."""
    lengths, ancestors = lengths.contiguous(), ancestors.contiguous()
    visible = ancestors.new_empty(*ancestors.shape[:2], num_read)
    sizes = *ancestors.shape, num_read
    loaded().visible_slots(lengths.data_ptr(), ancestors.data_ptr(), *sizes, visible.data_ptr())
    return visible


def loaded() -> ctypes.CDLL:
    """The library, where it is known to be there."""
    found = library()
    assert found is not None
    return found


def threads(work: int) -> int:
    """Of torch's threads as many as have enough to do."""
    return max(1, min(torch.get_num_threads(), work // LEAST_WORK))


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _load(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library, from the cache or compiled now, and kept there if that can be written.

    Raises:
        OSError, subprocess.SubprocessError: the compiler failed, or what it made does not load.
    """
    sources = sorted((*FOLDER.glob("*.h"), *FOLDER.glob("*.c")))
    machine = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    parts = *(source.read_text("utf-8") for source in sources), os.path.realpath(compiler), *flags, machine
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    with suppress(OSError, RuntimeError):  # not compiled yet; no home, and so no cache
        return ctypes.CDLL(str(cache_folder() / "native" / name / "native.so"))
    with tempfile.TemporaryDirectory() as folder:
        objects, linked = [], f"{folder}/native.so"
        for source in (source for source in sources if source.suffix == ".c"):
            objects.append(f"{folder}/{source.stem}.o")
            _run(compiler, *flags, "-c", str(source), "-o", objects[-1])
        # Linked without -fopenmp: it finds torch's libgomp, where it would else load one with threads of its own.
        _run(compiler, "-shared", *objects, "-o", linked, "-lm")
        compiled = ctypes.CDLL(linked)
        with suppress(OSError, RuntimeError), whole_folder(cache_folder() / "native" / name) as kept:
            shutil.copy(linked, kept / "native.so")
    return compiled


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
