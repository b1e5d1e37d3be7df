"""native/cycle.c for tensors: what a cycle does beside its networks, on a CPU.

The functions are the twins of torch's steps in the modules that choose them, as Triton's are on a GPU: exact ones, but
for the rounding of `top_tokens`, which only ranks drafts.
"""

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from draftwing import native

if TYPE_CHECKING:
    from draftwing.engine.noise import KeptNoise
    from draftwing.engine.tree import Candidates, DraftTree, Frontier
    from draftwing.engine.tree_plan import Bins

MOST_FOUND = MOST_WIDTH = MOST_CANDIDATES = 2**31
"""There is no limit, as there is on a GPU."""


def _structure(pointers: str, sizes: str = "") -> type[ctypes.Structure]:
    """A structure of cycle.c: its pointers and then its sizes, in their order there."""
    fields = [(name, native.pointer) for name in pointers.split()] + [(name, native.size) for name in sizes.split()]
    return type("Structure", (ctypes.Structure,), {"_fields_": fields})


_NOISE = _structure("kept positions temperature", "num_kept tokens")
_CANDIDATES = _structure("tokens scores log_probs parents depths", "count")
_FRONTIER = _structure("tokens scores numbers parents")
_NODES = _structure("tokens parents depths valid scores log_probs")


def draw(first: torch.Tensor, second: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform numbers `[P, count]` by two keys `[P, 1]` for each row; noise.py writes them out."""
    out = torch.empty(len(first), count, dtype=torch.float32)
    threads = native.threads(16 * out.numel())
    native.loaded().draw(first.data_ptr(), second.data_ptr(), *out.shape, out.data_ptr(), threads)
    return out


def top_tokens(
    logits: torch.Tensor,
    width: int,
    noise: "KeptNoise | None" = None,
    target_ids: torch.Tensor | None = None,
    error: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As triton_cycle.top_tokens."""
    logits, (batch_size, num_nodes, _) = logits.contiguous(), logits.shape
    best, ids = logits.new_empty(batch_size, num_nodes, width), _ids(logits, batch_size, num_nodes, width)
    native.loaded().top_tokens(
        logits.data_ptr(), *logits.shape, _noise(noise), native.address(target_ids), 1 / error, width, best.data_ptr(),
        ids.data_ptr(), native.threads(16 * logits.numel()),
    )  # fmt: skip
    return best, ids


def choose_tokens(logits: torch.Tensor, noise: "KeptNoise | None") -> torch.Tensor:
    """As triton_cycle.choose_tokens."""
    logits, chosen = logits.contiguous(), _ids(logits, *logits.shape[:2])
    threads = native.threads(4 * logits.numel())
    native.loaded().choose_tokens(logits.data_ptr(), *logits.shape, _noise(noise), chosen.data_ptr(), threads)
    return chosen


def grow_level(
    log_probs: torch.Tensor,
    draft_ids: torch.Tensor,
    target_ids: torch.Tensor | None,
    before: "Frontier | None",
    bins: "Bins | None",
    into: "Candidates",
    best: "Frontier | None",
    first: int,
    depth: int,
) -> None:
    """As triton_cycle.grow_level."""
    log_probs, draft_ids = log_probs.contiguous(), draft_ids.contiguous()
    edges, added, most = (None, None, 0.0) if bins is None else (bins.edges, bins.added, bins.most)
    native.loaded().grow_level(
        log_probs.data_ptr(), draft_ids.data_ptr(), *log_probs.shape, native.address(target_ids), _frontier(before),
        native.address(edges), 0 if edges is None else len(edges), native.address(added), most, first, depth,
        _candidates(into), _frontier(best),
    )  # fmt: skip


def inherit_slots(visible: torch.Tensor, parent: torch.Tensor, lengths: torch.Tensor, first: int) -> torch.Tensor:
    """As triton_cycle.inherit_slots."""
    visible = visible if visible.stride(-1) == 1 else visible.contiguous()
    parent, lengths, num_slots = parent.contiguous(), lengths.contiguous(), visible.shape[-1]
    seen = visible.new_empty(*parent.shape, num_slots)
    native.loaded().inherit_slots(
        visible.data_ptr(), *visible.stride()[:2], num_slots, parent.data_ptr(), lengths.data_ptr(), *parent.shape,
        first, seen.data_ptr(),
    )  # fmt: skip
    return seen


def best_nodes(root: torch.Tensor, candidates: "Candidates", num_nodes: int, max_depth: int) -> "DraftTree":
    """As tree.best_subtree."""
    from draftwing.engine.tree import DraftTree

    root, num_rows = root.contiguous(), len(root)
    tokens, parents, depths = (_ids(root, num_rows, num_nodes) for _ in range(3))
    valid = root.new_empty(num_rows, num_nodes, dtype=torch.bool)
    scores, log_probs = (candidates.scores.new_empty(num_rows, num_nodes) for _ in range(2))
    into = _struct(_NODES, (tokens, parents, depths, valid, scores, log_probs))
    native.loaded().best_nodes(root.data_ptr(), _candidates(candidates), num_rows, num_nodes, into)
    return DraftTree(tokens, parents, depths, valid, scores, log_probs, max_depth)


def ancestors(parents: torch.Tensor) -> torch.Tensor:
    """DraftTree.ancestors of `parents [B, N]`."""
    parents, num_nodes = parents.contiguous(), parents.shape[1]
    reach = parents.new_empty(*parents.shape, num_nodes, dtype=torch.bool)
    native.loaded().ancestors(parents.data_ptr(), *parents.shape, reach.data_ptr())
    return reach


def walk(tree: "DraftTree", chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of tree.walk's verdict."""
    length, num_rows = tree.max_depth + 1, len(chosen)
    read = [part.contiguous() for part in (tree.tokens, tree.parents, tree.depths, tree.valid, chosen)]
    accepted = torch.empty_like(read[3])
    path, num_accepted, tokens = _ids(chosen, num_rows, length), _ids(chosen, num_rows), _ids(chosen, num_rows, length)
    written = accepted, path, num_accepted, tokens
    native.loaded().walk(
        *(part.data_ptr() for part in read), *chosen.shape, length, *(part.data_ptr() for part in written)
    )
    return written


def _ids(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.int64)


def _struct(kind: type[ctypes.Structure], parts: Iterable[torch.Tensor], *numbers: int) -> Any:
    """A structure's pointer, which keeps what it points to."""
    gapless = [part.contiguous() for part in parts]
    struct = kind(*(part.data_ptr() for part in gapless), *numbers)
    struct.parts = gapless  # type: ignore[attr-defined]
    return ctypes.byref(struct)


def _noise(noise: "KeptNoise | None") -> Any:
    return _struct(_NOISE, ()) if noise is None else _struct(_NOISE, vars(noise).values(), *noise.kept.shape[1:])


def _candidates(candidates: "Candidates") -> Any:
    return _struct(_CANDIDATES, vars(candidates).values(), candidates.tokens.shape[1])


def _frontier(frontier: "Frontier | None") -> Any:
    return _struct(_FRONTIER, () if frontier is None else vars(frontier).values())
