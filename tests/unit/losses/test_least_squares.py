"""A linear map from sums over batches: the one that made the pairs, however they come."""

import torch

from draftwing.losses.least_squares import LeastSquares


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs `[count, 5]`, of which one is always 0, what a linear map makes of them, and that map `[5, 3]`."""
    torch.manual_seed(0)
    inputs, weights = torch.randn(count, 5) * torch.tensor([0.01, 1.0, 30.0, 1.0, 0.0]), torch.randn(5, 3)
    weights[4] = 0
    return inputs, inputs @ weights, weights


def test_it_finds_the_map_whatever_the_inputs_sizes() -> None:
    inputs, outputs, weights = pairs(200)
    fit = LeastSquares()
    fit.add(inputs, outputs)
    torch.testing.assert_close(fit.solve().float(), weights, rtol=5e-3, atol=1e-3)
    assert fit.solve()[4].tolist() == [0, 0, 0]


def test_batches_and_processes_are_summed() -> None:
    inputs, outputs, _ = pairs(200)
    whole, halves, other = LeastSquares(), LeastSquares(), LeastSquares()
    whole.add(inputs, outputs)
    for part in (slice(0, 60), slice(60, 100)):
        halves.add(inputs[part], outputs[part])
    other.add(inputs[100:], outputs[100:])
    theirs = iter((other._of_inputs, other._of_both))
    torch.testing.assert_close(halves.solve(lambda sums: sums + next(theirs)), whole.solve())


def test_fewer_pairs_than_inputs_have_a_fit_too() -> None:
    inputs, outputs, _ = pairs(2)
    fit = LeastSquares()
    fit.add(inputs, outputs)
    torch.testing.assert_close((inputs.double() @ fit.solve()).float(), outputs, rtol=5e-3, atol=1e-3)
