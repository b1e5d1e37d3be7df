"""Committed positions that a drafter has been told of but not read yet: drafts that are paused should cost nothing."""

import itertools

import torch

Piece = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
"""Tokens `[B, L]`, features `[B, L, F]` if there are any, and how many of each row are valid `[B]`."""


class Unread:
    """Observations in their order, to be read in few passes."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []

    def add(self, piece: Piece) -> None:
        self._pieces.append(piece)

    def take(self, at_least: int = 1) -> list[Piece]:
        """All pieces if they are `at_least` so many positions, else none, and all stay.

        Single tokens next to each other, as cycles without drafts leave them, come joined.
        """
        if sum(tokens.shape[1] for tokens, _, _ in self._pieces) < at_least:
            return []
        taken: list[Piece] = []
        for is_single, group in itertools.groupby(self._pieces, key=lambda piece: piece[0].shape[1] == 1):
            pieces = list(group)
            taken += [_join(pieces)] if is_single else pieces
        self._pieces = []
        return taken


def _join(pieces: list[Piece]) -> Piece:
    """One piece of several single tokens, each row's valid ones first."""
    if len(pieces) == 1:
        return pieces[0]
    tokens, features, num_new = zip(*pieces, strict=True)
    is_valid = torch.stack(num_new, 1) > 0
    order = is_valid.sort(dim=1, descending=True, stable=True).indices
    joined = None
    if features[0] is not None:
        joined = torch.cat(features, 1)
        joined = joined.gather(1, order[..., None].expand_as(joined))
    return torch.cat(tokens, 1).gather(1, order), joined, is_valid.sum(1)
