"""N-gram drafting: look the text's end up in the text before it and draft what followed there.

Prompt lookup decoding (LLMA, arXiv 2304.04487), as a drafter of its own or as further branches of another drafter's
tree. The index is the history itself: a lookup compares every position at once, 0.10 ms for one row of 1000 tokens on
one CPU core and 0.18 ms for 4000; merging takes 0.2 ms and learning from what came 0.06 ms more.
"""

from dataclasses import dataclass

import torch

from draftwing.by_seat import BySeat
from draftwing.drafts.family import DrafterOptions, Kind
from draftwing.engine.drafter import Drafter, Ranking
from draftwing.engine.engine import NewDrafter
from draftwing.engine.tree import Candidates, DraftTree, Overlap, best_subtree, follow, no_candidates
from draftwing.engine.tree_plan import TreeShape
from draftwing.target.model import TargetModel

LONGEST_MATCH = 8
"""Tokens of a match that are told apart; longer ones count as this long."""
NO_TOKEN = -1


class Ngram(Kind[None]):
    """Drafts from the text itself."""

    def drafter(self, draft: None, target: TargetModel, wanted: DrafterOptions) -> NewDrafter:
        return lambda num_seats, num_slots: NgramDrafter(num_seats, num_slots, target.device)


class NgramDrafter(Drafter):
    """Drafts the continuation of the text's longest earlier match, for seats of at most `capacity` tokens.

    The history is what `observe` has brought: a row's tokens but its prompt's first, the root included.
    """

    by_seat = ("_lengths", "_history", "_rates")

    def __init__(self, num_seats: int, capacity: int, device: torch.device) -> None:
        self.bound = capacity
        self._capacity = capacity
        self._lengths = torch.zeros(num_seats, dtype=torch.int64, device=device)
        # Padding before the first token, so that every position ends a match; one slot behind for writes of padding.
        shape = (num_seats, LONGEST_MATCH - 1 + capacity + 1)
        self._history = torch.full(shape, NO_TOKEN, dtype=torch.int64, device=device)
        self._rates = MatchRates(num_seats, device)
        self._proposed: Lookup | None = None

    def clear(self, seat: int, num_tokens: int) -> None:
        self._lengths[seat] = 0
        self._history[seat] = NO_TOKEN
        self._rates.clear(seat, num_tokens)

    def share(self, source: int, goal: int, num_tokens: int) -> None:
        self._history[goal] = self._history[source]
        self._lengths[goal] = num_tokens
        self._rates.clear(goal, num_tokens)  # learnt from another text

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        is_new = steps < num_new[:, None]
        if self._proposed is not None:
            self._rates.learn(self._proposed, tokens, is_new)
            self._proposed = None
        slots = torch.where(is_new, self._lengths[:, None] + steps, self._capacity)
        self._history.scatter_(1, slots + LONGEST_MATCH - 1, tokens)
        self._lengths += num_new

    def grow(self, root: torch.Tensor, plan: TreeShape, rank: Ranking) -> DraftTree:
        if not plan.is_chain:
            raise ValueError(f"plan: n-gram drafting has one continuation, so it takes chain:DEPTH, got {plan}")
        return best_subtree(root, self.extend(no_candidates(root), plan, self.bound), plan.num_nodes, plan.depth)

    def extend(self, candidates: Candidates, plan: TreeShape, longest: int) -> Candidates:
        """Merge a continuation of `plan.max_depth` tokens into the candidates of another drafter.

        For as long as its tokens are among them these score the better of both estimates; what is left of it is
        appended below. There are always `max_depth` new candidates; superfluous ones score -inf. `longest` is the
        host's count of the longest row's history.
        """
        tokens, match_lengths = self._look_up(plan.max_depth, longest)
        overlap = follow(candidates, tokens, plan.depth)
        self._proposed = Lookup(tokens, match_lengths, overlap.is_contested)
        return _merge(candidates, self._proposed, overlap, self._rates.log_rates(self._proposed))

    def _look_up(self, depth: int, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The continuation of the longest match, the most recent of equals; at the text's end it starts again.

        Returns a Lookup's tokens and match lengths.
        """
        length = max(longest, 1)
        endings = self._history.unfold(1, LONGEST_MATCH, 1)[:, :length]  # [B, S, G]: the tokens up to each position
        last = (self._lengths - 1).clamp(min=0)[:, None]
        ending = self._history.gather(1, last + torch.arange(LONGEST_MATCH, device=last.device))
        is_same = (endings == ending[:, None]).flip(-1)
        match_lengths = is_same.cumprod(-1, dtype=torch.uint8).sum(-1)  # [B, S]
        positions = torch.arange(length, device=last.device)
        # One number holds both orders: by length, then by position.
        best = torch.where(positions < last, match_lengths * length + positions, 0).amax(1, keepdim=True)
        match_length, end = best // length, best % length
        steps = torch.arange(depth, device=last.device)
        source = end + 1 + steps % (last - end).clamp(min=1)
        tokens = self._history.gather(1, source + LONGEST_MATCH - 1).clamp(min=0)
        # A token that is right makes the next one's match longer.
        return tokens, torch.where(match_length > 0, (match_length + steps).clamp(max=LONGEST_MATCH), 0)


@dataclass(frozen=True)
class Lookup:
    """A looked-up continuation of D tokens.

    Attributes:
        tokens: `[B, D]` token ids, one below the other.
        match_lengths: `[B, D]` tokens that match before each, if those above are right; 0 in rows without a match.
        is_contested: `[B, D]` whether another drafter proposes others in its place, and not this one.
    """

    tokens: torch.Tensor
    match_lengths: torch.Tensor
    is_contested: torch.Tensor

    @property
    def buckets(self) -> torch.Tensor:
        """`[B, D]` the kind of each token, for MatchRates."""
        return self.match_lengths + (LONGEST_MATCH + 1) * self.is_contested


class MatchRates(BySeat):
    """P(a looked-up token is right, those above it being right) by match length, learnt from each row's own text.

    Every committed token counts, whether the tree held the looked-up one or not. A token against which another drafter
    votes is right far less often (a tenth to a half as often on the embedded models), so it has rates of its own. The
    priors are Beta(l, 2) and Beta(l / 4, 5) for a match of l tokens, close to what was measured there.
    """

    by_seat = ("_counts",)

    def __init__(self, num_seats: int, device: torch.device) -> None:
        lengths = torch.arange(LONGEST_MATCH + 1, device=device).float()
        right = torch.cat((lengths, lengths / 4))
        wrong = torch.cat((torch.full_like(lengths, 2.0), torch.full_like(lengths, 5.0)))
        self._priors = torch.stack((right, wrong))
        self._counts = self._priors.repeat(num_seats, 1, 1)  # [B, right or wrong, bucket]

    def clear(self, seat: int, num_tokens: int) -> None:
        self._counts[seat] = self._priors

    def log_rates(self, lookup: Lookup) -> torch.Tensor:
        """The log of each token's rate, `[B, D]`; -inf without a match."""
        rates = (self._counts[:, 0] / self._counts.sum(1)).log()
        return rates.gather(1, lookup.buckets)

    def learn(self, lookup: Lookup, tokens: torch.Tensor, is_new: torch.Tensor) -> None:
        """Compare a lookup with the tokens `[B, L]` that came, those of `is_new [B, L]`."""
        depth = min(lookup.tokens.shape[1], tokens.shape[1])
        has_match = lookup.match_lengths[:, :depth] > 0
        is_right = lookup.tokens[:, :depth] == tokens[:, :depth]
        num_right = is_right.cumprod(1).sum(1, keepdim=True)
        steps = torch.arange(depth, device=tokens.device)
        is_tried = is_new[:, :depth] & has_match & (steps <= num_right)
        outcomes = torch.stack((is_tried & is_right, is_tried & ~is_right), 1).float()
        buckets = lookup.buckets[:, None, :depth].expand_as(outcomes)
        self._counts.scatter_add_(2, buckets, outcomes)


def _merge(candidates: Candidates, lookup: Lookup, overlap: Overlap, log_rates: torch.Tensor) -> Candidates:
    """The candidates with a lookup's tokens, whose conditional `log_rates [B, D]` are -inf in rows without a match."""
    num_candidates, depth = candidates.tokens.shape[1], lookup.tokens.shape[1]
    spare = log_rates.new_full((log_rates.shape[0], 1), -torch.inf)  # read and written where nothing is found
    scores = torch.cat((candidates.scores.nan_to_num(nan=-torch.inf), spare), 1)
    # A node's chain score is the best of: its own rate and its parent's score, and what the other drafter gives it.
    chain = log_rates.clamp(min=torch.finfo(log_rates.dtype).min / depth).cumsum(1)
    head_start = (scores.gather(1, overlap.nodes) - chain).cummax(1).values.clamp(min=0)
    chain = torch.where(log_rates.isfinite(), chain + head_start, -torch.inf).cummin(1).values  # rounding may raise one
    scores = scores.scatter_reduce(1, overlap.nodes, chain.to(scores.dtype), "amax")[:, :num_candidates]
    steps = torch.arange(depth, device=chain.device).expand_as(chain)
    nodes = torch.where(overlap.is_found, overlap.nodes, num_candidates + steps)
    return Candidates(
        tokens=torch.cat((candidates.tokens, lookup.tokens), 1),
        scores=torch.cat((scores, chain.masked_fill(overlap.is_found, -torch.inf)), 1),
        log_probs=torch.cat((candidates.log_probs, torch.full_like(log_rates, torch.nan)), 1),
        parents=torch.cat((candidates.parents, torch.full_like(nodes[:, :1], -1), nodes[:, :-1]), 1),
        depths=torch.cat((candidates.depths, steps + 1), 1),
    )
