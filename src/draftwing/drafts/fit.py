"""Whether what a file holds is complete: one sentence for each problem; and a network filled with it."""

from dataclasses import dataclass

import torch
from torch import nn

from draftwing.target.model import TargetModel

Tensors = dict[str, torch.Tensor]
BROKEN = "holds NaN or infinity"


@dataclass(frozen=True)
class TargetSizes:
    """What a draft's files leave to its target."""

    hidden_size: int
    num_layers: int
    vocab_size: int


def sizes_of(target: TargetModel) -> TargetSizes:
    """What a draft's files leave to this target."""
    return TargetSizes(target.hidden_size, target.num_layers, target.vocab_size)


def tensor_problems(expected: dict[str, torch.Size], tensors: Tensors) -> list[str]:
    """One sentence for each tensor that is missing, unknown or misshapen."""
    problems = [f"{name}: missing; expected shape {tuple(expected[name])}" for name in expected.keys() - tensors.keys()]
    problems += [
        f"{name}: unknown tensor of shape {tuple(tensors[name].shape)}" for name in tensors.keys() - expected.keys()
    ]
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name]:
            problems.append(f"{name}: expected shape {tuple(expected[name])}, got {tuple(tensors[name].shape)}")
    return sorted(problems)


def broken_tensors(tensors: Tensors) -> list[str]:
    """One sentence for each tensor with a number that is not finite."""
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    return [f"{name}: {BROKEN}" for name in sorted(broken)]


def check_finite(tensors: Tensors) -> None:
    """Raise a ValueError if a tensor holds NaN or infinity."""
    for problem in broken_tensors(tensors):
        raise ValueError(problem)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool((tensor if tensor.element_size() > 1 else tensor.float()).isfinite().all())  # float8 has no isfinite


def load_strictly(network: nn.Module, tensors: Tensors) -> None:
    """Copy the tensors into the network's parameters, each exactly once.

    Raises:
        ValueError: a tensor that is missing, unknown or misshapen.
    """
    expected = dict(network.named_parameters())
    shapes = {name: parameter.shape for name, parameter in expected.items()}
    for problem in tensor_problems(shapes, tensors):
        raise ValueError(problem)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


@torch.no_grad()
def embedding_rows(embedding: nn.Module) -> torch.Tensor:
    """What an embedding gives for every token `[V, D]`: its weights, which some models scale."""
    weight = embedding.get_parameter("weight")
    rows: torch.Tensor = embedding(torch.arange(len(weight), device=weight.device))
    return rows


def dtype_name(tensors: Tensors) -> str:
    """The dtype of the first tensor that holds no integers."""
    return str(next(t.dtype for t in tensors.values() if t.is_floating_point())).removeprefix("torch.")
