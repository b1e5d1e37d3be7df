"""Which kernels run a cycle's small steps, those beside its networks, in single calls.

The walk and the masks, which only C has, are chosen where they are written out, by `native.reads`.
"""

from types import ModuleType

import torch

from draftwing import native
from draftwing.target.attention import kernels_take


def kernels_for(numbers: torch.Tensor) -> ModuleType | None:
    """triton_cycle or native_cycle, if they compute with such numbers where these lie; None: torch's steps serve."""
    if kernels_take(numbers):
        from draftwing.engine import triton_cycle

        return triton_cycle
    if native.serves(numbers):
        from draftwing.engine import native_cycle

        return native_cycle
    return None
