"""The target's own token at every node: warped logits plus noise that is fixed before anything is drafted.

At temperature > 0 the choice is `argmax(log p + g)` (the Gumbel-max trick), with noise g (noise.py). It draws exactly
from p, and plain and speculative decoding draw the very same tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from types import ModuleType
from typing import Any

import numpy as np
import torch

from draftwing.by_seat import BySeat
from draftwing.engine.drafter import Scored
from draftwing.engine.grammar import Grammar, forbid
from draftwing.engine.kernels import kernels_for
from draftwing.engine.noise import KeptNoise, Noise
from draftwing.engine.penalties import Penalties
from draftwing.engine.stepwise import Place, choose_in_steps
from draftwing.engine.stopping import StopRule
from draftwing.engine.tree import DraftTree

LOGIT_ERROR = 0.8
"""Scale of a head's errors in log-probability at temperature 1, fitted on traces (benchmarks/fit_coupling.py)."""


@dataclass(frozen=True)
class SamplingParams:
    """How one row chooses its tokens, in the order and with the meaning of transformers.

    `logit_bias` is added and the penalties are applied first; then, at temperature > 0, temperature, top-k, top-p and
    min-p. Temperature 0 is greedy, and so is one below COLDEST.

    Raises:
        ValueError: a value out of range, naming the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that hold this share together, and those that tie with the last of them: which of
    equal ones transformers drops is its sort's choice, on each device another."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the row has generated, as OpenAI's interface defines it."""
    frequency_penalty: float = 0.0
    """The same, once for each time."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> added to its logit."""
    seed: int = 0
    place: Place | None = None
    """Who chooses the tokens instead; of the fields above the seed counts, others only rank drafts."""

    @property
    def counts(self) -> bool:
        """Whether it matters how often a token was generated."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def check(self, vocab_size: int) -> None:
        """Raise a ValueError for parameters that do not fit a vocabulary of so many ids."""
        for token in self.logit_bias:
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias: token {token} is outside the vocabulary of {vocab_size}")

    def __post_init__(self) -> None:
        penalty = self.repetition_penalty
        _require("temperature", self.temperature, lambda t: 0 <= t <= LARGEST, "at least 0, and a float32")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        _require("top_k", self.top_k, lambda k: isinstance(k, int) and 0 <= k < 2**63, "an integer from 0 to 2^63-1")
        _require("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1")
        _require("min_p", self.min_p, lambda p: 0 <= p <= 1, "from 0 to 1")
        _require("repetition_penalty", penalty, lambda r: 0 < r <= LARGEST, "above 0, and a float32")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(name, getattr(self, name), lambda p: abs(p) <= LARGEST, "a finite float32")
        _require("seed", self.seed, lambda s: isinstance(s, int) and 0 <= s < 2**63, "an integer from 0 to 2^63-1")
        for token, bias in self.logit_bias.items():
            if not isinstance(token, Integral):
                raise ValueError(f"logit_bias: expected token ids as keys, got {token!r}")
            _require(f"logit_bias[{token}]", bias, lambda b: b <= LARGEST, "a number below infinity")


LARGEST = torch.finfo(torch.float32).max
"""Of what is kept in float32 by seat."""
COLDEST = 1e-30
"""Logits by a smaller temperature are beyond float32."""


def _require(name: str, value: object, ok: Callable[[Any], bool], expected: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not ok(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax in float32, or in float64 if the logits are."""
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


@dataclass(frozen=True)
class UnreadScores:
    """What `in_full` would compute from a draft's logits, of which `kernels` compute no more than the best.

    With `noise` that is the coupled ranking of Sampler.rank, over the draft's `target_ids`.
    """

    kernels: ModuleType
    logits: torch.Tensor
    in_full: Callable[[], torch.Tensor]
    noise: KeptNoise | None = None
    target_ids: torch.Tensor | None = None

    def topk(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best, `[B, K, k]`, and their ids."""
        if k > self.kernels.MOST_FOUND:
            best, ids = self.in_full().topk(k)
        else:
            best, ids = self.kernels.top_tokens(self.logits, k, self.noise, self.target_ids, LOGIT_ERROR)
        return best, ids


def uncoupled_rank(logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> Scored:
    """The papers' ranking: the draft's log-probabilities at temperature 1, whatever the target's sampling."""
    in_full = partial(log_probabilities, logits)
    kernels = kernels_for(logits)
    return UnreadScores(kernels, logits, in_full) if kernels else in_full()


NO_END = StopRule(1)
"""Holds back no ends."""
COLUMNS = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float32,
    "min_p": torch.float32,
}
"""The parameters that a device reads, one number a seat."""


