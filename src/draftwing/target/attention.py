"""The attention of targets and draft networks, under any mask: by SDPA, or by our own kernel on a GPU."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from shutil import which
from sysconfig import get_path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from draftwing.target.kv_cache import KVCache

FEW_QUERIES = 128
"""Nodes of a pass whose attention splits the context over a GPU; with more there is work for all of it anyway."""
LARGEST_KEY_BYTES = 256
"""Bytes of a key; the kernel's blocks of wider ones pass the shared memory of smaller GPUs."""


def grouped_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention that reads grouped key/value heads without copying them.

    queries `[B, Hq, N, dim]`, keys and values `[B, Hk, S, dim]`, mask `[B, 1, N, S]` (bool or additive), the same
    packed by `pack_mask`, or None (every key is visible, or the causal ones) -> `[B, Hq, N, value_dim]`.
    """
    batch_size, num_heads, num_queries, key_dim = queries.shape
    groups = num_heads // keys.shape[1]
    width = max(key_dim, values.shape[-1])
    if mask is not None and mask.dtype == torch.bool and has_kernel(queries.device, queries.dtype, num_queries, width):
        from draftwing.target.split_attention import split_attention

        return split_attention(queries, keys, values, mask, scale)
    if mask is not None and mask.shape[2] not in (1, groups * num_queries):
        mask = pack_mask(mask[:, :, :num_queries], groups)
    if groups == 1 or is_causal:
        return functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=scale, is_causal=is_causal, enable_gqa=groups > 1
        )
    # The query heads of one key/value head become further query rows of it.
    packed = queries.reshape(batch_size, keys.shape[1], groups * num_queries, queries.shape[-1])
    output = functional.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
    return output.reshape(batch_size, num_heads, num_queries, values.shape[-1])


@dataclass(frozen=True)
class CacheAttention:
    """How a pass attends to a cache: its nodes' keys and values are stored in `slots [B, N]`, and of each seat's first
    S slots they read those that `mask [B, 1, N, S]` shows, which `grouped_attention` may want packed. An `Attend`
    (layers.py)."""

    cache: KVCache
    slots: torch.Tensor
    mask: torch.Tensor

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        keys, values = self.cache.write(layer, keys, values, self.slots, num_read=self.mask.shape[-1])
        return grouped_attention(queries, keys, values, self.mask).transpose(1, 2)


def has_kernel(device: torch.device, dtype: torch.dtype, num_queries: int, width: int) -> bool:
    """Whether split_attention.py serves so many queries of a tree, with keys and values at most `width` wide."""
    return (
        device.type == "cuda"
        and num_queries <= FEW_QUERIES
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and width * dtype.itemsize <= LARGEST_KEY_BYTES
        and has_triton()
    )


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled: Triton comes with torch for CUDA; it wants a C compiler and Python's headers."""
    has_compiler = any(map(which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    return find_spec("triton") is not None and has_compiler and os.path.exists(f"{get_path('include')}/Python.h")


def kernels_take(tensor: torch.Tensor) -> bool:
    """Whether our kernels read a tensor: on a CUDA device, of numbers that they compute with."""
    return tensor.device.type == "cuda" and tensor.dtype != torch.float64 and has_triton()


def serves_row_kernels(device: torch.device) -> bool:
    """Whether a CUDA device multiplies as row_products.py does: NVIDIA's, of compute capability 8.0 or later."""
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def pack_mask(mask: torch.Tensor, groups: int) -> torch.Tensor:
    """A mask `[B, 1, N, S]` for `groups` query heads packed as rows of one key/value head: `[B, 1, groups * N, S]`.

    Callers with many layers pack once for all of them.
    """
    return torch.cat([mask] * groups, dim=2)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that models loaded by draftwing use, in the signature of transformers."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    dtype, query = query.dtype, query.to(key.dtype)
    if softcap is not None or s_aux is not None:
        output = _explicit_attention(query, key, value, attention_mask, scaling, softcap, s_aux)
    else:
        is_causal = is_causal and attention_mask is None and query.shape[2] > 1
        output = grouped_attention(query, key, value, attention_mask, scaling, is_causal)
    return output.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).contiguous(), None


def _explicit_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with capped scores (Gemma 2) or learned sinks (gpt-oss), which SDPA lacks."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        num_queries, num_keys = scores.shape[-2:]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=scores.device).tril(num_keys - num_queries)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:  # packed for grouped_attention: the first rows are one query head's
        scores = scores + mask[:, :, : scores.shape[2]]
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:3], 1)
        return torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1].to(value.dtype) @ value
    return scores.softmax(-1).to(value.dtype) @ value
