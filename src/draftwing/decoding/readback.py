"""What a cycle did, on the host: the tokens to emit, and for plans that learn what became of every node."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from draftwing.decoding.tree import DraftTree, Verdict

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Outcomes:
    """What became of the M drafted nodes whose parent was accepted, so that they had a chance; arrays `[M]`.

    `parent_depths` has one entry for each accepted node that had children.
    """

    accepted: Array
    depths: Array
    log_probs: Array
    parent_depths: Array


def join_outcomes(parts: Sequence[Outcomes]) -> Outcomes:
    """The outcomes of several cycles."""
    return Outcomes(
        *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Outcomes)),
    )


@dataclass(frozen=True)
class CycleFacts:
    """What became of the running rows' trees, on the host: arrays `[R, N]` as in DraftTree and Verdict.

    Attributes:
        rows: `[R]` their indices in the batch.
        drafted: what a network has drafted: neither the root, nor padding, nor what was looked up.
    """

    rows: Array
    accepted: Array
    parents: Array
    depths: Array
    drafted: Array
    scores: Array
    log_probs: Array
    max_depth: int

    @property
    def num_nodes(self) -> int:
        return int(self.depths.shape[1])

    def outcomes(self) -> Outcomes:
        """The nodes that had a chance."""
        tried = self.drafted & self.accepted[np.arange(len(self.rows))[:, None], self.parents]
        # At each depth at most one node of a row is accepted, so these are the children of one parent.
        has_children = np.zeros((len(self.rows), self.max_depth + 1), dtype=bool)
        rows, nodes = np.nonzero(tried)
        depths = self.depths[rows, nodes]
        has_children[rows, depths - 1] = True
        return Outcomes(self.accepted[tried], depths, self.log_probs[tried], np.nonzero(has_children)[1])


@dataclass(frozen=True)
class CycleReport:
    """What a cycle brought to the running `rows [R]`: `num_tokens` over all of them, from trees of `num_nodes`.

    `facts()` are worked out when they are asked for.
    """

    rows: Array
    num_tokens: int
    num_nodes: int
    facts: Callable[[], CycleFacts]


class CycleReading:
    """A cycle's result on its way to the host, the cycle's only copy; of a `tree` its facts as well.

    A GPU starts to copy here, and `result` waits for that alone: the device works on meanwhile. On a CPU nothing is
    copied; the facts are read where they lie.
    """

    def __init__(self, verdict: Verdict, tree: DraftTree | None) -> None:
        self._max_depth = 0 if tree is None else tree.max_depth
        self._event: torch.cuda.Event | None = None
        self._packed: torch.Tensor | None = None
        result = torch.cat((verdict.num_accepted[:, None], verdict.tokens), dim=1)
        self._parts: tuple[torch.Tensor, ...] = (result,)
        if tree is not None:
            facts = (verdict.accepted, tree.parents, tree.depths, tree.valid, tree.scores, tree.log_probs)
            self._parts = (result, *facts)
        if result.device.type != "cpu":
            self._widths = [part.shape[1] for part in self._parts]
            packed = torch.cat([_as_int32(part) for part in self._parts], dim=1)
            self._packed = packed.to("cpu", non_blocking=packed.device.type == "cuda")
        if result.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(result.device))

    @property
    def has_facts(self) -> bool:
        return len(self._parts) > 1

    def result(self) -> Array:
        """`[B, 1 + L]`: accepted draft tokens, and tokens to emit."""
        if self._event is not None:
            self._event.synchronize()
        if self._packed is not None:
            integers = self._packed.split(self._widths, dim=1)
            self._parts = (*integers[:5], *(part.contiguous().view(torch.float32) for part in integers[5:]))
        result: Array = self._parts[0].numpy()
        return result

    def facts(self, rows: Array) -> CycleFacts:
        """What became of some rows' trees; after `result`."""
        arrays: list[Array] = [part.numpy() for part in self._parts[1:]]
        if len(rows) < len(arrays[0]):
            arrays = [array[rows] for array in arrays]
        accepted, parents, depths, valid, scores, log_probs = arrays
        drafted = (valid > 0) & (depths > 0) & np.isfinite(log_probs)
        parents, depths = (part.astype(np.int64, copy=False) for part in (parents, depths))
        return CycleFacts(rows, accepted > 0, parents, depths, drafted, scores, log_probs, self._max_depth)


def _as_int32(part: torch.Tensor) -> torch.Tensor:
    """Ids and flags as they are, scores as the bits of float32, so that one copy takes all of them."""
    return part.float().view(torch.int32) if part.is_floating_point() else part.int()
