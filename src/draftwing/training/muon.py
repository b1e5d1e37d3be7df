"""Muon for the matrices of hidden layers, AdamW for all else, as one optimizer (docs/training.md compares the two).

torch has Muon for matrices alone, so that two optimizers, schedules and checkpoints would be needed; and it works in
bfloat16, which took 14 times as long as float32 on a CPU that has no products of it.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.775, 2.0315)
"""a, b, c of x -> a x + b x^3 + c x^5: five of these bring singular values from (0, 1] to between 0.7 and 1.2."""
NUM_ITERATIONS = 5
RMS = 0.4
"""Root mean square of an update, for a learning rate of 1: twice AdamW's (arXiv 2502.16982, section 2.2), which
draft heads learnt more from than from as much."""


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but matrices of hidden layers move by their momentum made orthogonal (Muon; arXiv 2502.16982).

    Those are the weights of linear layers that give no logits: whose outputs are as many as none of `vocab_sizes`. One
    learning rate is fit for both.
    """

    def __init__(self, model: nn.Module, vocab_sizes: Collection[int], weight_decay: float, **options: Any) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        hidden = {module.weight: None for module in layers if module.out_features not in vocab_sizes}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [x for x in trained if x in hidden], "is_muon": True, "weight_decay": weight_decay},
            {"params": [x for x in trained if x not in hidden], "is_muon": False, "weight_decay": 0.0},
        ]
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all parameters by their gradients."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["is_muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for matrix in group["params"] if group["is_muon"] else ():
                if matrix.grad is not None:
                    self._move(matrix, matrix.grad, group["lr"], group["weight_decay"])

    def _move(self, matrix: nn.Parameter, gradient: torch.Tensor, learning_rate: float, weight_decay: float) -> None:
        state = self.state[matrix]
        if not state:
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(matrix)}  # AdamW wants to load a step
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonal(gradient.lerp(momentum, MOMENTUM))  # Nesterov's
        matrix.mul_(1 - learning_rate * weight_decay)
        matrix.add_(update.to(matrix.dtype), alpha=-learning_rate * RMS * max(matrix.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix `[M, N]` with the singular vectors of this one, and singular values of about 1 (Newton-Schulz)."""
    a, b, c = QUINTIC
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: torch.Tensor = matrix.T if is_tall else matrix
    x = (x / x.norm().clamp(min=torch.finfo(torch.float32).tiny)).to(torch.bfloat16 if x.is_cuda else torch.float32)
    for _ in range(NUM_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if is_tall else x
