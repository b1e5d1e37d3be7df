"""Muon for the matrices of hidden layers, AdamW for all else, as one optimizer (docs/training.md compares the two).

torch's Muon takes matrices alone, so that two optimizers, schedules and checkpoints would be needed; and it works in
bfloat16, which takes a CPU without instructions for that 14 times as long as float32.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.775, 2.0315)
"""a, b, c of x -> a x + b x^3 + c x^5: five of these bring singular values from 0.003 to 1 to between 0.68 and 1.2."""
NUM_ITERATIONS = 5
RMS = 0.4
"""Root mean square of an update, for a learning rate of 1: twice AdamW's (arXiv 2502.16982, section 2.2)."""


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but matrices move by their momentum made orthogonal (Muon; arXiv 2502.16982).

    Args:
        groups: an AdamW's `param_groups`, whose settings are kept: one learning rate serves both.
        matrices: which of the parameters are Muon's.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], matrices: Collection[torch.Tensor]) -> None:
        apart = [
            {**group, "params": [x for x in group["params"] if (x in matrices) == is_muon], "is_muon": is_muon}
            for group in groups
            for is_muon in (True, False)
        ]
        super().__init__([group for group in apart if group["params"]])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all parameters by their gradients."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["is_muon"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for matrix in group["params"] if group["is_muon"] else ():
                if matrix.grad is not None:
                    self._move(matrix, matrix.grad, group["lr"], group["weight_decay"])

    def _move(self, matrix: nn.Parameter, gradient: torch.Tensor, learning_rate: float, weight_decay: float) -> None:
        state = self.state[matrix]
        if not state:
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(matrix)}  # torch loads no AdamW without
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


def hidden_matrices(model: nn.Module, output_matrices: Collection[torch.Tensor]) -> set[torch.Tensor]:
    """The weights of a model's linear layers that are trained, but for those that give logits."""
    weights = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return {weight for weight in weights - set(output_matrices) if weight.requires_grad}
