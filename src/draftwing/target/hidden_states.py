"""Some of a model's hidden states, by forward hooks; transformers would keep those of all layers.

A model of n layers has hidden states 0 (the embeddings), 1 to n (the layers' outputs, all before the final norm) and -1
(behind the final norm). Files' conventions are translated in drafts/eagle/formats.py.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

NORMED = -1
"""The state behind the final norm, which the output head reads."""


@contextmanager
def recording(decoder: nn.Module, num_layers: int, wanted: Collection[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Record these hidden states, by their numbers, from the pass inside.

    Raises:
        ValueError: the decoder has no list of so many layers.
    """
    states: dict[int, torch.Tensor] = {}

    def record(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            states[index] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    def record_input(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        states[0] = inputs[0] if inputs else options["hidden_states"]

    hooks = []
    try:
        for index in {*wanted}:
            if index == NORMED:
                hooks.append(decoder.register_forward_hook(record(NORMED)))
            elif index == 0:
                first = _layers_of(decoder, num_layers)[0]
                hooks.append(first.register_forward_pre_hook(record_input, with_kwargs=True))
            else:
                hooks.append(_layers_of(decoder, num_layers)[index - 1].register_forward_hook(record(index)))
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _layers_of(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"target: {type(decoder).__name__} keeps its {num_layers} layers in no list, so features cannot be read"
    )
