"""From a model's output head to its logits: the scale or the soft cap that some families put behind the product."""

from dataclasses import dataclass
from typing import Any

import torch

SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Configuration keys of scales (Cohere, Falcon-H1, Granite) and the power in which they enter."""


@dataclass(frozen=True)
class LogitTransform:
    """`cap * tanh(scale * product / cap)`, or `scale * product` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """The transform that a Hugging Face configuration (its text part) asks for."""
        scale = 1.0
        for name, power in SCALES.items():
            scale *= float(getattr(config, name, None) or 1.0) ** power
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def apply(self, product: torch.Tensor) -> torch.Tensor:
        """Logits from the output head's product, any shape."""
        logits = product if self.scale == 1.0 else product * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def gradient(self, logits: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The product's gradient from that of `logits`, which `apply` returned."""
        if self.cap is not None:
            gradient = gradient * (1 - (logits / self.cap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale
