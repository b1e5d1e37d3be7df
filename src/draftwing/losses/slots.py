"""Which slots of a batch are supervised, where documents begin, and how many slots each step's mean is over."""

from dataclasses import dataclass

import torch


def document_positions(tokens: torch.Tensor, document_ids: torch.Tensor | None) -> torch.Tensor:
    """Positions of `tokens [B, S]` that restart wherever the document `[B, S]` changes; None: a row is a document."""
    slots = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    if document_ids is None:
        return slots
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return slots - torch.where(is_first, slots, 0).cummax(1).values


@dataclass(frozen=True)
class SupervisedSlots:
    """The U slots from which the target teaches: those whose next token is the model's to say.

    `teacher [U]` are indices into the batch's B * S slots, `positions [U]` those in their documents. The teacher at
    slot u is the target's distribution of x_{u+1}. The head predicts it at step j from slot u - 1 - j, which must lie
    in the same document. In one row:

        tokens   <user> hi <assistant> yes sir <end> (padding)
        mask       0     0      0       1   1    1      0
        teacher                 *       *   *
        step 0           *      *       *
        step 1     *     *      *

    The first slot of step 0 is the last prompt position but one: inference drafts from it too.
    """

    teacher: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, loss_mask: torch.Tensor, positions: torch.Tensor) -> "SupervisedSlots":
        """From `loss_mask [B, S]` over tokens and `positions [B, S]` in their documents."""
        is_teacher = torch.zeros_like(loss_mask, dtype=torch.bool)
        is_teacher[:, :-1] = loss_mask[:, 1:] & (positions[:, 1:] > 0) & (positions[:, :-1] > 0)
        teacher = is_teacher.flatten().nonzero().squeeze(1)
        return cls(teacher, positions.flatten()[teacher])

    def student(self, step: int) -> torch.Tensor:
        """Where the head predicts at a step what `teacher` knows, `[U]`; of no meaning where `valid` is False."""
        return (self.teacher - 1 - step).clamp(min=0)

    def valid(self, num_steps: int) -> torch.Tensor:
        """`[U, J]`: whether the head's slot lies in the document."""
        return self.positions[:, None] > torch.arange(num_steps, device=self.positions.device)
