"""Training-time test (EAGLE-3, arXiv 2503.01840, section 3.2): the head trained on its own outputs, step after step.

At step j, slot t holds the head's output of step j - 1 at the same slot, reads token x_{t+1+j} and predicts
x_{t+2+j}. Its attention sees what drafting from slot t would see: the step-0 keys of slots <= t of its document, which
are made from true features, and its own key of each later step.

    step  hidden at slot t          token      position  predicts   keys
    0     fused target features     x_{t+1}    t         x_{t+2}    step 0, slots <= t
    1     output of step 0, slot t  x_{t+2}    t + 1     x_{t+3}    those, and step 1, slot t
    2     output of step 1, slot t  x_{t+3}    t + 2     x_{t+4}    those, and step 2, slot t
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from draftwing.losses.slot_losses import widen

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one step, each `[B, Hk, S, dim]`."""


class TttAttention:
    """The attention of all steps for one batch: an `Attend` that remembers earlier steps' keys and values.

    No scores are kept for the backward pass. Those of step-0 keys are computed blockwise by a kernel that also returns
    their logsumexp, with which the few scores of later steps are merged. `document_ids [B, S]` keeps documents apart.
    """

    def __init__(self, document_ids: torch.Tensor | None = None) -> None:
        self._documents = document_ids
        self._past: dict[int, list[KeyValue]] = {}
        self._mask: Any = None

    @torch.compiler.disable  # it differs from step to step; a compiled layer runs up to it and on from it
    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """queries `[B, Hq, S, dim]`, keys and values `[B, Hk, S, dim]` of this step -> `[B, S, Hq, dim]`."""
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)  # autocast rotates them in float32
        past = self._past.setdefault(layer, [])
        past.append((keys, values))
        first, own = past[0], past[1:]
        if queries.device.type == "cpu":
            if self._mask is None and self._documents is not None:
                self._mask = additive_mask(self._documents, queries.dtype)
            flat = [x for step in own for x in step]
            output: torch.Tensor = _MergedAttention.apply(self._mask, queries, *first, *flat)  # type: ignore[no-untyped-call]
        else:
            if self._mask is None:
                self._mask = block_mask(self._documents, queries.shape[2], queries.device)
            output = flex_merged_attention(queries, first, own, self._mask, _compiled_flex_attention())
        return output.transpose(1, 2)


class _MergedAttention(torch.autograd.Function):
    """Flash attention over the step-0 keys, merged with each query's own keys of later steps, on a CPU.

    The kernel's backward pass recomputes a key's weight as exp(score - logsumexp) and needs rowsum(gradient * output).
    Given the merged logsumexp and the merged output, what it returns for the step-0 keys is right for the whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mask: torch.Tensor | None,
        queries: torch.Tensor,
        first_keys: torch.Tensor,
        first_values: torch.Tensor,
        *own: torch.Tensor,
    ) -> torch.Tensor:
        output: torch.Tensor
        output, log_total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, first_keys, first_values, 0.0, mask is None, attn_mask=mask
        )
        if own:
            output, log_total = _merge(output, log_total, queries, _pairs(own))
        ctx.mask = mask
        ctx.save_for_backward(queries, first_keys, first_values, output, log_total, *own)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, first_keys, first_values, output, log_total, *own = ctx.saved_tensors
        of_queries, *of_first = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, queries, first_keys, first_values, output, log_total, 0.0, ctx.mask is None, attn_mask=ctx.mask
        )
        if own:
            more, of_own = _own_gradients(gradient, queries, output, log_total, _pairs(own))
            of_queries = (widen(of_queries) + more).to(of_queries.dtype)
        return None, of_queries, *of_first, *(of_own if own else ())


class _Merge(torch.autograd.Function):
    """Attention's output and logsumexp over the step-0 keys, merged with each query's own keys of later steps."""

    @staticmethod
    def forward(
        ctx: Any, first: torch.Tensor, first_total: torch.Tensor, queries: torch.Tensor, *own: torch.Tensor
    ) -> torch.Tensor:
        output, log_total = _merge(first, first_total, queries, _pairs(own))
        ctx.save_for_backward(first, first_total, queries, output, log_total, *own)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, first_total, queries, output, log_total, *own = ctx.saved_tensors
        of_queries, of_own = _own_gradients(gradient, queries, output, log_total, _pairs(own))
        share = (first_total - log_total).exp()
        of_total = share * (widen(gradient) * (widen(first) - output)).sum(-1)
        return (share[..., None] * gradient).to(first.dtype), of_total, of_queries.to(queries.dtype), *of_own


def flex_merged_attention(
    queries: torch.Tensor, first: KeyValue, own: Sequence[KeyValue], mask: Any, attend: Any
) -> torch.Tensor:
    """The same by flex attention (`attend`), whose logsumexp has a gradient."""
    output: torch.Tensor
    output, aux = attend(queries, *first, block_mask=mask, enable_gqa=True, return_aux=flex.AuxRequest(lse=True))
    if own:
        output = _Merge.apply(output, aux.lse, queries, *(x for step in own for x in step))  # type: ignore[no-untyped-call]
    return output


def additive_mask(document_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 at the slots that a slot reads, the earlier ones of its document and itself, -inf elsewhere; `[B, 1, S, S]`."""
    visible = (document_ids[:, :, None] == document_ids[:, None, :]).tril()
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf).unsqueeze(1)


