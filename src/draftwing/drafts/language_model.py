"""Drafting with a second, smaller causal LM: classic speculative sampling (arXiv 2211.17192, 2302.01318).

The draft model's cache holds every committed token, the root included: `observe` reads the new ones, which leaves the
logits of the root's children. Drafted nodes are written behind, level by level, and dropped by not being counted.
"""

import numpy as np
import torch

from draftwing.drafts.draft_vocab import DraftVocab
from draftwing.drafts.growth import RootedDraft, grow_tree
from draftwing.engine.drafter import Drafter, Ranking
from draftwing.engine.plan import TreePlan
from draftwing.engine.tree import DraftTree
from draftwing.engine.unread import Unread
from draftwing.target.model import TargetModel


class DraftModelDrafter(Drafter):
    """Grows trees with a causal LM for seats of at most `capacity` tokens, tree nodes included.

    Ids mean the same tokens to both models, but either may have more of them (padding of the embedding); candidates
    are the ids that both have. Acceptance is the engine's, by the target's own token: no draft probabilities are kept.
    """

    by_seat = ("_cache", "_unread", "_num_begun", "_root_logits")

    def __init__(self, model: TargetModel, target_vocab_size: int, num_seats: int, capacity: int) -> None:
        self.bound = capacity
        self._model = model
        num_shared = min(model.vocab_size, target_vocab_size)
        shared_ids = None if num_shared == target_vocab_size else torch.arange(num_shared, device=model.device)
        self._vocab = DraftVocab(shared_ids, target_vocab_size)
        # Drafts need no exact sums: the model's own dtype instead of the one that targets attend in.
        self._cache = model.new_cache(num_seats, capacity, model.dtype)
        self._unread = Unread(num_seats, 0, model.dtype, model.device)
        self._num_begun = np.zeros(num_seats, dtype=np.int64)  # 1 while a prompt's first token is unread
        self._root_logits = torch.zeros(num_seats, 1, num_shared, dtype=model.dtype, device=model.device)

    def begin(self, seat: int, token: int) -> None:
        one = torch.ones(1, dtype=torch.int64, device=self._model.device)
        self._unread.part(seat, seat + 1).add(token * one[None], None, one)
        self._num_begun[seat] = 1

    def share(self, source: int, goal: int, num_tokens: int) -> None:
        self._cache.copy_seat(source, goal, num_tokens + 1)
        self._cache.lengths[goal] = num_tokens + 1

    def observe(
        self,
        tokens: torch.Tensor,
        features: torch.Tensor | None,
        num_new: torch.Tensor,
        chosen: torch.Tensor | None = None,
    ) -> None:
        self._unread.add(tokens, None, num_new)

    def catch_up(self, num_unread: int) -> None:
        num_unread += int(self._num_begun.max())
        self._num_begun[:] = 0
        if num_unread == 0:
            return
        self._cache.bound = self.bound + 1
        tokens, _, num_new = self._unread.take(num_unread)
        # Each row's last token once more, in the last column, where the output head runs on it alone.
        last = (num_new - 1).clamp(min=0)[:, None]
        columns = torch.arange(num_unread + 1, device=tokens.device)
        depths = torch.cat((columns[:num_unread].expand(len(tokens), num_unread), last), 1)
        ancestors = (columns < depths[:, :, None]) | (columns == columns[:, None])
        logits = self._logits(torch.cat((tokens, tokens.gather(1, last)), 1), depths, ancestors, last_logits_only=True)
        self._root_logits.copy_(torch.where((num_new > 0)[:, None, None], logits, self._root_logits))
        self._cache.commit(None, num_new, max_kept=num_unread)

    def grow(self, root: torch.Tensor, plan: TreePlan, rank: Ranking) -> DraftTree:
        self._cache.bound = self.bound + 1
        levels = _Levels(root)

        def step(parent: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            levels.enter(parent)
            return self._logits(tokens, levels.depths, levels.ancestors)

        draft = RootedDraft(self._root_logits, step, self._cache.lengths[:, None] - 1, self._vocab, rank)
        return grow_tree(root, plan, draft)

    def _logits(
        self, tokens: torch.Tensor, depths: torch.Tensor, ancestors: torch.Tensor, last_logits_only: bool = False
    ) -> torch.Tensor:
        """Logits over the shared ids; the target's ids that the draft model lacks are read as its last one."""
        tokens = tokens.clamp(max=self._model.vocab_size - 1)
        output = self._model.forward_tree(tokens, depths, ancestors, self._cache, last_logits_only=last_logits_only)
        return output.logits[..., : len(self._vocab)]


class _Levels:
    """The drafted nodes so far, level by level: `depths [B, M]`, and `ancestors [B, K, M]` of the last level's."""

    def __init__(self, root: torch.Tensor) -> None:
        self.depths = root.new_zeros(len(root), 0)
        self.ancestors = root.new_zeros(len(root), 1, 0, dtype=torch.bool)
        self._num_levels = 0

    def enter(self, parent: torch.Tensor) -> None:
        """Move on to a level of nodes with these parents `[B, K]`; depth 0 is that of the root's children."""
        inherited = self.ancestors.gather(1, parent[..., None].expand(-1, -1, self.ancestors.shape[-1]))
        own = torch.eye(parent.shape[1], dtype=torch.bool, device=parent.device)
        self.ancestors = torch.cat((inherited, own.expand(len(parent), -1, -1)), 2)
        self.depths = torch.cat((self.depths, torch.full_like(parent, self._num_levels)), 1)
        self._num_levels += 1
