"""Log-probabilities of tokens, as the target gives them."""

from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """A token's log-probability, and the most probable tokens with theirs, the best first.

    They are the target's raw ones: log-softmax of its logits in float32, before anything warps them.
    """

    logprob: float
    top: list[tuple[int, float]]