@dataclass(frozen=True)
class SamplingWork:
    """What some row of a batch asks for; a cycle does nothing else."""

    draws: bool
    has_bias: bool
    has_repetition: bool
    has_counts: bool
    holds_ends: bool
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool

    @property
    def changes(self) -> bool:
        """Whether the choice is not among the target's logits as they are, with noise or without."""
        return self.cuts or self.has_bias or self.has_repetition or self.has_counts or self.holds_ends

    @property
    def cuts(self) -> bool:
        """Whether tokens are ruled out by their probabilities."""
        return self.has_top_k or self.has_top_p or self.has_min_p

    @staticmethod
    def of(params: Iterable[SamplingParams], holds_ends: bool = False) -> "SamplingWork":
        """The work for rows with these parameters, some of which may have their ends held back."""
        params = list(params)
        return SamplingWork(
            draws=any(p.temperature > 0 for p in params),
            has_bias=any(p.logit_bias for p in params),
            has_repetition=any(p.repetition_penalty != 1 for p in params),
            has_counts=any(p.counts for p in params),
            holds_ends=holds_ends,
            has_top_k=any(p.top_k for p in params),
            has_top_p=any(p.top_p < 1 for p in params),
            has_min_p=any(p.min_p > 0 for p in params),
        )


class Sampler(BySeat):
    """Chooses the target's token at every node, by each seat's own parameters.

    Owns the rows' noise, and what penalties need of their texts. `depth` is that of the deepest tree to choose on.
    `work` is what some of its seats ask for.
    """

    by_seat = (*(f"_{name}" for name in COLUMNS), "_penalties", "_bias", "_noise", "_params", "_grammars")
    _temperature: torch.Tensor  # [B, 1, 1], as the other columns
    _top_k: torch.Tensor
    _top_p: torch.Tensor
    _min_p: torch.Tensor

    def __init__(self, num_seats: int, vocab_size: int, device: torch.device, depth: int = 0) -> None:
        for name, dtype in COLUMNS.items():
            neutral = getattr(SamplingParams(), name)
            setattr(self, f"_{name}", torch.full((num_seats, 1, 1), neutral, dtype=dtype, device=device))
        self._penalties = Penalties(num_seats, vocab_size, device)
        self._bias: torch.Tensor | None = None  # made when a row asks for it
        self._noise = Noise(num_seats, vocab_size, device, depth + 2)
        self._params = np.full(num_seats, SamplingParams(), dtype=object)
        self._grammars = np.full(num_seats, None, dtype=object)
        self._vocab_size, self._device = vocab_size, device
        self.work = SamplingWork.of(self._params)
        self._places: list[Place] = []
        self._has_grammar = False

    @staticmethod
    def of(params: Sequence[SamplingParams], vocab_size: int, device: torch.device, depth: int = 0) -> "Sampler":
        """A sampler whose seats have these parameters, and no prompts."""
        sampler = Sampler(len(params), vocab_size, device, depth)
        for seat, one in enumerate(params):
            sampler.admit(seat, one, ())
        return sampler.part(0, len(params))

    def part(self, first: int, last: int) -> "Sampler":
        part = super().part(first, last)
        part.work = SamplingWork.of(part._params, bool(part._penalties.holds.any()))
        part._places = [params.place for params in part._params if params.place is not None]
        assert len(part._places) in (0, last - first)
        part._has_grammar = any(grammar is not None for grammar in part._grammars)
        return part

    def exchange(self, first: int, second: int, num_tokens: int) -> None:
        """Move the first seat's row to the second, where none runs: noise is large, and is copied once."""
        self.copy_seat(first, second, num_tokens)
        self.clear(first, num_tokens)

    def clear(self, seat: int, num_tokens: int) -> None:
        self.admit(seat, SamplingParams(), ())
        self._noise.clear(seat, num_tokens)

    def admit(
        self,
        seat: int,
        params: SamplingParams,
        prompt: Sequence[int],
        stop: StopRule = NO_END,
        grammar: Grammar | None = None,
    ) -> None:
        """Begin a row with these parameters in a seat; `stop` says which ends are held back."""
        self._params[seat], self._grammars[seat] = params, grammar
        for name in COLUMNS:
            getattr(self, f"_{name}")[seat] = getattr(params, name)
        self._penalties.admit(seat, params, prompt, stop)
        if params.logit_bias and self._bias is None:
            self._bias = torch.zeros(len(self._params), 1, self._vocab_size, dtype=torch.float32, device=self._device)
        if self._bias is not None:
            self._bias[seat] = 0
            if params.logit_bias:
                tokens = torch.tensor([*params.logit_bias], device=self._device)
                self._bias[seat, 0, tokens] = torch.tensor(
                    [*params.logit_bias.values()], dtype=torch.float32, device=self._device
                )
        if params.temperature > 0:
            self._noise.admit(seat, params.seed)

    def reserve(self, lengths: Sequence[int], depth: int) -> None:
        """Prepare the noise for a tree of `depth` whose roots have positions `lengths`."""
        for seat, (params, length) in enumerate(zip(self._params, lengths, strict=True)):
            if params.temperature > 0:
                # The root's own position (never read), the levels, the bonus.
                self._noise.reserve(seat, int(length), depth + 2)

    def observe(self, tokens: torch.Tensor, num_valid: torch.Tensor) -> None:
        """Record the first `num_valid [B]` of the emitted tokens `[B, L]`, for penalties."""
        self._penalties.observe(tokens, num_valid, self.work)

    def choose(self, logits: torch.Tensor, tree: DraftTree, lengths: torch.Tensor) -> torch.Tensor:
        """The target's token at each node of the tree, `[B, N]`; ties go to the lowest id.

        Rows with a place are asked along the accepted path alone; see `choose_in_steps`.

        Args:
            logits: `[B, N, V]`; float64 stays, anything else is read as float32.
            lengths: `[B]` position of the root; the token chosen at depth d has position length + d + 1.
        """
        if self._places:
            noise_at = partial(self._noise_below, lengths) if self.work.draws else None
            return choose_in_steps(self._places, logits, tree, noise_at)
        kernels = kernels_for(logits)
        if kernels and not self.work.changes and not self._has_grammar:
            kept = self._kept_noise(lengths[:, None] + tree.depths + 1) if self.work.draws else None
            chosen: torch.Tensor = kernels.choose_tokens(logits, kept)
            return chosen
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self.work.has_bias:
            assert self._bias is not None
            scores = scores + self._bias
        scores = self._penalties.apply(scores, tree, lengths, self.work)
        if self._has_grammar:
            scores = forbid(scores, tree, list(self._grammars))
        greedy = scores.argmax(-1)
        if not self.work.draws:
            return greedy
        noise = self._noise.at(lengths[:, None] + tree.depths + 1)
        sampled = (self._warp(scores) + noise).argmax(-1)
        return torch.where(self._temperature[..., 0] == 0, greedy, sampled)

    def rank(self, logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> Scored:
        """Log-probability that the target's draw is each candidate, given the noise `g` that the target will use.

        The target draws the argmax of `log p / T + g`, and a head knows `log p` up to errors: `log q + s e`. So the
        draw is the argmax of `T (log q / T + g) + s e`; for standard Gumbel errors `e` each token's chance is the
        softmax of `T (log q / T + g) / s`, with one scale s = LOGIT_ERROR at all temperatures. log q is warped as the
        target will be. Greedy rows have no noise: the papers' ranking, `log q`.

        Args:
            logits: `[B, K, Vd]` of the draft.
            positions: `[B, 1]` of the token that these candidates are for.
            target_ids: `[Vd]` target ids of the draft's tokens, None if it has the whole vocabulary.
        """
        if not self.work.draws:
            return uncoupled_rank(logits, positions, target_ids)
        in_full = partial(self._rank_all, logits, positions, target_ids)
        kernels = None if self.work.cuts else kernels_for(logits)
        if kernels is None:
            return in_full()
        return UnreadScores(kernels, logits, in_full, self._kept_noise(positions), target_ids)

    def _rank_all(self, logits: torch.Tensor, positions: torch.Tensor, target_ids: torch.Tensor | None) -> torch.Tensor:
        """The ranking of rows of which some draw."""
        noise = self._noise.at(positions)
        noise = noise if target_ids is None else noise[..., target_ids]
        log_probs = log_probabilities(logits)
        perturbed = self._warp(log_probs) + noise
        coupled = (perturbed * (self._temperature / LOGIT_ERROR)).log_softmax(-1)
        return torch.where(self._temperature == 0, log_probs, coupled)

    def _kept_noise(self, positions: torch.Tensor) -> KeptNoise:
        return KeptNoise(self._noise.kept, positions, self._temperature.flatten())

    def _noise_below(self, lengths: torch.Tensor, depth: int) -> torch.Tensor:
        """The noise `[B, V]` of nodes at `depth` below roots at positions `lengths [B]`."""
        return self._noise.at(lengths[:, None] + depth + 1).squeeze(1)

    def _warp(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores / T with everything outside top-k, top-p and min-p at -inf."""
        scores = scores / torch.where(self._temperature == 0, 1.0, self._temperature)
        vocab_size = scores.shape[-1]
        if self.work.has_top_k or self.work.has_top_p:
            ordered = scores.sort(-1, descending=True).values
            if self.work.has_top_k:
                last = torch.where(self._top_k == 0, vocab_size, self._top_k).clamp(max=vocab_size) - 1
                threshold = ordered.gather(-1, last.expand(*scores.shape[:2], 1))
                scores = scores.masked_fill(scores < threshold, -torch.inf)
                ordered = ordered.masked_fill(ordered < threshold, -torch.inf)
            if self.work.has_top_p:
                num_kept = stays_in_nucleus(ordered, self._top_p).sum(-1, keepdim=True).clamp(min=1)
                threshold = ordered.gather(-1, num_kept - 1)
                scores = scores.masked_fill((scores < threshold) & (self._top_p < 1), -torch.inf)
        if self.work.has_min_p:
            # On a GPU without log_softmax, whose sum over a row may round by where the row lies: it cancels out.
            log_probs = scores.log_softmax(-1) if scores.device.type == "cpu" else scores
            scores = scores.masked_fill(below_min_p(log_probs, self._min_p), -torch.inf)
        return scores


def below_min_p(scores: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Which tokens are less than `min_p` times as likely as the likeliest, by log-probabilities up to a constant."""
    return scores < scores.amax(-1, keepdim=True) + min_p.log()


def stays_in_nucleus(ordered: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Which of a row's scores, the highest first, stay: as long as those before hold less than `top_p`.

    A GPU sums a row in an order that depends on the number of rows. So there integers are summed: in any order.
    """
    if ordered.device.type == "cpu":
        probs = ordered.softmax(-1)
        return (probs.cumsum(-1) - probs) < top_p
    return stays_by_integers(ordered, top_p)


def stays_by_integers(ordered: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The same by weights relative to the highest, in steps of 2^-40: up to 2^22 of them fit into 64 bits."""
    weights = ((ordered - ordered[..., :1]).exp() * 2.0**40).long()
    sums = weights.cumsum(-1)
    share, (high, low) = (top_p * 2.0**24).long(), (sums[..., -1:] >> 24, sums[..., -1:] & (1 << 24) - 1)
    held = high * share + (low * share >> 24)  # top_p of the total, in parts since the product would not fit
    return (sums - weights) < held
