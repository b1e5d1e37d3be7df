"""What an engine's seats keep from cycle to cycle, and a cycle's three steps on it: draft, verify, commit.

State is updated where it lies and the steps ask the host for nothing, so that they can be captured (captured.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from draftwing.by_seat import BySeat
from draftwing.engine.drafter import MOST_UNREAD, Drafter
from draftwing.engine.logprobs import Scores, ScoresOnHost
from draftwing.engine.readback import Array
from draftwing.engine.request import Seat
from draftwing.engine.sampling import Sampler, uncoupled_rank
from draftwing.engine.tree import DraftTree, Verdict, root_tree, walk
from draftwing.engine.tree_plan import TreeShape
from draftwing.target.model import TargetModel


@dataclass(frozen=True)
class Verification:
    """What the target says of a tree: its own token at each node `chosen [B, N]`, the verdict, `features [B, N, F]`.

    `scores` are those of the verdict's tokens, where they are asked for.
    """

    chosen: torch.Tensor
    verdict: Verdict
    features: torch.Tensor | None
    scores: Scores | None


class Seats(BySeat):
    """Caches, drafter, sampler and roots of B seats of at most `capacity` tokens each, tree nodes included.

    Trees are at most `depth` deep, and ranked with the target's noise if `coupled`.

    Attributes:
        lengths: `[B]` the host's counts of committed tokens before the roots.
        bound: of the running seats' lengths; what attention reads goes by it.
        scores_tokens: whether a cycle gathers its tokens' log-probabilities.
    """

    by_seat = ("cache", "drafter", "sampler", "_root", "_is_running", "lengths", "_num_read", "_num_written")

    def __init__(
        self, target: TargetModel, drafter: Drafter, num_seats: int, capacity: int, depth: int, coupled: bool
    ) -> None:
        self.target, self.drafter = target, drafter
        self.cache = target.new_cache(num_seats, capacity)
        self.sampler = Sampler(num_seats, target.vocab_size, target.device, depth)
        self._coupled, self._depth = coupled, depth
        self.scores_tokens = False
        self._root = torch.zeros(num_seats, dtype=torch.int64, device=target.device)
        self._is_running = torch.zeros(num_seats, dtype=torch.bool, device=target.device)
        self.lengths = np.zeros(num_seats, dtype=np.int64)
        self._num_read = np.zeros(num_seats, dtype=np.int64)  # of the committed tokens, by the drafter
        self._num_written = np.zeros(num_seats, dtype=np.int64)  # slots that hold something, trees included

    def can_hold(self, num_slots: int, depth: int) -> bool:
        """Whether a seat has so many slots, and trees may be so deep."""
        return self.cache.capacity >= num_slots and self._depth >= depth

    @property
    def bound(self) -> int:
        return self.cache.bound

    @bound.setter
    def bound(self, num_tokens: int) -> None:
        self.cache.bound = self.drafter.bound = num_tokens

    def admit(self, row: Seat) -> None:
        """Begin a row in a seat that is clear; its prompt is still unread."""
        self._admit_to_sampler(row)
        self.drafter.begin(row.index, row.request.prompt[0])

    def admit_behind(self, source: int, num_tokens: int, row: Seat) -> None:
        """Begin a row whose first `num_tokens` seat `source` has read; the token behind them is the same too.

        It may be the source's own seat, whose row has ended.
        """
        self._catch_up_alone(source)
        self._admit_to_sampler(row)
        seat = row.index
        self.cache.copy_seat(source, seat, num_tokens)
        self.cache.lengths[seat] = num_tokens
        self.drafter.share(source, seat, num_tokens)
        self.lengths[seat] = self._num_read[seat] = num_tokens
        self._num_written[seat] = max(self._num_written[seat], num_tokens + 1)

    def _admit_to_sampler(self, row: Seat) -> None:
        request = row.request
        self.sampler.admit(row.index, request.sampling, request.prompt, request.stop, row.grammar)

    def vacate(self, seat: int) -> None:
        """Clear a seat of all that it holds."""
        self.clear(seat, int(self._num_written[seat]) + 1)

    def settle(self, seat: int) -> None:
        """End a row, whose text stays: the drafter has read all of it, and nothing of its sampling is left."""
        self._catch_up_alone(seat)
        self._is_running[seat] = False
        self.sampler.clear(seat, 0)

    def go_on(self, row: int, seat: int) -> None:
        """Let a row go on in another seat, whose text, if it keeps one, takes the row's own seat."""
        num_tokens = int(max(self._num_written[row], self._num_written[seat])) + 1
        self.exchange(row, seat, num_tokens)

    def read(self, prompts: Sequence[Sequence[int]], width: int, scores: bool = False) -> ScoresOnHost | None:
        """Read on in each seat's prompt, up to `width` tokens, but for its last one.

        With `scores`, returns the log-probabilities of the tokens behind those.
        """
        device = self.target.device
        chunks = [
            list(prompt[start : start + width + 1])
            for prompt, start in zip(prompts, self.lengths.tolist(), strict=True)
        ]
        num_valid = np.array([min(len(chunk) - 1, width) for chunk in chunks])
        # The token behind passes as padding: so no chunk is a single token, whose product rounds differently.
        tokens = torch.tensor([chunk + [0] * (width + 1 - len(chunk)) for chunk in chunks], device=device)
        counts = torch.from_numpy(num_valid).to(device)
        self.bound = int(self.lengths.max())
        self._num_written[:] = np.maximum(self._num_written, self.lengths + width + 1)
        output = self.target.prefill(tokens, counts, self.cache, self.drafter.feature_layers, scores)
        self.bound = int((self.lengths + num_valid).max())
        self.drafter.observe(tokens.roll(-1, dims=1), output.features, counts)
        self.drafter.catch_up(width)
        self.lengths += num_valid
        self.mark_read()
        if not scores:
            return None
        on_device = Scores.of(output.logits[:, :-1], tokens[:, 1:])
        return ScoresOnHost(*(part.numpy(force=True) for part in on_device))

    def start(self, seat: int, root: int) -> None:
        """Let a seat run whose prompt has been read up to its last token, the root of the first tree."""
        self._root[seat] = root
        self._is_running[seat] = True

    def draft(self, plan: TreeShape) -> DraftTree:
        """Grow a tree below each root, or for a plan without drafts the root alone."""
        self.prepare(plan)
        return self.grow(plan)

    def prepare(self, plan: TreeShape) -> None:
        """What the host does before a tree is grown: make noise, and let the drafter read what it has not."""
        self.sampler.reserve(self.lengths.tolist(), plan.max_depth)
        self._num_written[:] = np.maximum(self._num_written, self.lengths + room_for(plan))
        if plan.depth or int((self.lengths - self._num_read).max()) >= MOST_UNREAD:
            self.catch_up()

    def catch_up(self) -> None:
        """Let the drafter read what was committed since it last did."""
        num_unread = int((self.lengths - self._num_read).max())
        self._num_written[:] = np.maximum(self._num_written, self.lengths + num_unread + 2)
        self.drafter.catch_up(num_unread)
        self.mark_read()

    def _catch_up_alone(self, seat: int) -> None:
        part = self.part(seat, seat + 1)
        part.bound = int(part.lengths[0])
        part.catch_up()

    def grow(self, plan: TreeShape) -> DraftTree:
        if plan.depth == 0:
            num_seats = len(self.lengths)
            return root_tree(self._root, self.target.best_single_row if num_seats == 1 else 1)
        return self.drafter.grow(self._root, plan, self.sampler.rank if self._coupled else uncoupled_rank)

    def verify(self, tree: DraftTree) -> Verification:
        """Run the target over a tree, choose its token at every node, and walk from the root."""
        output = self.target.forward_tree(
            tree.tokens, tree.depths, tree.ancestors, self.cache, self.drafter.feature_layers
        )
        chosen = self.sampler.choose(output.logits, tree, self.cache.lengths)
        verdict = walk(tree, chosen)
        scores = Scores.of(verdict.along_path(output.logits), verdict.tokens) if self.scores_tokens else None
        return Verification(chosen, verdict, output.features, scores)

    def commit(self, plan: TreeShape, tree: DraftTree, verification: Verification) -> None:
        """Keep what was accepted, and tell the drafter."""
        verdict = verification.verdict
        num_kept = torch.where(self._is_running, verdict.num_accepted + 1, 0)
        self.cache.commit(None if plan.is_chain else verdict.path, num_kept, max_kept=tree.max_depth + 1)
        features = None if verification.features is None else verdict.along_path(verification.features)
        if plan.depth:  # a tree of the root alone was not the drafter's
            self.drafter.see_choices(verification.chosen, num_kept)
        self.drafter.observe(verdict.tokens, features, num_kept)
        self.sampler.observe(verdict.tokens, num_kept)
        self._root.copy_(torch.where(self._is_running, verdict.bonus, self._root))

    @contextmanager
    def nobody_running(self) -> Iterator[None]:
        """Cycles inside commit nothing."""
        running = self._is_running.clone()
        self._is_running.fill_(False)
        try:
            yield
        finally:
            self._is_running.copy_(running)

    def mark_read(self) -> None:
        """Tell the host's counts that the drafter has read all that was committed."""
        self._num_read[:] = self.lengths

    def count(self, num_committed: Array) -> None:
        """Tell the host's counts what a commit has kept in the first seats."""
        self.lengths[: len(num_committed)] += num_committed


def room_for(plan: TreeShape) -> int:
    """Slots behind the committed tokens that a cycle may write: the tree or the draft's levels."""
    return max(plan.num_nodes, plan.width * plan.max_depth) + plan.max_depth + 1
