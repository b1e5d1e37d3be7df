"""Drafting with Medusa's heads (arXiv 2401.10774): every level of the tree comes from the last committed feature.

The last feature read is h_t of the token before the root, x_{t+1}. Head k predicts x_{t+2+k}, so head 0 drafts the
root's children. All nodes of a level have the same candidates, whatever their parents.
"""

import torch

from draftwing.drafts.growth import RootedDraft, grow_tree
from draftwing.drafts.medusa.network import MedusaModel
from draftwing.engine.drafter import Drafter, Ranking
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import TreeShape


class MedusaDrafter(Drafter):
    """Grows trees with Medusa's heads, of the target's `dtype`, by seat; deeper plans end with the heads."""

    by_seat = ("_hidden", "_lengths")

    def __init__(self, model: MedusaModel, num_seats: int, dtype: torch.dtype, device: torch.device) -> None:
        config = model.config
        self.feature_layers = config.feature_layers
        self._model = model
        self._hidden = torch.zeros(num_seats, config.hidden_size, dtype=dtype, device=device)
        self._lengths = torch.zeros(num_seats, dtype=torch.int64, device=device)

    def share(self, source: int, goal: int, num_tokens: int) -> None:
        self._lengths[goal] = num_tokens  # the feature is that of the last token read, which is none of these

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        assert features is not None
        last = (num_new - 1).clamp(min=0)[:, None, None].expand(-1, 1, features.shape[-1])
        self._hidden.copy_(torch.where((num_new > 0)[:, None], features.gather(1, last).squeeze(1), self._hidden))
        self._lengths += num_new

    def grow(self, root: torch.Tensor, plan: TreeShape, rank: Ranking) -> DraftTree:
        plan = plan.cut_to(len(self._model))
        hidden, heads = self._hidden[:, None], iter(self._model)

        def step(parent: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = next(heads)(hidden)
            return logits.expand(-1, tokens.shape[1], -1)

        root_logits = step(root[:, None], root[:, None])
        draft = _SharedDraft(root_logits, step, self._lengths[:, None], self._model.vocab, rank)
        # A row with nothing read yet (a prompt of one token) has no feature to draft from.
        return grow_tree(root, plan, draft).only_in(self._lengths > 0)


class _SharedDraft(RootedDraft):
    """A draft whose nodes of one level have the same logits: they are ranked once."""

    def best_children(self, logits: torch.Tensor, width: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        num_parents = logits.shape[1]
        log_probs, tokens = super().best_children(logits[:, :1], width, depth)
        return log_probs.repeat(1, num_parents, 1), tokens.repeat(1, num_parents, 1)
