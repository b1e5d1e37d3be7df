"""Losses of draft heads, per slot, with their gradients: the logits are gone before a backward pass could come.

    kl             -sum_v p(v) log q(v), the soft cross-entropy: KL(p, q) plus p's entropy, so its gradient is KL's
    cross_entropy  -log q(best), best being the target's likeliest token: what greedy decoding accepts
    lk             lambda KL(p, q) + (1 - lambda) (1 - a), lambda = exp(-eta a), a = sum_v min(P(v), q(v))

q is the draft's distribution, p the target's over the draft vocabulary (renormalised), P the target's own, so that `a`
is the rate at which sampled drafts are accepted. lambda is each slot's own and no gradient passes through it (LK:
arXiv 2602.23881, the hybrid).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from draftwing.config import Loss


@dataclass(frozen=True)
class TeacherProbs:
    """The target over the draft vocabulary at C slots.

    `target_probs [C, Vd]` (their sum may be below 1), the same renormalised in `draft_probs`, and `best [C]`, the draft
    id of the target's likeliest token, -1 where the draft vocabulary lacks it.
    """

    target_probs: torch.Tensor
    draft_probs: torch.Tensor
    best: torch.Tensor


@dataclass(frozen=True)
class SlotLosses:
    """`losses`, `acceptance` (sum of minima) and `hits` (draft argmax is `best`), all `[C, J]`; d loss / d logits."""

    losses: torch.Tensor
    acceptance: torch.Tensor
    hits: torch.Tensor
    gradient: torch.Tensor


SlotLoss = Callable[[torch.Tensor, TeacherProbs], SlotLosses]
"""The losses of J steps' draft logits `[C, J, Vd]` (float32 or wider) at the C slots of their teacher."""


def slot_loss(loss: Loss, lk_decay: float, compiles: bool = False) -> SlotLoss:
    """One of the losses, as written or compiled: a fifth of the time, after seconds of compiling."""
    return partial(torch.compile(slot_losses, dynamic=True) if compiles else slot_losses, loss, lk_decay)


def slot_losses(loss: Loss, lk_decay: float, logits: torch.Tensor, teacher: TeacherProbs) -> SlotLosses:
    """As `slot_loss` gives it."""
    log_probs = logits.log_softmax(-1)
    hits = log_probs.argmax(-1) == teacher.best[:, None]
    probs = log_probs.exp()
    target_probs, draft_probs = teacher.target_probs[:, None], teacher.draft_probs[:, None]
    acceptance = torch.minimum(probs, target_probs).sum(-1)
    best = teacher.best.clamp(min=0)[:, None, None].expand(-1, logits.shape[1], 1)
    if loss == "cross_entropy":
        losses = -log_probs.gather(-1, best).squeeze(-1)
        return SlotLosses(
            losses, acceptance, hits, probs.scatter_add_(-1, best, -torch.ones_like(best, dtype=probs.dtype))
        )
    soft = -(log_probs @ teacher.draft_probs.unsqueeze(-1)).squeeze(-1)
    if loss == "kl":
        return SlotLosses(soft, acceptance, hits, probs.sub_(draft_probs))
    assert loss == "lk"
    divergence = soft + torch.xlogy(draft_probs, draft_probs).sum(-1)
    weight = torch.exp(-lk_decay * acceptance)
    losses = weight * divergence + (1 - weight) * (1 - acceptance)
    # d a / d logit_k = q_k (m_k - sum_v m_v q_v), where m marks the v with q(v) < P(v), on which alone `a` depends.
    gained = torch.where(probs < target_probs, probs, 0)
    gained -= probs * gained.sum(-1, keepdim=True)
    gradient = probs.sub_(draft_probs).mul_(weight[..., None]).sub_(gained.mul_(1 - weight[..., None]))
    return SlotLosses(losses, acceptance, hits, gradient)


def feature_regression(predicted: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """EAGLE-1's smooth-L1 (EAGLE paper, 3.2), mean over the width: `[..., D]` twice -> `[...]`."""
    predicted, features = torch.broadcast_tensors(widen(predicted), widen(features))
    return functional.smooth_l1_loss(predicted, features, reduction="none").mean(-1)


def widen(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
