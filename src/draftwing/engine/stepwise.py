"""Tokens chosen one step at a time, for whoever must see steps as a loop without drafts shows them.

A tree is verified in one pass, but what is chosen at a node matters only if the node is accepted. So
the choice is asked for at the root, then at the child that holds the chosen token, and so on: as often,
in the same order, and after the same prefixes as by a loop that runs the model once per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from draftwing.engine.tree import DraftTree

NoiseAt = Callable[[int], torch.Tensor]
"""The Gumbel noise `[B, V]` of the tokens that nodes of a depth choose."""


class Steps(Protocol):
    """Chooses the tokens of a batch's rows, each row's one after the other."""

    in_step: bool
    """Whether each call is for all rows, which start together; else each is for one row."""

    def choose(self, rows: Sequence[int], logits: torch.Tensor, noise: torch.Tensor | None) -> list[int]:
        """The next token of each row, from the target's `logits [R, V]`; `noise [R, V]` if they sample."""


@dataclass(frozen=True)
class Place:
    """Where a row's tokens are chosen: by `steps`, of which it is row number `row`."""

    steps: Steps
    row: int


def choose_in_steps(
    places: Sequence[Place], logits: torch.Tensor, tree: DraftTree, noise_at: NoiseAt | None
) -> torch.Tensor:
    """The tokens `[B, N]` that are chosen at the nodes of the tree, with `logits [B, N, V]`.

    Where nobody was asked stands `~token`, the likeliest token's: `walk` accepts no such node.
    """
    chosen = ~logits.argmax(-1)
    children = _children(tree)
    for rows in _parties(places):
        steps, numbers = places[rows[0]].steps, [places[row].row for row in rows]
        nodes = [0] * len(rows)
        for depth in range(tree.max_depth + 1):
            noise = None if noise_at is None else noise_at(depth)[rows]
            tokens = steps.choose(numbers, logits[rows, nodes], noise)
            chosen[rows, nodes] = torch.tensor(tokens, device=chosen.device)
            steps_on = zip(rows, nodes, tokens, strict=True)
            following = [children[row].get((node, token), 0) for row, node, token in steps_on]
            if 0 in following:  # some row's draft ends here, and the others wait for it
                break
            nodes = following
    return chosen


def _parties(places: Sequence[Place]) -> list[list[int]]:
    """The rows that advance together, in the order of their numbers."""
    parties: dict[tuple[int, int | None], list[int]] = {}
    for row in sorted(range(len(places)), key=lambda row: places[row].row):
        place = places[row]
        parties.setdefault((id(place.steps), None if place.steps.in_step else row), []).append(row)
    return list(parties.values())


def _children(tree: DraftTree) -> list[dict[tuple[int, int], int]]:
    """Of each row the nodes that may be accepted, by their parent and token."""
    columns = (tree.parents.tolist(), tree.tokens.tolist(), tree.valid.tolist())
    return [
        {
            (parent, token): node
            for node, (parent, token, is_valid) in enumerate(zip(*row, strict=True))
            if node > 0 and is_valid
        }
        for row in zip(*columns, strict=True)
    ]
