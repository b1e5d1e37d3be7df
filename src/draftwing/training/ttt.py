"""Training-time test (EAGLE-3, arXiv 2503.01840, section 3.2): the head trained on its own outputs, step after step.

At step j, slot t holds the head's output of step j - 1 at the same slot, reads token x_{t+1+j} and predicts
x_{t+2+j}. Its attention sees what drafting from slot t would see: the step-0 keys of slots <= t, which are made
from true features, and its own key of each later step.

    step  hidden at slot t          token      position  predicts   keys
    0     fused target features     x_{t+1}    t         x_{t+2}    step 0, slots <= t
    1     output of step 0, slot t  x_{t+2}    t + 1     x_{t+3}    those, and step 1, slot t
    2     output of step 1, slot t  x_{t+3}    t + 2     x_{t+4}    those, and step 2, slot t
"""

import math

import torch


class TttAttention:
    """The attention of all steps for one batch: an `Attend` that remembers earlier steps' keys and values."""

    def __init__(self) -> None:
        self._past: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """queries `[B, Hq, S, dim]`, keys and values `[B, Hk, S, dim]` of this step -> `[B, S, Hq * dim]`."""
        groups = queries.shape[1] // keys.shape[1]
        past = self._past.setdefault(layer, [])
        past.append((keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)))
        (first_keys, first_values), *own = past
        length = queries.shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=queries.device).tril()
        scores = (queries @ first_keys.transpose(2, 3)).masked_fill(~causal, -torch.inf)
        diagonal = [(queries * step_keys).sum(-1, keepdim=True) for step_keys, _ in own]
        weights = (torch.cat([scores, *diagonal], dim=-1) / math.sqrt(queries.shape[-1])).float().softmax(-1)
        weights = weights.to(values.dtype)
        output = weights[..., :length] @ first_values
        for index, (_, step_values) in enumerate(own, start=length):
            output = output + weights[..., index : index + 1] * step_values
        return output.transpose(1, 2).flatten(2)


def shift_left(x: torch.Tensor, steps: int) -> torch.Tensor:
    """`x[:, t + steps]` at t, zero (False) past the end; `[B, S, ...]`."""
    if steps == 0:
        return x
    return torch.cat((x[:, steps:], torch.zeros_like(x[:, :steps])), dim=1)
