"""Drafting with a second, smaller causal LM: classic speculative sampling (arXiv 2211.17192, 2302.01318).

The draft model's cache holds every committed token, the root included: `observe` reads the new ones, which leaves the
logits of the root's children. Drafted nodes are written behind, level by level, and dropped by not being counted.
"""

import torch

from draftwing.decoding.drafters import Drafter, Ranking
from draftwing.decoding.drafters.growth import RootedDraft, grow_tree
from draftwing.decoding.drafters.unread import Unread
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.tree import DraftTree
from draftwing.models.draft_vocab import DraftVocab
from draftwing.models.target import TargetModel


class DraftModelDrafter(Drafter):
    """Grows trees with a causal LM for B rows of at most `capacity` tokens, tree nodes included.

    Ids mean the same tokens to both models, but either may have more of them (padding of the embedding); candidates
    are the ids that both have. Acceptance is the engine's, by the target's own token: no draft probabilities are kept.
    """

    feature_layers: tuple[int, ...] = ()
    is_capturable = True

    def __init__(self, model: TargetModel, target_vocab_size: int, batch_size: int, capacity: int) -> None:
        self._model = model
        num_shared = min(model.vocab_size, target_vocab_size)
        shared_ids = None if num_shared == target_vocab_size else torch.arange(num_shared, device=model.device)
        self._vocab = DraftVocab(shared_ids, target_vocab_size)
        # Drafts need no exact sums: the model's own dtype instead of the one that targets attend in.
        self._cache = model.new_cache(batch_size, capacity, model.dtype)
        self._unread = Unread()
        self._root_logits = torch.zeros(batch_size, 1, num_shared, dtype=model.dtype, device=model.device)

    def reset(self) -> None:
        self._cache.clear()
        self._unread.take()

    def start(self, tokens: torch.Tensor) -> None:
        self.observe(tokens[:, None], None, torch.ones_like(tokens))

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        self._unread.add((tokens, None, num_new))

    def catch_up(self, longest: int, at_least: int = 1) -> None:
        for tokens, _, num_new in self._unread.take(at_least):
            self._cache.bound = longest + 1
            self._extend(tokens, num_new)
        self._cache.bound = longest + 1

    def _extend(self, tokens: torch.Tensor, num_new: torch.Tensor) -> None:
        batch_size, length = tokens.shape
        # Each row's last token once more, in the last column, where the output head runs on it alone.
        last = (num_new - 1).clamp(min=0)[:, None]
        columns = torch.arange(length + 1, device=tokens.device)
        depths = torch.cat((columns[:length].expand(batch_size, length), last), 1)
        ancestors = (columns < depths[:, :, None]) | (columns == columns[:, None])
        logits = self._logits(torch.cat((tokens, tokens.gather(1, last)), 1), depths, ancestors, last_logits_only=True)
        self._root_logits.copy_(torch.where((num_new > 0)[:, None, None], logits, self._root_logits))
        self._cache.commit(None, num_new, max_kept=length)

    def grow(self, root: torch.Tensor, plan: TreePlan, longest: int, rank: Ranking) -> DraftTree:
        self.catch_up(longest)
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
