"""Drafting with a second, smaller causal LM: classic speculative sampling (arXiv 2211.17192, 2302.01318).

The draft model's cache holds every committed token, the root included: `observe` reads the new ones, which leaves the
logits of the root's children. Drafted nodes are written behind, level by level, and dropped by not being counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from draftwing.drafts.eagle.formats import HeadOptions
from draftwing.drafts.family import Draft, DrafterOptions, DraftFiles, DraftReport, Kind, counted
from draftwing.drafts.fit import TargetSizes, Tensors, dtype_name
from draftwing.drafts.growth import RootedDraft, grow_tree
from draftwing.engine.drafter import Drafter, Ranking, Unread
from draftwing.engine.engine import NewDrafter
from draftwing.engine.tree import DraftTree
from draftwing.engine.tree_plan import TreeShape
from draftwing.layers import DraftVocab
from draftwing.target.fused import pack_target
from draftwing.target.load import empty_model, find_tokenizer, load_target
from draftwing.target.model import TargetModel


@dataclass(frozen=True, kw_only=True)
class ModelReport(DraftReport):
    """The facts of a causal language model as a draft.

    `num_parameters` counts tied weights once; `max_positions` is None where the configuration sets no limit,
    `target_vocab_size` where no target was named.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_positions: int | None
    target_vocab_size: int | None = None

    def rows(self) -> Iterator[tuple[str, str]]:
        yield "network", f"{self.architecture}, {counted(self.num_layers, 'layer')}, hidden size {self.hidden_size}"
        target_size = self.target_vocab_size
        of_target = "" if target_size is None else f"; the target has {target_size:,}"
        yield "vocabulary", f"{self.vocab_size:,} tokens{of_target}"
        yield "positions", "no limit" if self.max_positions is None else f"{self.max_positions:,}"

    @property
    def verdict(self) -> tuple[str, str]:
        checked = "" if self.target_vocab_size is None else ", and nothing contradicts the target's vocabulary"
        return "can draft", f"its cache can be rolled back{checked}"


class LanguageModel(Kind[TargetModel]):
    """A smaller model with the target's tokenizer; transformers reads its files."""

    reads_tensors = False

    def drafter(self, draft: TargetModel, target: TargetModel, wanted: DrafterOptions) -> NewDrafter:
        return lambda num_seats, num_slots: DraftModelDrafter(draft, target.vocab_size, num_seats, num_slots)

    def owns_files(self, values: Mapping[str, Any], tensors: Tensors) -> bool:
        return any(name.endswith("ForCausalLM") for name in values.get("architectures") or ())

    def owns(self, draft: Draft) -> bool:
        return isinstance(draft, TargetModel)

    def build(
        self, files: DraftFiles, target: TargetModel, dtype: torch.dtype | None, options: HeadOptions, tokenizer: Any
    ) -> TargetModel:
        folder, attention = str(files.folder), target.model.config._attn_implementation
        model = load_target(folder, dtype or target.dtype, target.device, role="draft", attn_implementation=attention)
        for problem in vocabulary_problems(model.vocab_size, target.vocab_size, find_tokenizer(folder), tokenizer):
            raise ValueError(problem)
        return model

    def prepack(self, draft: TargetModel, compiles: bool | None = None) -> TargetModel:
        return pack_target(draft, compiles)

    def network(self, draft: TargetModel) -> nn.Module:
        network: nn.Module = draft.model
        return network

    def config(self, draft: TargetModel) -> dict[str, Any]:
        values: dict[str, Any] = draft.config.to_dict()
        return values

    def places(self, draft: TargetModel) -> set[tuple[torch.dtype, torch.device]]:
        return {(draft.model.dtype, draft.model.device)}

    def dtype(self, draft: TargetModel, target: TargetModel) -> torch.dtype:
        """Any, but that in which it was taken."""
        dtype: torch.dtype = draft.dtype
        return dtype

    def feature_layers(self, draft: TargetModel) -> tuple[int, ...]:
        return ()

    def num_tokens(self, draft: TargetModel, target: TargetModel) -> int:
        return min(draft.vocab_size, target.vocab_size)

    def max_positions(self, draft: TargetModel) -> int | None:
        return draft.max_positions

    def inspect(self, files: DraftFiles, target: TargetSizes | None, target_name: str | None) -> ModelReport:
        folder, problems = str(files.folder), []
        model = empty_model(folder, role="draft")
        if target is not None and target_name is not None:
            tokenizers = find_tokenizer(folder), find_tokenizer(target_name)
            problems = vocabulary_problems(model.vocab_size, target.vocab_size, *tokenizers)
        return ModelReport(
            folder=folder,
            format="language_model",
            architecture=type(model.model).__name__,
            dtype=dtype_name(files.tensors),
            num_parameters=model.model.num_parameters(),
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            vocab_size=model.vocab_size,
            max_positions=model.max_positions,
            target_vocab_size=None if target is None else target.vocab_size,
            problems=problems,
        )


def vocabulary_problems(draft_size: int, target_size: int, draft_tokenizer: Any, target_tokenizer: Any) -> list[str]:
    """Why a draft model's ids may not mean the target's tokens; tokenizers are None where unknown.

    Two models of one tokenizer may still differ in size, by how far their embeddings are padded.
    """
    if draft_tokenizer is None or target_tokenizer is None:
        if draft_size == target_size:
            return []
        return [
            f"vocab_size: the draft model has {draft_size} tokens and the target {target_size}, "
            "and without the tokenizers of both their ids cannot be compared"
        ]
    draft_ids, target_ids = draft_tokenizer.get_vocab(), target_tokenizer.get_vocab()
    differing = [token for token, draft_id in draft_ids.items() if target_ids.get(token, draft_id) != draft_id]
    if not differing:
        return []
    first = min(differing, key=draft_ids.__getitem__)
    return [
        f"vocab_size: the draft model (of {draft_size} tokens) and the target (of {target_size}) have different "
        f"tokenizers: {first!r} is {draft_ids[first]} in the one and {target_ids[first]} in the other"
    ]


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

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
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

    def grow(self, root: torch.Tensor, plan: TreeShape, rank: Ranking) -> DraftTree:
        self._cache.bound = self.bound + 1
        levels = _DraftedNodes(root)

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


class _DraftedNodes:
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
