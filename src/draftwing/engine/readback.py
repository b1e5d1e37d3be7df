"""What a cycle did, on the host: the tokens to emit, and for plans that learn what became of every node."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from draftwing.engine.logprobs import Scores, ScoresOnHost
from draftwing.engine.tree import DraftTree, Verdict

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
        drafted: what a network has drafted: neither the root, nor padding, nor what was looked up.
    """

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
        tried = self.drafted & self.accepted[np.arange(len(self.parents))[:, None], self.parents]
        # At each depth at most one node of a row is accepted, so these are the children of one parent.
        has_children = np.zeros((len(self.depths), self.max_depth + 1), dtype=bool)
        rows, nodes = np.nonzero(tried)
        depths = self.depths[rows, nodes]
        has_children[rows, depths - 1] = True
        return Outcomes(self.accepted[tried], depths, self.log_probs[tried], np.nonzero(has_children)[1])


Work = Callable[[], None]


def _at_once(work: Work) -> None:
    work()


@dataclass(frozen=True)
class CycleReport:
    """What a cycle brought to its `num_rows`: `num_tokens` over all of them, from trees of `num_nodes`.

    `facts()` are worked out when they are asked for. `defer` takes work with them that may wait: it is done once the
    device is busy with the next cycle.
    """

    num_rows: int
    num_tokens: int
    num_nodes: int
    facts: Callable[[], CycleFacts]
    defer: Callable[[Work], None] = _at_once


class CycleReading:
    """A cycle's result on its way to the host, in its only copy; with the facts of a `tree`, and the tokens' `scores`.

    A CUDA device starts to copy here, and `result` waits for that alone: the device works on meanwhile. On a CPU all
    is read where it lies, without a copy, but for a cycle that `is_replayed`: the next one writes to the same place.
    """

    def __init__(
        self, verdict: Verdict, tree: DraftTree | None, scores: Scores | None = None, is_replayed: bool = False
    ) -> None:
        self._has_scores = scores is not None
        self._max_depth = 0 if tree is None else tree.max_depth
        self._event: torch.cuda.Event | None = None
        self._parts: tuple[torch.Tensor, ...] = (torch.cat((verdict.num_accepted[:, None], verdict.tokens), dim=1),)
        if tree is not None:
            self._parts += (verdict.accepted, tree.parents, tree.depths, tree.valid, tree.scores, tree.log_probs)
        self._num_facts = len(self._parts) - 1
        if scores is not None:
            self._parts += scores
        device = self._parts[0].device
        self.is_copied = is_replayed or device.type != "cpu"
        self._joined = join_parts(self._parts) if self.is_copied else None
        if self._joined is not None and device.type == "cuda":
            self._joined = self._joined.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    @property
    def has_facts(self) -> bool:
        """Whether there will be facts."""
        return self._num_facts > 0

    def result(self) -> Array:
        """`[B, 1 + L]`: accepted draft tokens, and tokens to emit."""
        if self._event is not None:
            self._event.synchronize()
        if self._joined is None:
            self._arrays: list[Array] = [part.numpy() for part in self._parts]
        else:
            self._arrays = split_parts(self._joined.numpy(force=True), self._parts)
        return self._arrays[0]

    def facts(self, num_rows: int) -> CycleFacts:
        """What became of the first rows' trees; after `result`."""
        accepted, parents, depths, valid, scores, log_probs = (
            array[:num_rows] for array in self._arrays[1 : 1 + self._num_facts]
        )
        drafted = (valid > 0) & (depths > 0) & np.isfinite(log_probs)
        parents, depths = (part.astype(np.int64, copy=False) for part in (parents, depths))
        return CycleFacts(accepted > 0, parents, depths, drafted, scores, log_probs, self._max_depth)

    def scores(self) -> ScoresOnHost | None:
        """The log-probabilities of the tokens to emit, if they were asked for; after `result`."""
        return ScoresOnHost(*self._arrays[1 + self._num_facts :]) if self._has_scores else None


def join_parts(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors `[B, ...]` of ids, flags and scores side by side, as int32: one copy takes all.

    Scores travel as the bits of float32, for not every device has a number type that holds both.
    """
    as_integers = [part.float().view(torch.int32) if part.is_floating_point() else part.int() for part in parts]
    return torch.cat(as_integers, dim=1)


def split_parts(joined: Array, parts: Sequence[torch.Tensor]) -> list[Array]:
    """What was joined from tensors of these shapes and kinds, as int32 and float32."""
    arrays = np.split(joined, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
    pairs = zip(parts, arrays, strict=True)
    return [array.view(np.float32) if part.is_floating_point() else array for part, array in pairs]
