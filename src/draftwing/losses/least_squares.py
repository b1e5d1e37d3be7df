"""A linear map fitted to pairs of vectors that come in batches, possibly over several processes."""

from collections.abc import Callable

import torch

RIDGE = 1e-5
"""Share of each input's mean square that is added to it, so that a fit exists however few pairs there are."""


class LeastSquares:
    """The sums that a fit takes, in float64."""

    def __init__(self) -> None:
        self._of_inputs: torch.Tensor | float = 0.0
        self._of_both: torch.Tensor | float = 0.0

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Count pairs in: `inputs [U, F]`, `outputs [U, D]`."""
        inputs, outputs = inputs.double(), outputs.double()
        self._of_inputs = self._of_inputs + inputs.T @ inputs
        self._of_both = self._of_both + inputs.T @ outputs

    def solve(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums) -> torch.Tensor:
        """W `[F, D]` with the least squared error of `inputs @ W` (float64); `reduce` sums over processes.

        An input that was always 0 has weights of 0.
        """
        of_inputs, of_both = reduce(torch.as_tensor(self._of_inputs)), reduce(torch.as_tensor(self._of_both))
        ridge = RIDGE * of_inputs.diagonal()
        solution: torch.Tensor = torch.linalg.solve(of_inputs + torch.where(ridge > 0, ridge, 1.0).diag(), of_both)
        return solution
