"""B rows being decoded: what they keep from cycle to cycle, and a cycle's three steps on it: draft, verify, commit.

State is updated where it lies and steps ask the host for nothing, so that they can be captured (captured.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from draftwing.decoding.drafters import Drafter
from draftwing.decoding.plan import TreePlan
from draftwing.decoding.sampling import Sampler, SamplingParams, uncoupled_rank
from draftwing.decoding.tree import DraftTree, Verdict, root_tree, walk
from draftwing.models.target import TargetModel

PREFILL_CHUNK = 512
MOST_UNREAD = 256
"""Positions that drafters may leave unread while drafts pause; features take memory, and reading many takes long."""

DrafterFactory = Callable[[int, int], Drafter]
"""Builds the drafter of a batch from its rows and their capacity in tokens (tree nodes included)."""


@dataclass(frozen=True)
class Verification:
    """What the target says of a tree: its own token at each node `chosen [B, N]`, the verdict, `features [B, N, F]`."""

    chosen: torch.Tensor
    verdict: Verdict
    features: torch.Tensor | None


class Rows:
    """Caches, drafter, sampler and roots of B rows of at most `capacity` tokens each, tree nodes included."""

    def __init__(self, target: TargetModel, new_drafter: DrafterFactory, batch_size: int, capacity: int) -> None:
        self.target, self.batch_size, self.capacity = target, batch_size, capacity
        self.drafter = new_drafter(batch_size, capacity)
        self._cache = target.new_cache(batch_size, capacity)
        self._root = torch.zeros(batch_size, dtype=torch.int64, device=target.device)
        self._active = torch.ones(batch_size, dtype=torch.bool, device=target.device)

    @property
    def num_bytes(self) -> int:
        """Memory of the target's cache."""
        return self._cache.num_bytes

    def begin(self, prompts: list[list[int]], params: Sequence[SamplingParams], depth: int, coupled: bool) -> None:
        """Read the prompts; later trees are at most `depth` deep, and ranked with the target's noise if `coupled`."""
        self._sampler = self._new_sampler(params, depth)
        self._rank = self._sampler.rank if coupled else uncoupled_rank
        self._prefill(prompts)

    @torch.inference_mode()
    def set_active(self, active: Sequence[bool]) -> None:
        """Say which rows still generate; nothing is committed for the others."""
        self._active.copy_(torch.tensor(active))

    def draft(self, plan: TreePlan, lengths: Sequence[int]) -> DraftTree:
        """Grow a tree below each row's root; `lengths` are the host's counts of committed tokens before the roots."""
        longest = max(lengths)
        self._sampler.reserve(lengths, plan.max_depth)
        if plan.depth == 0:
            self.drafter.catch_up(longest, at_least=MOST_UNREAD)
        return self._draft(plan, longest)

    def verify(self, tree: DraftTree, longest: int) -> Verification:
        """Run the target over a tree, choose its token at every node, and walk from the root."""
        self._cache.bound = longest
        output = self.target.forward_tree(
            tree.tokens, tree.depths, tree.ancestors, self._cache, self.drafter.feature_layers
        )
        chosen = self._sampler.choose(output.logits, tree, self._cache.lengths)
        return Verification(chosen, walk(tree, chosen), output.features)

    def commit(self, plan: TreePlan, tree: DraftTree, verification: Verification) -> None:
        """Keep what was accepted, and tell the drafter."""
        verdict = verification.verdict
        num_kept = torch.where(self._active, verdict.num_accepted + 1, 0)
        self._cache.commit(None if plan.is_chain else verdict.path, num_kept, max_kept=tree.max_depth + 1)
        features = None if verification.features is None else verdict.along_path(verification.features)
        self.drafter.see_choices(verification.chosen)
        self.drafter.observe(verdict.tokens, features, num_kept)
        self._sampler.observe(verdict.tokens, num_kept)
        self._root.copy_(torch.where(self._active, verdict.bonus, self._root))

    def release(self) -> None:
        """The generation is over; nobody uses these rows any more."""

    def _draft(self, plan: TreePlan, longest: int) -> DraftTree:
        if plan.depth == 0:
            return root_tree(self._root, plan.num_nodes)
        return self.drafter.grow(self._root, plan, longest, self._rank)

    def _new_sampler(self, params: Sequence[SamplingParams], depth: int) -> Sampler:
        return Sampler(params, self.target.vocab_size, self.target.device, depth)

    def _prefill(self, prompts: list[list[int]]) -> None:
        """Read all of the prompts but their last tokens, which become the roots of the first trees."""
        device = self.target.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = max(map(len, prompts))
        tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        self._sampler.observe(tokens, lengths)
        self.drafter.start(tokens[:, 0])
        following = tokens.roll(-1, dims=1)
        for start in range(0, longest - 1, PREFILL_CHUNK):
            # The roots pass as padding: so no chunk is a single token, whose product rounds differently from several's.
            chunk = slice(start, start + PREFILL_CHUNK)
            num_valid = (lengths - 1 - start).clamp(0, PREFILL_CHUNK)
            features = self.target.prefill(tokens[:, chunk], num_valid, self._cache, self.drafter.feature_layers)
            self.drafter.observe(following[:, chunk], features, num_valid)
            self.drafter.catch_up(start + PREFILL_CHUNK)
        self._root.copy_(tokens.gather(1, lengths[:, None] - 1).squeeze(1))


NewRows = Callable[[TargetModel, DrafterFactory, int, int], Rows]
"""Gives rows for a batch of so many with so much capacity: new ones, or such as have served before."""
