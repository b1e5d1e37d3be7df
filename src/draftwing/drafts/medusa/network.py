"""Medusa's heads (arXiv 2401.10774, section 2.1): several predictions from one feature, each for a later token.

Head k reads the target's feature h_t (the final norm's output) and predicts x_{t+2+k}; the target's own head predicts
x_{t+1} from it. The heads do not see what the others have drafted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from draftwing.layers import DraftVocab


@dataclass(frozen=True)
class MedusaConfig:
    """Sizes of a set of heads; `num_layers` residual blocks in each."""

    hidden_size: int
    vocab_size: int
    num_heads: int
    num_layers: int = 1

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The number of the hidden state that is read: the final norm's output."""
        return (-1,)

    @property
    def draft_vocab_size(self) -> int:
        """All of the target's tokens can be drafted."""
        return self.vocab_size


class ResBlock(nn.Module):
    """`x + SiLU(linear(x))`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.silu(self.linear(x))


class MedusaModel(nn.ModuleList):
    """The heads: residual blocks, then an output matrix over the whole vocabulary. `self[k](hidden)` are logits."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(
            nn.Sequential(
                *(ResBlock(config.hidden_size) for _ in range(config.num_layers)),
                nn.Linear(config.hidden_size, config.vocab_size, bias=False),
            )
            for _ in range(config.num_heads)
        )
        self.config = config
        self.vocab = DraftVocab(None, config.vocab_size)

    @property
    def output_matrices(self) -> list[torch.Tensor]:
        """Each head's, `[V, D]`."""
        return [self.get_parameter(f"{head}.{self.config.num_layers}.weight") for head in range(len(self))]

    def start_from(self, target_rows: torch.Tensor) -> None:
        """Make every head predict what the target's output matrix `[V, D]` does, as training begins in the paper."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for matrix in self.output_matrices:
                matrix.copy_(target_rows)

    def forward(self, hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """Every head's logits `[..., V]` for `hidden [..., D]`."""
        return [head(hidden) for head in self]
