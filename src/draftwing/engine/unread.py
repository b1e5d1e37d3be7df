"""Committed positions that a drafter has been told of but not read yet: drafts that are paused should cost nothing."""

import torch

from draftwing.by_seat import BySeat

MOST_UNREAD = 256
"""Positions that drafters may leave unread while drafts pause; reading many takes long."""
PREFILL_CHUNK = 512
"""Positions of a prompt that are read at once."""
ROOM = PREFILL_CHUNK + 1
"""A chunk, and a prompt's first token before it."""


class Unread(BySeat):
    """What `observe` brought, by seat, in the order of its positions.

    With a `feature_size` of 0 there are tokens alone.
    """

    by_seat = ("_tokens", "_features", "_counts")

    def __init__(self, num_seats: int, feature_size: int, dtype: torch.dtype, device: torch.device) -> None:
        # One position behind the last takes the writes of padding.
        shape = num_seats, ROOM + 1
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._features = torch.zeros(*shape, feature_size, dtype=dtype, device=device)
        self._counts = torch.zeros(num_seats, dtype=torch.int64, device=device)

    def add(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        """Keep the first `num_new [B]` of the positions `[B, L]` that `observe` was given."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        places = torch.where(steps < num_new[:, None], self._counts[:, None] + steps, ROOM)
        self._tokens.scatter_(1, places, tokens)
        if features is not None:
            seats = torch.arange(len(tokens), device=tokens.device)[:, None]
            self._features[seats, places] = features.to(self._features.dtype)
        self._counts += num_new

    def take(self, num_unread: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The positions of every seat, right-padded to `num_unread`, which none exceeds; they are read then.

        Returns tokens `[B, L]`, features `[B, L, F]`, and how many of a seat's are valid `[B]`.
        """
        counts = self._counts.clone()
        self._counts.zero_()
        return self._tokens[:, :num_unread], self._features[:, :num_unread], counts
