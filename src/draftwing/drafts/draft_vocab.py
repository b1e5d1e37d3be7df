"""The draft model's output vocabulary: a subset of the target's tokens (EAGLE-3), or all of them."""

import torch


class DraftVocab:
    """Maps draft ids to target ids: `target_ids [Vd]` (int64, absolute ids), or the identity when it is None.

    The files' offsets (`d2t`) and mask (`t2d`) are translated in drafts/eagle/formats.py and nowhere else.
    """

    def __init__(self, target_ids: torch.Tensor | None, target_vocab_size: int) -> None:
        self.target_ids = target_ids
        self.target_vocab_size = target_vocab_size

    def __len__(self) -> int:
        return self.target_vocab_size if self.target_ids is None else self.target_ids.numel()

    def to_target(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Target ids of draft ids, any shape."""
        return draft_ids if self.target_ids is None else self.target_ids[draft_ids]

    def to(self, device: torch.device) -> "DraftVocab":
        """The same map on another device."""
        moved = None if self.target_ids is None else self.target_ids.to(device)
        return DraftVocab(moved, self.target_vocab_size)
