"""A stand-in for CUDA graphs on a CPU: a tape of operations, to be replayed with the storage that they had."""

from collections.abc import Callable
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from draftwing import native
from draftwing.engine.captured import Recorded

HOST_OPERATIONS = (
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,  # masks as indices
    torch.ops.aten.lift_fresh.default,  # torch.tensor(...): on a GPU a copy from the host
)


class Tape(TorchDispatchMode):
    """Operations with the tensors that they were called with.

    As on a GPU, C computes nothing meanwhile: the models must not be packed for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __enter__(self) -> Self:
        self._without_c = patch.object(native, "library", lambda: None)
        self._without_c.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._without_c.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_OPERATIONS:
            raise RuntimeError(f"a step turns to the host: {func}")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    @torch.inference_mode()
    def replay(self) -> None:
        """Run every operation again on the same storage; no line of Python between them runs."""
        for func, args, kwargs, output in self.calls:
            if "empty" in str(func):
                continue
            for old, new in zip(tree_leaves(output), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """What a CudaRecorder does, on a CPU: a replay is the same operations at the same addresses and nothing else."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def warm_up(self, steps: Callable[[], None]) -> None:
        steps()

    def record(self, step: Callable[[], Any]) -> Recorded[Any]:
        self.num_recorded += 1
        tape = Tape()
        with tape:
            result = step()
        return Recorded(result, tape.replay)

    def forget(self) -> None:
        """Each tape has memory of its own."""
