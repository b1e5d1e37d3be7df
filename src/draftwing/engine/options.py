"""What a call of `generate` asks for beside its prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from draftwing.engine.engine import Request
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.stopping import Decode, StopRule
from draftwing.engine.tree_plan import TreeShape

KINDS: dict[str, tuple[Any, str]] = {
    "seed": (int | Sequence, "an integer or one per row"),
    "eos_token_id": (int | Sequence | None, "a token id or several"),
    "stop": (str | Sequence | None, "a string or several"),
    "plan": (str | TreeShape | None, "a plan's name or a TreePlan"),
    "logit_bias": (Mapping | None, "token ids with what is added to their logits"),
    "do_sample": (bool | None, "True or False"),
    "ngram": (bool | None, "True or False"),
    "coupled": (bool | None, "True or False"),
}
"""What an option may be where no later check names the field."""
SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
"""Options that are those of SamplingParams."""


@dataclass(frozen=True)
class GenerateOptions:
    """Everything `generate` takes beside the prompts; None is neutral, and without a temperature decoding is greedy.

    Of the model's generation config only end-of-sequence and padding ids are read; its temperature, top_p, ... are not.

    Attributes:
        seed: one seed per row, or a single one, of which row b gets `row_seed(seed, b)`, that is `seed + b * 2**32`.
        presence_penalty, frequency_penalty: taken from the logit of each token that the row has generated, once and
            for each time, as OpenAI's interface defines it.
        stop: stop strings; a row ends with the token that completes one.
        min_new_tokens: no row ends with fewer by an end-of-sequence token or a stop string.
        plan: `auto`, a text that `TreePlan.parse` reads (`off`, `chain:DEPTH`, `tree:WIDTHxDEPTHxNODES`, a paper's
            tree, or for that method alone `lookahead:WxNxG`) or a TreePlan; None is the method's default. `auto` sizes
            each tree by what it is expected to bring; the first time on a machine it measures what a cycle costs, for a
            second or two (it logs so). With the method `ngram` it drafts in the cycles in which that is faster by the
            clock. Levels beyond `max_new_tokens` are left out, and with `off` the three options below say nothing.
        coupled: unless False, rank draft candidates with the target's own noise; the same output, more of
            it drafted when sampling.
        ngram: whether tokens that followed the same ones before are looked up and merged into trees; None: where the
            method has that, if it pays.
        draft_window: tokens that a draft head reads at most; None: what it was trained on.
        is_done: a further end, called with a row and its new tokens after each (slow).
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    do_sample: bool | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | Sequence[int] = 0
    eos_token_id: int | Sequence[int] | None = None
    stop: Sequence[str] | str | None = None
    min_new_tokens: int | None = None
    plan: str | TreeShape | None = None
    coupled: bool | None = None
    ngram: bool | None = None
    draft_window: int | None = None
    is_done: Callable[[int, Sequence[int]], bool] | None = None

    def __post_init__(self) -> None:
        for name, (kind, expected) in KINDS.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if isinstance(self.plan, TreeShape) and self.plan.looks_up:
            raise ValueError("plan: expected a tree without a lookup, which ngram=True adds to it")

    def check(self, num_rows: int, vocab_size: int) -> None:
        """Raise a ValueError for an option that does not fit so many rows, or a vocabulary of so many ids."""
        if not isinstance(self.seed, int) and len(self.seed) != num_rows:
            raise ValueError(f"seed: expected one per row, got {len(self.seed)} for {num_rows} rows")
        for token in self.eos_token_ids or ():
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ValueError(f"eos_token_id: expected ids from 0 to {vocab_size - 1}, got {token!r}")

    @property
    def eos_token_ids(self) -> tuple[int, ...] | None:
        """The ids that end a row; None: the target's."""
        if self.eos_token_id is None:
            return None
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def request(
        self, row: int, prompt: Sequence[int], eos_token_ids: tuple[int, ...], decode: Decode | None
    ) -> Request:
        """What one row asks for; `decode` turns ids into text, which stop strings need."""
        stop = StopRule(
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=eos_token_ids,
            stop_strings=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            decode=decode,
            is_done=self.is_done and partial(self.is_done, row),
            min_new_tokens=self.min_new_tokens or 0,
        )
        return Request(prompt, self.sampling(row), stop)

    def sampling(self, row: int) -> SamplingParams:
        """The sampling parameters of one row."""
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if self.do_sample else 0.0
        if self.do_sample is False:
            temperature = 0.0
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        return SamplingParams(temperature, seed=self._seed_of(row), **given)

    def _seed_of(self, row: int) -> int:
        if isinstance(self.seed, int):
            return row_seed(self.seed, row) if 0 <= self.seed < 2**63 else self.seed  # SamplingParams refuses others
        return self.seed[row]


def row_seed(seed: int, row: int) -> int:
    """The seed of a batch's row, with which the row alone has the same tokens: `seed` itself for the first.

    Runs with different seeds below 2^32 have no row's seed in common. (The noise hashes both halves of a seed.)
    """
    return (seed + row * 2**32) % 2**63
