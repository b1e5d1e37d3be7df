"""Losses of draft heads. Every mean is over supervised slots only."""

import torch
from torch.nn import functional


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `values [B, S]` where `mask [B, S]`; 0 if nothing is supervised."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def soft_cross_entropy(logits: torch.Tensor, teacher_probs: torch.Tensor) -> torch.Tensor:
    """`-sum_v p(v) log q(v)` per slot: logits and teacher `[B, S, V]` -> `[B, S]`, in float32."""
    return -(teacher_probs * logits.float().log_softmax(-1)).sum(-1)


def feature_regression(predicted: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """EAGLE-1's smooth-L1 (EAGLE paper, 3.2), mean over the width: `[B, S, D]` twice -> `[B, S]`."""
    return functional.smooth_l1_loss(predicted.float(), features.float(), reduction="none").mean(-1)
