"""Some of a model's hidden states, by forward hooks; transformers would keep those of all layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def recording(decoder: nn.Module, num_layers: int, indices: set[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Record hidden_states of these indices (0 = embeddings, the last behind the final norm) from the pass inside."""
    states: dict[int, torch.Tensor] = {}

    def record(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[index] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    def record_input(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        states[0] = inputs[0] if inputs else options["hidden_states"]

    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    layers = next(layers for layers in lists if len(layers) == num_layers)
    hooks = [layers[index - 1].register_forward_hook(record(index)) for index in indices - {0, num_layers}]
    if 0 in indices:
        hooks.append(layers[0].register_forward_pre_hook(record_input, with_kwargs=True))
    if num_layers in indices:
        hooks.append(decoder.register_forward_hook(record(num_layers)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
