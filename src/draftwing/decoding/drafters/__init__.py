"""Who grows the draft tree: the Drafter contract and its implementations."""

from typing import Protocol

import torch

from draftwing.decoding.plan import TreePlan
from draftwing.decoding.tree import DraftTree, root_tree


class Ranking(Protocol):
    """Scores a draft's candidates: log-probabilities `[B, K, Vd]` of being the target's token at `positions [B, 1]`.

    `logits [B, K, Vd]` are the draft's; `target_ids [Vd]` its tokens' target ids (None: the whole vocabulary).
    """

    def __call__(
        self, logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None
    ) -> torch.Tensor: ...


class Drafter(Protocol):
    """The drafting side of a cycle, for B rows. Speculation methods differ only here."""

    feature_layers: tuple[int, ...]
    """The numbers of the target's hidden states that `observe` wants; none for drafters that read tokens only."""

    is_capturable: bool = False
    """Whether all state is updated where it lies and read from there, so that a cycle can be captured."""

    def start(self, tokens: torch.Tensor) -> None:
        """Take in the prompts' first `tokens [B]`, which `observe` never brings."""

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        """Take in committed positions: the next `num_new [B]` of them, right-padded.

        `features [B, L, F]` are the target's at those positions and `tokens [B, L]` the tokens one position later.
        """

    def see_choices(self, chosen: torch.Tensor) -> None:
        """Take in the target's own token at every node of the tree grown last, `chosen [B, N]`, before `observe`.

        Most drafters have no use for what the target says along branches that were not accepted.
        """
        return

    def catch_up(self, longest: int, at_least: int = 1) -> None:
        """Read what `observe` has brought and `grow` not read yet, if it is `at_least` so many positions.

        `longest` is as for `grow`, which does this as well.
        """
        return

    def reset(self) -> None:
        """Forget everything, for other rows."""

    def grow(self, root: torch.Tensor, plan: TreePlan, longest: int, rank: Ranking) -> DraftTree:
        """Grow a tree below `root [B]`, the last committed token, of the shape that the plan, which drafts, asks for.

        `longest` is the host's count of the longest row's committed tokens, the root not included; `rank` scores
        candidates with what is known of the target's sampling.
        """


class NoDrafter(Drafter):
    """Plain decoding: the tree is its root."""

    feature_layers: tuple[int, ...] = ()
    is_capturable = True

    def reset(self) -> None:
        pass

    def start(self, tokens: torch.Tensor) -> None:
        pass

    def observe(self, tokens: torch.Tensor, features: torch.Tensor | None, num_new: torch.Tensor) -> None:
        pass

    def grow(self, root: torch.Tensor, plan: TreePlan, longest: int, rank: Ranking) -> DraftTree:
        return root_tree(root, plan.num_nodes)
