"""Who grows the draft tree: the Drafter contract, and what drafters keep that they have not read yet."""

from typing import Protocol

import torch

from draftwing.by_seat import BySeat
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import TreeShape


class Scored(Protocol):
    """Candidates' log-probabilities `[B, K, Vd]`: a tensor, or what finds the best of them as one does."""

    def topk(self, k: int, /) -> tuple[torch.Tensor, torch.Tensor]: ...


class Ranking(Protocol):
    """Scores a draft's candidates: log-probabilities `[B, K, Vd]` of being the target's token at `positions [B, 1]`.

    `logits [B, K, Vd]` are the draft's; `target_ids [Vd]` its tokens' target ids (None: the whole vocabulary).
    """

    def __call__(self, logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> Scored: ...


class Drafter(BySeat):
    """The drafting side of a cycle, by seat. Speculation methods differ only here.

    Attributes:
        feature_layers: the numbers of the target's hidden states that `observe` wants; none where tokens are enough.
        is_capturable: whether all state is updated where it lies and read from there, so that a cycle can be captured.
        bound: the host's upper bound of the seats' committed tokens, the roots not included.
    """

    feature_layers: tuple[int, ...] = ()
    is_capturable: bool = True
    bound: int

    def begin(self, seat: int, token: int) -> None:
        """Begin a row in a seat that is clear, with its prompt's first `token`, which `observe` never brings."""

    def share(self, source: int, goal: int, num_tokens: int) -> None:
        """Begin a row in seat `goal` as the row of seat `source` was after its first `num_tokens` committed tokens.

        All that was observed of the source has been read, and the rows' next tokens are the same too. Where the source
        is the goal, its row has ended and another one goes on in its place.
        """

    def see_choices(self, chosen: torch.Tensor, num_new: torch.Tensor) -> None:
        """See the target's own token at every node of the tree grown last, `chosen [B, N]`, before `observe`.

        In rows that choose step by step, a node for which nothing was chosen has `~token` of its likeliest `token`.
        """

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        """Take in committed positions: the next `num_new [B]` of them, right-padded.

        `features [B, L, F]` are the target's at those positions and `tokens [B, L]` the tokens one position later.
        """

    def catch_up(self, num_unread: int) -> None:
        """Read what `observe` has brought and nobody has read yet: at most so many positions of a seat."""

    def grow(self, root: torch.Tensor, plan: TreeShape, rank: Ranking) -> DraftTree:
        """Grow a tree below `root [B]`, the last committed token, of the shape that the plan, which drafts, asks for.

        All that was observed has been read; `rank` scores candidates with what is known of the target's sampling.
        """
        raise NotImplementedError


class NoDrafter(Drafter):
    """Plain decoding: it is never asked to grow a tree."""


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
