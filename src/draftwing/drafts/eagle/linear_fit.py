"""The linear map that estimates vectors best from others, from batches of pairs."""

from collections.abc import Callable, Iterable

import torch

RIDGE = 1e-5
"""Share of each input's mean square that is added to it, so that a fit exists however few pairs there are."""


def linear_fit(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], sum_over: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """W `[F, D]` with the least squared error of `inputs @ W` against `outputs` (float64).

    An input that is always 0 has weights of 0.

    Args:
        pairs: `inputs [U, F]` and `outputs [U, D]`, batch by batch.
        sum_over: sums over the processes that have pairs.
    """
    of_inputs: torch.Tensor | float = 0.0
    of_both: torch.Tensor | float = 0.0
    for inputs, outputs in pairs:
        inputs, outputs = inputs.double(), outputs.double()
        of_inputs += inputs.T @ inputs
        of_both += inputs.T @ outputs
    assert isinstance(of_inputs, torch.Tensor) and isinstance(of_both, torch.Tensor)
    of_inputs, of_both = sum_over(of_inputs), sum_over(of_both)
    ridge = RIDGE * of_inputs.diagonal()
    weights: torch.Tensor = torch.linalg.solve(of_inputs + torch.where(ridge > 0, ridge, 1.0).diag(), of_both)
    return weights
