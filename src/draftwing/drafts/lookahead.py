"""Lookahead decoding (arXiv 2402.02057): n-grams for drafts, gathered by Jacobi iterations in the target's own passes.

A cycle's tree holds two things below the root. The verification branch is the n-grams of the pool that begin with the
root. The lookahead branch is a window of W columns and N - 1 levels of guesses about the tokens ahead:

    level 0   root      (0,1)     (0,2)     (0,3)      a chain from the root on
    level 1   (1,0)     (1,1)     (1,2)     (1,3)      each below the node above it
    level 2   (2,0)     (2,1)     (2,2)     (2,3)

Node (l, c) stands l + c positions after the root and reads level 0 up to its column, and its own column. The target's
tokens at the last level make one n-gram of each column, and the next window's last level; the others move up.
Guesses are never accepted themselves.
"""

import torch

from draftwing.by_seat import BySeat
from draftwing.drafts.family import DrafterOptions, Kind
from draftwing.drafts.kinds import default_plan
from draftwing.engine.drafter import Drafter, Ranking
from draftwing.engine.engine import NewDrafter
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import LookaheadTree, TreePlan, TreeShape
from draftwing.target.model import TargetModel

POOL_SIZE = 8192
"""N-grams that a row remembers; the oldest are overwritten."""
CODE_FACTOR = 0x5851F42D4C957F2D
"""Of a polynomial modulo 2^64 that tells n-grams apart."""


class Lookahead(Kind[None]):
    """Drafts from the target's own passes."""

    def drafter(self, draft: None, target: TargetModel, wanted: DrafterOptions) -> NewDrafter:
        plan: TreeShape = wanted.plan or TreePlan.parse(default_plan("lookahead"))
        return lambda num_seats, num_slots: LookaheadDrafter(plan, num_seats, num_slots, target.device)


