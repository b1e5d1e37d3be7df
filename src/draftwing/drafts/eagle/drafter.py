"""EAGLE drafting: one draft network run down the trees of growth.py.

The draft's cache holds slot t for every committed token but the last: slot t has read the target's feature at t and
the token at t + 1. Tree nodes are written behind and dropped; `observe` replaces them with slots of true features.
"""

from functools import partial

import torch

from draftwing.drafts.eagle.network import DraftNetwork
from draftwing.drafts.growth import RootedDraft, grow_tree
from draftwing.drafts.ngram import NgramDrafter
from draftwing.engine.drafter import Drafter, Ranking, Unread
from draftwing.engine.kernels import kernels_for
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import TreeShape
from draftwing.target.attention import CacheAttention
from draftwing.target.kv_cache import KVCache, LayerShape, visible_slots


class EagleDrafter(Drafter):
    """Grows trees with an EAGLE network for seats of at most `capacity` tokens, tree nodes included.

    With an `ngram` drafter, its continuations compete for the nodes of plans that have a lookup. The network reads the
    last `window` committed tokens only; None: as many as it was trained on.

    Raises:
        ValueError: a window below 1.
    """

    by_seat = ("_cache", "_last_output", "_unread", "_ngram")

    def __init__(
        self,
        model: DraftNetwork,
        num_seats: int,
        capacity: int,
        ngram: NgramDrafter | None = None,
        window: int | None = None,
    ) -> None:
        if window is not None and window < 1:
            raise ValueError(f"draft_window: expected at least 1, got {window}")
        config, dtype, device = model.config, model.dtype, model.rotary.cos.device
        self.bound = capacity
        self._ngram, self._window = ngram, window or config.window
        self.feature_layers = config.feature_layers
        self._model = model
        self._vocab = model.vocab.to(device)
        shape = LayerShape(config.num_key_value_heads, config.head_dim, config.head_dim)
        self._cache = KVCache([shape] * config.num_hidden_layers, num_seats, capacity, dtype, device)
        model.rotary.reserve(capacity + 1)
        self._last_output = torch.zeros(num_seats, config.hidden_size, dtype=dtype, device=device)
        feature_size = len(config.feature_layers) * config.target_hidden_size
        self._unread = Unread(num_seats, feature_size, dtype, device)

    def share(self, source: int, goal: int, num_tokens: int) -> None:
        self._cache.copy_seat(source, goal, num_tokens)
        self._cache.lengths[goal] = num_tokens
        if self._ngram is not None:
            self._ngram.share(source, goal, num_tokens)

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        if self._ngram is not None:
            self._ngram.observe(tokens, None, num_new)
        self._unread.add(tokens, features, num_new)

    def catch_up(self, num_unread: int) -> None:
        if num_unread == 0:
            return
        tokens, features, num_new = self._unread.take(num_unread)
        self._cache.bound = self.bound
        steps = torch.arange(num_unread, device=tokens.device)
        causal = (steps[:, None] >= steps).expand(len(tokens), num_unread, num_unread)
        visible = visible_slots(self._cache.lengths, causal, self._cache.num_read(num_unread))
        positions = self._cache.lengths[:, None] + steps
        if self._window < self._cache.capacity:
            visible &= torch.arange(visible.shape[-1], device=tokens.device) > positions[..., None] - self._window
        slots = self._cache.slots_behind(num_unread)
        output = self._forward(self._model.project(features), tokens, positions, visible, slots)
        last = output.gather(1, (num_new - 1).clamp(min=0)[:, None, None].expand(-1, 1, output.shape[-1])).squeeze(1)
        self._last_output.copy_(torch.where((num_new > 0)[:, None], last, self._last_output))
        self._cache.commit(None, num_new, max_kept=num_unread)

    def grow(self, root: torch.Tensor, plan: TreeShape, rank: Ranking) -> DraftTree:
        self._cache.bound = self.bound
        levels, output = _DraftedSlots(self._cache, plan.num_inner, self._window), self._last_output[:, None]

        def step(parent: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            nonlocal output
            hidden = self._model.feed_back(output)
            hidden = hidden.gather(1, parent[..., None].expand(-1, -1, hidden.shape[-1]))
            slots = levels.enter(parent)
            output = self._forward(hidden, tokens, levels.positions.expand_as(tokens), levels.visible, slots)
            return self._model.logits(output)

        draft = RootedDraft(self._model.logits(output), step, self._cache.lengths[:, None], self._vocab, rank)
        merge = None if self._ngram is None else partial(self._ngram.extend, longest=self.bound)
        # A row with nothing read yet (a prompt of one token) has no state to draft from.
        return grow_tree(root, plan, draft, merge).only_in(self._cache.lengths > 0)

    def _forward(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """The network over new nodes; `visible [B, N, S]` are the slots that each one reads."""
        attend = CacheAttention(self._cache, slots, visible.unsqueeze(1))
        output: torch.Tensor = self._model(hidden, tokens, positions.clamp(max=self._cache.capacity), attend)
        return output


class _DraftedSlots:
    """Positions, slots and visibility of the drafted nodes, level by level, behind the committed slots."""

    def __init__(self, cache: KVCache, num_nodes: int, window: int) -> None:
        self._kernels = kernels_for(cache.layer(0)[0])
        self._slots = cache.slots_behind(num_nodes)
        self._num_used = 0
        self._lengths = cache.lengths[:, None]
        self.positions = self._lengths - 1
        num_read = cache.num_read(num_nodes)
        ages = self._lengths - torch.arange(num_read, device=self._lengths.device)  # [B, S], 1 at the last committed
        self.visible = ((ages > 0) & (ages <= window))[:, None]  # [B, 1, S]

    def enter(self, parent: torch.Tensor) -> torch.Tensor:
        """Move on to a level of nodes with these parents `[B, K]`; each reads what its parent read, and itself.

        Returns the level's slots `[B, K]`.
        """
        first, self._num_used = self._num_used, self._num_used + parent.shape[1]
        self.positions = self.positions + 1
        slots = self._slots[:, first : self._num_used]
        if self._kernels:
            self.visible = self._kernels.inherit_slots(self.visible, parent, self._lengths, first)
            return slots
        inherited = self.visible.gather(1, parent[..., None].expand(-1, -1, self.visible.shape[-1]))
        own = self._lengths + torch.arange(first, self._num_used, device=parent.device)
        self.visible = inherited.scatter(2, own.clamp(max=inherited.shape[-1] - 1)[..., None], True)
        return slots
