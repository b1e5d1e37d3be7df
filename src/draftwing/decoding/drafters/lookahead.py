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

from draftwing.decoding.drafters import Drafter, Ranking
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.tree import DraftTree

POOL_SIZE = 8192
"""N-grams that a row remembers; the oldest are overwritten."""
CODE_FACTOR = 0x5851F42D4C957F2D
"""Of a polynomial modulo 2^64 that tells n-grams apart."""


class LookaheadDrafter(Drafter):
    """Drafts the n-grams that the target's Jacobi iterations have brought, for B rows of at most `capacity` tokens.

    The first window holds the prompt's last tokens; the paper draws random ones.
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(self, batch_size: int, capacity: int, device: torch.device) -> None:
        self._prompts = torch.zeros(batch_size, capacity + 1, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._run: _Run | None = None

    def reset(self) -> None:
        self._lengths.zero_()
        self._run = None

    def start(self, tokens: torch.Tensor) -> None:
        self.observe(tokens[:, None], None, torch.ones_like(tokens))

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        if self._run is None:  # the first window alone is made from text
            steps = torch.arange(tokens.shape[1], device=tokens.device)
            slots = torch.where(steps < num_new[:, None], self._lengths[:, None] + steps, self._prompts.shape[1] - 1)
            self._prompts.scatter_(1, slots, tokens)
            self._lengths = self._lengths + num_new

    def grow(self, root: torch.Tensor, plan: TreePlan, longest: int, rank: Ranking) -> DraftTree:
        if not plan.window:
            raise ValueError(f"plan: lookahead takes lookahead:WxNxG, got {plan}")
        if max(plan.width, plan.window) > POOL_SIZE:
            raise ValueError(f"plan: lookahead's W and G are at most {POOL_SIZE}, got {plan}")
        if self._run is None:
            self._run = _Run(plan, self._first_window(plan))
        return self._run.tree(root)

    def see_choices(self, chosen: torch.Tensor) -> None:
        if self._run is not None:
            self._run.advance(torch.where(chosen < 0, ~chosen, chosen))

    def _first_window(self, plan: TreePlan) -> torch.Tensor:
        """`[B, N - 1, W]` the last tokens of each row in their order, again and again if they are too few."""
        num_guesses = plan.depth * plan.window
        num_used = self._lengths.clamp(min=1, max=num_guesses)[:, None]
        steps = torch.arange(num_guesses, device=num_used.device)
        source = self._lengths[:, None] - num_used + steps % num_used
        return self._prompts.gather(1, source.clamp(min=0)).view(-1, plan.depth, plan.window)


class _Run:
    """The window `[B, N - 1, W]` and the pool of a generation, and where their tokens lie in its trees."""

    def __init__(self, plan: TreePlan, window: torch.Tensor) -> None:
        self._plan, self._window = plan, window
        self._pool = NgramPool(len(window), plan.depth + 1, window.device)
        self._num_levels_chosen = 0  # levels of the window that hold the target's tokens, not the first guesses
        num_verified = plan.width * plan.depth
        level, column = (
            numbers.flatten()[1:]  # node (0, 0) is the root
            for numbers in torch.meshgrid(
                torch.arange(plan.depth, device=window.device),
                torch.arange(plan.window, device=window.device),
                indexing="ij",
            )
        )
        parent = torch.where(level > 0, (level - 1) * plan.window + column, column - 1)
        self._window_parents = torch.where(parent > 0, num_verified + parent, 0)
        self._window_depths = level + column

    def tree(self, root: torch.Tensor) -> DraftTree:
        """The n-grams that begin with `root [B]`, and the window's guesses."""
        plan, batch_size = self._plan, len(root)
        self._window = torch.cat((root[:, None], self._window.flatten(1)[:, 1:]), 1).view_as(self._window)
        ngrams, is_found = self._pool.latest(root, plan.width)
        parents, is_first = _merge_prefixes(ngrams, is_found)
        depths = torch.arange(1, plan.depth + 1, device=root.device).repeat(plan.width)
        zero, is_root = torch.zeros_like(root)[:, None], torch.ones_like(root, dtype=torch.bool)[:, None]
        is_guess = torch.zeros_like(self._window_depths, dtype=torch.bool)
        no_scores = torch.full((batch_size, plan.num_nodes - 1), torch.nan, device=root.device)
        scores = torch.cat((zero.float(), no_scores), 1)
        return DraftTree(
            tokens=torch.cat((root[:, None], ngrams.flatten(1), self._window.flatten(1)[:, 1:]), 1),
            parents=torch.cat((zero, parents.flatten(1), self._window_parents.expand(batch_size, -1)), 1),
            depths=torch.cat((zero[0], depths, self._window_depths)).expand(batch_size, -1),
            valid=torch.cat((is_root, is_first.flatten(1), is_guess.expand(batch_size, -1)), 1),
            scores=scores,
            log_probs=scores,
            max_depth=plan.depth,
            num_generations=plan.max_depth,
        )

    def advance(self, chosen: torch.Tensor) -> None:
        """Take in the target's token at each node of the last tree, `[B, N]`: new n-grams, and the next window."""
        plan = self._plan
        in_window = torch.cat((chosen[:, :1], chosen[:, 1 + plan.width * plan.depth :]), 1)
        newest = in_window[:, -plan.window :]
        if self._num_levels_chosen >= plan.depth - 1:
            self._pool.add(torch.cat((self._window.transpose(1, 2), newest[..., None]), 2))
        self._num_levels_chosen += 1
        # A guess moves up a level and keeps its column, so it stays at its position: the root moves on by one.
        self._window = torch.cat((self._window[:, 1:], newest[:, None]), 1)


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


class NgramPool:
    """The latest n-grams `[B, M, N]` of B rows, found by their first token; equal ones are kept once."""

    def __init__(self, batch_size: int, length: int, device: torch.device, size: int = POOL_SIZE) -> None:
        self._ngrams = torch.zeros(batch_size, size, length, dtype=torch.int64, device=device)
        self._codes = torch.zeros(batch_size, size, dtype=torch.int64, device=device)
        self._is_alive = torch.zeros(batch_size, size, dtype=torch.bool, device=device)
        self._ages = torch.arange(size, device=device)  # by slot; the oldest is 0
        self._next = 0

    def add(self, ngrams: torch.Tensor) -> None:
        """Take in `[B, W, N]`, the latest last."""
        num_new, size = ngrams.shape[1], len(self._ages)
        codes = torch.zeros_like(ngrams[..., 0])
        for token in ngrams.unbind(-1):
            codes = codes * CODE_FACTOR + token + 1
        self._is_alive &= ~(self._codes[:, :, None] == codes[:, None]).any(-1)
        is_repeated = (codes[:, :, None] == codes[:, None]).triu(1).any(-1)
        slots = (torch.arange(num_new, device=codes.device) + self._next) % size
        self._ngrams[:, slots], self._codes[:, slots], self._is_alive[:, slots] = ngrams, codes, ~is_repeated
        self._next = (self._next + num_new) % size
        self._ages = (self._ages - num_new) % size

    def latest(self, first: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows `first [B]` in the latest `count` n-grams that begin with it, the latest first.

        Returns `[B, count, N - 1]` tokens and which of the n-grams exist, `[B, count]`.
        """
        is_wanted = self._is_alive & (self._ngrams[..., 0] == first[:, None])
        ages, slots = torch.where(is_wanted, self._ages, -1).topk(count)
        is_found = ages >= 0
        found = self._ngrams.gather(1, slots[..., None].expand(-1, -1, self._ngrams.shape[-1]))[..., 1:]
        return torch.where(is_found[..., None], found, 0), is_found