def shift_left(x: torch.Tensor, steps: int) -> torch.Tensor:
    """`x[:, t + steps]` at t, zero (False) past the end; `[B, S, ...]`."""
    if steps == 0:
        return x
    return torch.cat((x[:, steps:], torch.zeros_like(x[:, :steps])), dim=1)


def _merge(
    output: torch.Tensor, log_total: torch.Tensor, queries: torch.Tensor, own: Sequence[KeyValue]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention's output `[B, Hq, S, dim]` and logsumexp `[B, Hq, S]` with each query's own keys added."""
    scores = _own_scores(queries, [keys for keys, _ in own])
    merged = torch.cat((log_total[..., None], scores), dim=-1).logsumexp(-1)
    groups = queries.shape[1] // own[0][0].shape[1]
    result = (log_total - merged).exp()[..., None] * output
    for weight, (_, values) in zip((scores - merged[..., None]).exp().unbind(-1), own, strict=True):
        result = result + weight[..., None] * _per_query(values, groups)
    return result.to(output.dtype), merged


def _own_gradients(
    gradient: torch.Tensor,
    queries: torch.Tensor,
    output: torch.Tensor,
    log_total: torch.Tensor,
    own: Sequence[KeyValue],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a query's own keys add to its gradient, and the gradients of these keys and values, in turn."""
    groups = queries.shape[1] // own[0][0].shape[1]
    gradient, queries, scale = widen(gradient), widen(queries), 1 / math.sqrt(queries.shape[-1])
    weights = (_own_scores(queries, [keys for keys, _ in own]) - log_total[..., None]).exp()
    shared = (gradient * output).sum(-1)
    of_queries, of_own = torch.zeros_like(queries), []
    for (keys, values), weight in zip(own, weights.unbind(-1), strict=True):
        of_score = weight * ((gradient * _per_query(values, groups)).sum(-1) - shared) * scale
        of_queries += of_score[..., None] * _per_query(keys, groups)
        for factor, x in ((of_score, queries), (weight, gradient)):
            of_own.append((factor[..., None] * x).unflatten(1, (-1, groups)).sum(2).to(keys.dtype))
    return of_queries, of_own


def _own_scores(queries: torch.Tensor, own: Sequence[torch.Tensor]) -> torch.Tensor:
    """Scaled products of queries `[B, Hq, S, dim]` with the n keys of the same slot: `[B, Hq, S, n]`."""
    groups, queries = queries.shape[1] // own[0].shape[1], widen(queries)
    products = [(queries * _per_query(keys, groups)).sum(-1) for keys in own]
    return torch.stack(products, dim=-1) / math.sqrt(queries.shape[-1])


def _per_query(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Keys or values `[B, Hk, S, dim]` for each query head, `[B, Hq, S, dim]`."""
    return x.repeat_interleave(groups, dim=1)


def _pairs(flat: Sequence[torch.Tensor]) -> list[KeyValue]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def block_mask(document_ids: torch.Tensor | None, length: int, device: torch.device) -> flex.BlockMask:
    def visible(row: Any, head: Any, query: Any, key: Any) -> Any:
        causal = query >= key
        return causal if document_ids is None else causal & (document_ids[row, query] == document_ids[row, key])

    batch_size = None if document_ids is None else len(document_ids)
    return flex.create_block_mask(visible, batch_size, None, length, length, device=str(device))


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex.flex_attention)
