"""A trial of RowTarget's pass on the device at hand, against itself node by node and against FusedTarget's.

Its kernels are compiled for whatever card there is; where they fail there, FusedTarget's pass is kept.
"""

import torch

from draftwing.target.fused import FusedTarget
from draftwing.target.kv_cache import KVCache
from draftwing.target.model import TargetModel
from draftwing.target.row_pass import Kernels, RowTarget

PARENTS, DEPTHS = (0, 0, 0, 1), (0, 1, 1, 2)
"""The tree: two children of the root, one of which has a child."""
LONGEST_PROMPT = 70
"""Tokens before it: more than a tail has positions, so that a part is read too."""
MOST_APART = 0.2
"""Root mean square of the difference of two passes' logits over their standard deviation: bfloat16 has some 0.03."""


@torch.no_grad()
def row_target(fused: FusedTarget, kernels: Kernels | None = None) -> FusedTarget:
    """The target with RowTarget's pass; `fused` itself, which then holds the reason, where that fails its trial."""
    try:
        ours = RowTarget(fused.model, fused.role, kernels)
        fused.row_failure = _failure(ours, FusedTarget(fused.model, fused.role))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's are of many kinds
        first_line = next(iter(str(error).splitlines()), "")
        fused.row_failure = f"its kernels fail here: {type(error).__name__}: {first_line}"
    return fused if fused.row_failure else ours


def _failure(ours: RowTarget, fused: FusedTarget) -> str | None:
    """What a trial finds wrong, None if nothing."""
    in_tree = _tree_logits(ours)
    for node, logits in enumerate(in_tree):
        if not torch.equal(logits, _plain_logits(ours, node)):
            return "a node of a tree has other bits than decoded alone here"
    expected = _tree_logits(fused).float()
    apart = (in_tree.float() - expected).square().mean().sqrt() / expected.std()
    if not apart <= MOST_APART:  # NaN compares as false
        return f"its kernels compute something else here: logits are {apart:.2g} standard deviations apart"
    return None


def _tree_logits(target: TargetModel) -> torch.Tensor:
    """`[N, V]` of the tree's nodes."""
    ancestors = torch.zeros(1, len(PARENTS), len(PARENTS), dtype=torch.bool)
    for node in range(len(PARENTS)):
        ancestors[0, node, _path(node)] = True
    tokens, depths = _tokens(target, list(range(len(PARENTS)))), torch.tensor([DEPTHS], device=target.device)
    return target.forward_tree(tokens, depths, ancestors.to(target.device), _prefilled(target)).logits[0]


def _plain_logits(target: TargetModel, node: int) -> torch.Tensor:
    """A node's `[V]` when its path is decoded token by token."""
    cache, seen = _prefilled(target), torch.ones(1, 1, 1, dtype=torch.bool, device=target.device)
    for ancestor in _path(node):
        tokens = _tokens(target, [ancestor])
        logits = target.forward_tree(tokens, torch.zeros_like(tokens), seen, cache).logits[0, 0]
        cache.commit(None, torch.ones_like(tokens[0]), max_kept=1)
    return logits


def _prefilled(target: TargetModel) -> KVCache:
    """A cache of one row that has read a prompt."""
    room = (target.max_positions or LONGEST_PROMPT + len(PARENTS)) - len(PARENTS)
    length = max(1, min(LONGEST_PROMPT, room))
    cache = target.new_cache(1, length + len(PARENTS))
    tokens = _tokens(target, list(range(len(PARENTS), len(PARENTS) + length)))
    target.prefill(tokens, torch.tensor([length], device=target.device), cache)
    return cache


def _tokens(target: TargetModel, numbers: list[int]) -> torch.Tensor:
    """`[1, N]`, other ones for other numbers."""
    return torch.tensor([numbers], device=target.device) * 7 % target.vocab_size


def _path(node: int) -> list[int]:
    return [*_path(PARENTS[node]), node] if node else [0]
