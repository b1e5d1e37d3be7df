"""Which tokens a row may choose, asked for each node of its tree with the node's own prefix.

The target's pass does not depend on it, so a grammar costs its own masks and one copy each way in a cycle.
"""

from collections.abc import Callable, Sequence

import torch

from draftwing.engine.tree import DraftTree

Allowed = Callable[[list[int]], torch.Tensor | None]
"""Of the tokens that a row has generated so far, the mask `[V]` of those that may follow; None: all may."""


class Grammar:
    """Asks a row's `allowed` about its tree's nodes; `said` is the row's list of emitted tokens, which grows.

    Nodes behind a token that is not allowed, or behind one of the `ends`, are not asked about. An error ends its row
    alone, and only if the row's text goes that way. Tokens that choose step by step (stepwise.py) are not asked about.
    """

    def __init__(self, allowed: Allowed, said: list[int], ends: Sequence[int]) -> None:
        self._allowed, self._said, self._ends = allowed, said, frozenset(ends)
        self._failed: list[tuple[list[int], Exception]] = []

    def masks(self, tree: DraftTree, row: int, vocab_size: int) -> torch.Tensor:
        """What each node of a row's tree may choose, `[N, V]` on the host; nodes that are not asked about: anything."""
        columns = (column[row].tolist() for column in (tree.tokens, tree.parents, tree.valid))
        masks, self._failed = torch.ones(tree.num_nodes, vocab_size, dtype=torch.bool), []
        prefixes: dict[int, list[int]] = {}
        for node, (token, parent, is_valid) in enumerate(zip(*columns, strict=True)):
            if node and not (is_valid and parent in prefixes and masks[parent, token] and token not in self._ends):
                continue
            prefixes[node] = [*prefixes[parent], token] if node else list(self._said)
            try:
                self._ask(prefixes[node], masks[node])
            except Exception as error:  # the user's own
                self._failed.append((prefixes.pop(node), error))
        return masks

    def check(self, new: list[int]) -> None:
        """Raise the error of a node that the row's text goes through with a cycle's `new` tokens.

        Others were drafted and not taken, and what is drafted must change nothing.
        """
        for prefix, error in self._failed:
            text = self._said + new
            if len(text) > len(prefix) and text[: len(prefix)] == prefix:
                raise error

    def _ask(self, prefix: list[int], mask: torch.Tensor) -> None:
        allowed = self._allowed(list(prefix))
        if allowed is None:
            return
        if allowed.dtype != torch.bool or allowed.shape != mask.shape or not allowed.any():
            raise ValueError(f"allowed: expected a mask of {len(mask)} booleans, some of them True")
        mask.copy_(allowed)


def forbid(scores: torch.Tensor, tree: DraftTree, grammars: Sequence[Grammar | None]) -> torch.Tensor:
    """The scores `[B, N, V]` with what the rows' grammars do not allow at -inf."""
    rows = [row for row, grammar in enumerate(grammars) if grammar is not None]
    masks = [grammar.masks(tree, row, scores.shape[-1]) for row, grammar in enumerate(grammars) if grammar is not None]
    index = torch.tensor(rows, device=scores.device)
    allowed = torch.stack(masks).to(scores.device)
    return scores.index_copy(0, index, scores[index].masked_fill(~allowed, -torch.inf))
