"""A linear map from batches of pairs: the one that made the pairs, however they come."""

import torch

from draftwing.drafts.eagle.objective import linear_fit


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs `[count, 5]`, of which one is always 0, what a linear map makes of them, and that map `[5, 3]`."""
    torch.manual_seed(0)
    inputs, weights = torch.randn(count, 5) * torch.tensor([0.01, 1.0, 30.0, 1.0, 0.0]), torch.randn(5, 3)
    weights[4] = 0
    return inputs, inputs @ weights, weights


def alone(sums: torch.Tensor) -> torch.Tensor:
    return sums


def test_it_finds_the_map_whatever_the_inputs_sizes() -> None:
    inputs, outputs, weights = pairs(200)
    fit = linear_fit([(inputs, outputs)], alone)
    torch.testing.assert_close(fit.float(), weights, rtol=5e-3, atol=1e-3)
    assert fit[4].tolist() == [0, 0, 0]


def test_batches_and_processes_are_summed() -> None:
    inputs, outputs, _ = pairs(200)
    batches = [(inputs[part], outputs[part]) for part in (slice(0, 60), slice(60, 100))]
    others = inputs[100:].double(), outputs[100:].double()
    theirs = iter((others[0].T @ others[0], others[0].T @ others[1]))
    fit = linear_fit(batches, lambda sums: sums + next(theirs))
    torch.testing.assert_close(fit, linear_fit([(inputs, outputs)], alone))


def test_fewer_pairs_than_inputs_have_a_fit_too() -> None:
    inputs, outputs, _ = pairs(2)
    fit = linear_fit([(inputs, outputs)], alone)
    torch.testing.assert_close((inputs.double() @ fit).float(), outputs, rtol=5e-3, atol=1e-3)
