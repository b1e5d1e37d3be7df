"""EAGLE drafting: chain, static tree (EAGLE-1) and dynamic tree (EAGLE-2, EAGLE-3) over one draft network.

The draft's cache holds slot t for every committed token but the last: slot t has read the target's feature at t and
the token at t + 1. Tree nodes are written behind and dropped; `observe` replaces them with slots of true features.
"""

from typing import Protocol

import torch

from draftwing.decoding.plan import RankPath, TreePlan
from draftwing.decoding.tree import DraftTree, root_tree
from draftwing.models.draft_vocab import DraftVocab
from draftwing.models.kv_cache import KVCache, LayerShape
from draftwing.models.layers import Attend, DraftConfig, Rotary, grouped_attention
from draftwing.models.target import visible_slots


class DraftModel(Protocol):
    """What EAGLE drafting asks of a network: models/eagle.py and models/eagle3.py."""

    config: DraftConfig
    vocab: DraftVocab
    rotary: Rotary

    def fuse(self, features: torch.Tensor) -> torch.Tensor: ...
    def __call__(
        self, hidden: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor: ...
    def feed_back(self, output: torch.Tensor) -> torch.Tensor: ...
    def logits(self, output: torch.Tensor) -> torch.Tensor: ...


class EagleDrafter:
    """Grows trees with an EAGLE network for B rows of at most `capacity` tokens, tree nodes included."""

    def __init__(
        self,
        model: DraftModel,
        feature_layers: tuple[int, ...],
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.feature_layers = feature_layers
        self._model = model
        self._vocab = model.vocab.to(device)
        config = model.config
        shape = LayerShape(config.num_key_value_heads, config.head_dim, config.head_dim)
        self._cache = KVCache([shape] * config.num_hidden_layers, batch_size, capacity, dtype, device)
        model.rotary.reserve(capacity + 1)
        self._last_output = torch.zeros(batch_size, config.hidden_size, dtype=dtype, device=device)

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor, most: int) -> None:
        assert features is not None
        length = tokens.shape[1]
        steps = torch.arange(length, device=tokens.device)
        causal = (steps[:, None] >= steps).expand(tokens.shape[0], length, length)
        hidden = self._model.fuse(features)
        output = self._forward(hidden, tokens, self._cache.lengths[:, None] + steps, causal)
        last = output.gather(1, (num_new - 1).clamp(min=0)[:, None, None].expand(-1, 1, output.shape[-1])).squeeze(1)
        self._last_output = torch.where((num_new > 0)[:, None], last, self._last_output)
        self._cache.commit(None, num_new, most)

    def grow(self, root: torch.Tensor, plan: TreePlan, longest: int) -> DraftTree:
        if plan.depth == 0:
            return root_tree(root)
        self._cache.bound = longest
        tree = self._grow_static(root, plan) if plan.paths else self._grow_dynamic(root, plan)
        # A row with nothing read yet (a prompt of one token) has no state to draft from.
        can_draft = (self._cache.lengths > 0)[:, None] | (tree.depths == 0)
        return DraftTree(tree.tokens, tree.parents, tree.depths, tree.valid & can_draft, tree.scores, tree.max_depth)

    def _grow_dynamic(self, root: torch.Tensor, plan: TreePlan) -> DraftTree:
        """EAGLE-2's expand and rerank (arXiv 2406.16858, 4.1-4.2): scores are sums of log-probabilities."""
        batch_size, width = root.shape[0], plan.width
        output = self._last_output[:, None]
        scores, tokens = (t.squeeze(1) for t in self._best_children(output, width))  # [B, K]
        hidden = self._model.feed_back(output).expand(-1, width, -1)
        frontier = torch.arange(width, device=root.device).expand(batch_size, width)  # candidate index of each
        all_tokens, all_scores = [tokens], [scores]
        all_parents = [torch.full_like(tokens, -1)]  # candidate index, -1 for the root
        branch = torch.eye(width, dtype=torch.bool, device=root.device).expand(batch_size, width, width)
        for level in range(1, plan.depth):
            output = self._draft_step(hidden, tokens, branch, level)
            child_scores, child_tokens = self._best_children(output, width)  # [B, K, K]
            child_scores = (scores[:, :, None] + child_scores).flatten(1)
            child_tokens = child_tokens.flatten(1)
            first = width + (level - 1) * width**2  # candidate index of this level's first child
            all_tokens.append(child_tokens)
            all_scores.append(child_scores)
            all_parents.append(frontier.repeat_interleave(width, dim=1))
            if level + 1 == plan.depth:
                break
            scores, chosen = child_scores.topk(width)
            tokens = child_tokens.gather(1, chosen)
            frontier = chosen + first
            parent = chosen // width
            hidden = self._model.feed_back(output).gather(1, parent[..., None].expand(-1, -1, output.shape[-1]))
            branch = _extend_branches(branch, parent)
        return _best_subtree(root, *(torch.cat(x, 1) for x in (all_tokens, all_scores, all_parents)), plan=plan)

    def _grow_static(self, root: torch.Tensor, plan: TreePlan) -> DraftTree:
        """EAGLE-1's fixed tree: node (.., r) is the r-th best child of its parent."""
        batch_size, device = root.shape[0], root.device
        inner = {path[:-1] for path in plan.paths}
        expanded: list[RankPath] = [()]  # the nodes whose children are being drafted
        output, branch = self._last_output[:, None], torch.zeros(batch_size, 1, 0, dtype=torch.bool, device=device)
        scores = torch.zeros(batch_size, 1, device=device)
        all_tokens, all_scores = [root[:, None]], [scores]
        for level, paths in enumerate(plan.levels, 1):
            child_scores, child_tokens = self._best_children(output, plan.width)  # [B, E, K]
            picks = [expanded.index(path[:-1]) * plan.width + path[-1] for path in paths]
            level_scores = (scores[:, :, None] + child_scores).flatten(1)[:, picks]
            level_tokens = child_tokens.flatten(1)[:, picks]
            all_scores.append(level_scores)
            all_tokens.append(level_tokens)
            if level == plan.depth:
                break
            kept = [index for index, path in enumerate(paths) if path in inner]
            parent = torch.tensor([expanded.index(paths[index][:-1]) for index in kept], device=device)
            branch = _extend_branches(branch, parent.expand(batch_size, -1))
            expanded, scores = [paths[index] for index in kept], level_scores[:, kept]
            output = self._draft_step(self._model.feed_back(output)[:, parent], level_tokens[:, kept], branch, level)
        number_of = {(): 0} | {path: number for number, path in enumerate(plan.paths, 1)}
        tokens, tree_scores = torch.cat(all_tokens, 1), torch.cat(all_scores, 1)
        parents = torch.tensor([0] + [number_of[path[:-1]] for path in plan.paths], device=device)
        depths = torch.tensor([0] + [len(path) for path in plan.paths], device=device)
        return DraftTree(
            tokens=tokens,
            parents=parents.expand_as(tokens),
            depths=depths.expand_as(tokens),
            valid=tree_scores.isfinite(),
            scores=tree_scores,
            max_depth=plan.depth,
        )

    def _best_children(self, output: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and target ids of the `width` best next tokens, `[B, K, width]` each."""
        logits = self._model.logits(output)
        log_probs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
        scores, draft_ids = log_probs.nan_to_num(nan=-torch.inf).topk(width)
        return scores, self._vocab.to_target(draft_ids)

    def _draft_step(self, hidden: torch.Tensor, tokens: torch.Tensor, branch: torch.Tensor, level: int) -> torch.Tensor:
        """Run the `level`-th level's nodes `[B, K]`; `branch [B, K, M]` says which drafted nodes each one reads."""
        position = self._cache.lengths[:, None] + level - 1
        offset = branch.shape[-1] - tokens.shape[1]
        return self._forward(hidden, tokens, position.expand_as(tokens), branch, offset)

    def _forward(
        self,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        branch: torch.Tensor,
        offset: int = 0,
    ) -> torch.Tensor:
        cache = self._cache
        num_read = cache.place(tokens.shape[1], offset)
        mask = visible_slots(cache.lengths, branch, num_read).unsqueeze(1)

        def attend(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            keys, values = cache.write(layer, keys, values, num_read)
            return grouped_attention(queries, keys, values, mask).transpose(1, 2).flatten(2)

        return self._model(hidden, tokens, positions.clamp(max=cache.capacity), attend)


def _extend_branches(branch: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """Branches of the next level: each node reads what its parent read, and itself.

    branch `[B, K, M]`, parent `[B, K']` (indices into K) -> `[B, K', M + K']`.
    """
    inherited = branch.gather(1, parent[..., None].expand(-1, -1, branch.shape[-1]))
    own = torch.eye(parent.shape[1], dtype=torch.bool, device=branch.device).expand(parent.shape[0], -1, -1)
    return torch.cat((inherited, own), dim=-1)


def _best_subtree(
    root: torch.Tensor, tokens: torch.Tensor, scores: torch.Tensor, parents: torch.Tensor, plan: TreePlan
) -> DraftTree:
    """The root and the best `num_nodes - 1` candidates `[B, M]`, which form a tree.

    A candidate scores at most what its parent does and comes after it, so a stable order takes parents first.
    """
    batch_size, num_candidates = tokens.shape
    order = scores.sort(dim=1, descending=True, stable=True).indices
    chosen = order[:, : plan.num_nodes - 1].sort(dim=1).values
    numbers = torch.arange(1, plan.num_nodes, device=root.device).expand_as(chosen)
    node_of = torch.zeros(batch_size, num_candidates + 1, dtype=torch.int64, device=root.device)
    node_of.scatter_(1, chosen + 1, numbers)  # column 0 is the root, for parent -1
    depth_of = torch.ones(num_candidates, dtype=torch.int64, device=root.device)
    for level in range(1, plan.depth):
        depth_of[plan.width + (level - 1) * plan.width**2 :] += 1
    root_column = torch.zeros_like(root)[:, None]
    tree_scores = torch.cat((root_column.to(scores.dtype), scores.gather(1, chosen)), 1)
    return DraftTree(
        tokens=torch.cat((root[:, None], tokens.gather(1, chosen)), 1),
        parents=torch.cat((root_column, node_of.gather(1, parents.gather(1, chosen) + 1)), 1),
        depths=torch.cat((root_column, depth_of[chosen]), 1),
        valid=tree_scores.isfinite(),
        scores=tree_scores,
        max_depth=plan.depth,
    )