class LookaheadDrafter(Drafter):
    """Drafts the n-grams that the target's Jacobi iterations have brought, for seats of at most `capacity` tokens.

    `plan` is the only one that it drafts. The first window holds the prompt's last tokens; the paper draws random ones.

    Raises:
        ValueError: a plan that is not Lookahead decoding's, or too large.
    """

    is_capturable = False
    by_seat = ("_history", "_lengths", "_window", "_num_chosen", "_pool")

    def __init__(self, plan: TreeShape, num_seats: int, capacity: int, device: torch.device) -> None:
        if not isinstance(plan, LookaheadTree):
            raise ValueError(f"plan: lookahead takes lookahead:WxNxG, got {plan}")
        if max(plan.width, plan.num_columns) > POOL_SIZE:
            raise ValueError(f"plan: lookahead's W and G are at most {POOL_SIZE}, got {plan}")
        self._plan = plan
        self._history = torch.zeros(num_seats, capacity + 1, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(num_seats, dtype=torch.int64, device=device)
        self._window = torch.zeros(num_seats, plan.depth, plan.num_columns, dtype=torch.int64, device=device)
        # Levels of the window that hold the target's tokens, not the first guesses; -1 before there is a window.
        self._num_chosen = torch.full((num_seats,), -1, dtype=torch.int64, device=device)
        self._pool = NgramPool(num_seats, plan.depth + 1, device)
        level, column = (
            numbers.flatten()[1:]  # node (0, 0) is the root
            for numbers in torch.meshgrid(
                torch.arange(plan.depth, device=device), torch.arange(plan.num_columns, device=device), indexing="ij"
            )
        )
        parent = torch.where(level > 0, (level - 1) * plan.num_columns + column, column - 1)
        self._window_parents = torch.where(parent > 0, plan.width * plan.depth + parent, 0)
        self._window_depths = level + column

    def clear(self, seat: int, num_tokens: int) -> None:
        super().clear(seat, num_tokens)
        self._num_chosen[seat] = -1

    def begin(self, seat: int, token: int) -> None:
        self._history[seat, 0] = token
        self._lengths[seat] = 1

    def share(self, source: int, goal: int, num_tokens: int) -> None:
        self._history[goal] = self._history[source]
        self._lengths[goal] = num_tokens + 1
        self._num_chosen[goal] = -1  # a window of its own

    def see_choices(self, chosen: torch.Tensor, num_new: torch.Tensor) -> None:
        self._advance(torch.where(chosen < 0, ~chosen, chosen), num_new > 0)

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        slots = torch.where(steps < num_new[:, None], self._lengths[:, None] + steps, self._history.shape[1] - 1)
        self._history.scatter_(1, slots, tokens)
        self._lengths += num_new

    def grow(self, root: torch.Tensor, plan: TreeShape, rank: Ranking) -> DraftTree:
        """The n-grams that begin with `root [B]`, and the window's guesses."""
        num_seats = len(root)
        is_first = (self._num_chosen < 0)[:, None, None]
        self._window.copy_(torch.where(is_first, self._first_window(), self._window))
        self._num_chosen.clamp_(min=0)
        self._window[:, 0, 0] = root
        ngrams, is_found = self._pool.latest(root, plan.width)
        parents, is_first_of_kind = _merge_prefixes(ngrams, is_found)
        depths = torch.arange(1, plan.depth + 1, device=root.device).repeat(plan.width)
        zero, is_root = torch.zeros_like(root)[:, None], torch.ones_like(root, dtype=torch.bool)[:, None]
        is_guess = torch.zeros_like(self._window_depths, dtype=torch.bool)
        no_scores = torch.full((num_seats, plan.num_nodes - 1), torch.nan, dtype=torch.float32, device=root.device)
        scores = torch.cat((zero.float(), no_scores), 1)
        return DraftTree(
            tokens=torch.cat((root[:, None], ngrams.flatten(1), self._window.flatten(1)[:, 1:]), 1),
            parents=torch.cat((zero, parents.flatten(1), self._window_parents.expand(num_seats, -1)), 1),
            depths=torch.cat((zero[0], depths, self._window_depths)).expand(num_seats, -1),
            valid=torch.cat((is_root, is_first_of_kind.flatten(1), is_guess.expand(num_seats, -1)), 1),
            scores=scores,
            log_probs=scores,
            max_depth=plan.depth,
            num_generations=plan.max_depth,
        )

    def _first_window(self) -> torch.Tensor:
        """`[B, N - 1, W]` the last tokens of each row in their order, again and again if they are too few."""
        num_guesses = self._window[0].numel()
        num_used = self._lengths.clamp(min=1, max=num_guesses)[:, None]
        steps = torch.arange(num_guesses, device=num_used.device)
        source = self._lengths[:, None] - num_used + steps % num_used
        return self._history.gather(1, source.clamp(min=0)).view_as(self._window)

    def _advance(self, chosen: torch.Tensor, is_running: torch.Tensor) -> None:
        """Take in the target's token at each node of the last tree, `[B, N]`: new n-grams, and the next window."""
        plan = self._plan
        in_window = torch.cat((chosen[:, :1], chosen[:, 1 + plan.width * plan.depth :]), 1)
        newest = in_window[:, -plan.num_columns :]
        ngrams = torch.cat((self._window.transpose(1, 2), newest[..., None]), 2)
        self._pool.add(ngrams, is_running & (self._num_chosen >= plan.depth - 1))
        self._num_chosen += 1
        # A guess moves up a level and keeps its column, so it stays at its position: the root moves on by one.
        self._window.copy_(torch.cat((self._window[:, 1:], newest[:, None]), 1))


def _merge_prefixes(ngrams: torch.Tensor, is_found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nodes of G n-grams `[B, G, D]` as a tree, for the siblings of a tree must differ.

    An n-gram's first tokens are those of the first n-gram that begins with the same. Returns the parents `[B, G, D]`,
    as node numbers behind the root, and which nodes are the first of their kind.
    """
    num_ngrams, depth = ngrams.shape[1:]
    is_same = (ngrams[:, :, None] == ngrams[:, None]) & is_found[:, None, :, None]  # [B, G, G, D]
    first = is_same.int().cumprod(-1).argmax(2)  # [B, G, D]
    numbers = torch.arange(num_ngrams, device=ngrams.device)[:, None]
    nodes = 1 + first * depth + torch.arange(depth, device=ngrams.device)
    parents = torch.cat((torch.zeros_like(nodes[..., :1]), nodes[..., :-1]), -1)
    return parents, (first == numbers) & is_found[..., None]


class NgramPool(BySeat):
    """The latest n-grams `[S, M, N]` by seat, found by their first token; equal ones are kept once."""

    by_seat = ("_ngrams", "_codes", "_is_alive", "_next")

    def __init__(self, num_seats: int, length: int, device: torch.device, size: int = POOL_SIZE) -> None:
        self._ngrams = torch.zeros(num_seats, size, length, dtype=torch.int64, device=device)
        self._codes = torch.zeros(num_seats, size, dtype=torch.int64, device=device)
        self._is_alive = torch.zeros(num_seats, size, dtype=torch.bool, device=device)
        self._next = torch.zeros(num_seats, dtype=torch.int64, device=device)  # the slot of the oldest
        self._slots = torch.arange(size, device=device)

    def add(self, ngrams: torch.Tensor, is_added: torch.Tensor) -> None:
        """Take in `[B, W, N]`, the latest last, of the seats that `is_added [B]` is True for."""
        num_new, size = ngrams.shape[1], len(self._slots)
        codes = torch.zeros_like(ngrams[..., 0])
        for token in ngrams.unbind(-1):
            codes = codes * CODE_FACTOR + token + 1
        is_known = (self._codes[:, :, None] == codes[:, None]).any(-1)
        self._is_alive &= ~(is_known & is_added[:, None])
        is_repeated = (codes[:, :, None] == codes[:, None]).triu(1).any(-1)
        slots = (self._next[:, None] + self._slots[:num_new]) % size
        place = torch.arange(len(slots), device=slots.device)[:, None], slots
        for kept, new in ((self._ngrams, ngrams), (self._codes, codes), (self._is_alive, ~is_repeated)):
            is_new = is_added.view(-1, *[1] * (new.dim() - 1))
            kept[place] = torch.where(is_new, new, kept[place])
        self._next += num_new * is_added
        self._next %= size

    def latest(self, first: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows `first [B]` in the latest `count` n-grams that begin with it, the latest first.

        Returns `[B, count, N - 1]` tokens and which of the n-grams exist, `[B, count]`.
        """
        is_wanted = self._is_alive & (self._ngrams[..., 0] == first[:, None])
        ages = (self._slots - self._next[:, None]) % len(self._slots)  # the oldest is 0
        ages, slots = torch.where(is_wanted, ages, -1).topk(count)
        is_found = ages >= 0
        found = self._ngrams.gather(1, slots[..., None].expand(-1, -1, self._ngrams.shape[-1]))[..., 1:]
        return torch.where(is_found[..., None], found, 0), is_found
