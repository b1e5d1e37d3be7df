"""Run methods over the same prompts, interleaved, and compare tokens and speed with plain decoding."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from draftwing.decoding.generate import Generation
from draftwing.decoding.statistics import Statistics

Start = Callable[..., Generation]
"""Starts a generation over prompts (lists of token ids) with the options of `generate`."""


@dataclass(frozen=True)
class PromptResult:
    """One prompt's runs: `seconds` is the median of its repeats, `num_cycles` the last one's."""

    num_tokens: int
    num_cycles: int
    seconds: float


@dataclass
class MethodResult:
    """One method at one temperature, over all prompts. `statistics` are those of all repeats."""

    method: str
    temperature: float
    prompts: list[PromptResult] = field(default_factory=list)
    identical: bool = True
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def num_tokens(self) -> int:
        return sum(prompt.num_tokens for prompt in self.prompts)

    @property
    def seconds(self) -> float:
        return sum(prompt.seconds for prompt in self.prompts)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Comparison:
    """A line of the comparison table."""

    method: str
    temperature: float
    tokens_per_second: float
    acceptance_length: float
    speedup: float
    identical: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_methods(
    methods: dict[str, Start],
    prompts: Sequence[Sequence[int]],
    temperature: float,
    repeats: int = 3,
    on_progress: Callable[[str], None] = lambda method: None,
    **options: Any,
) -> list[MethodResult]:
    """Decode every prompt with every method, `repeats` times in turn, so that a drift of the machine hits all alike.

    `methods` must hold `plain`, whose tokens are the reference. `options` are those of `generate`.
    """
    results = {name: MethodResult(name, temperature) for name in methods}
    for start in methods.values():  # warm-up: the first calls of a process pay for its lazy initialisations
        warm_up(start, prompts[0], temperature=temperature, **options)
    for prompt in prompts:
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        tokens, num_cycles = {}, {}
        for _ in range(repeats):
            for name, start in methods.items():
                on_progress(name)
                generation, elapsed = timed(start, prompt, temperature=temperature, **options)
                seconds[name].append(elapsed)
                tokens[name] = generation.outputs[0].tokens
                num_cycles[name] = generation.statistics.num_cycles
                results[name].statistics.merge(generation.statistics)
        for name, result in results.items():
            median = statistics.median(seconds[name])
            result.prompts.append(PromptResult(len(tokens[name]), num_cycles[name], median))
            result.identical &= tokens[name] == tokens["plain"]
    return list(results.values())


def warm_up(start: Start, prompt: Sequence[int], max_new_tokens: int, **options: Any) -> None:
    """Decode a few tokens that nobody counts."""
    timed(start, prompt, max_new_tokens=min(8, max_new_tokens), **options)


def timed(start: Start, prompt: Sequence[int], **options: Any) -> tuple[Generation, float]:
    """Decode one prompt to its end; the seconds include the prefill."""
    begin = time.perf_counter()
    generation = start([prompt], **options)
    for _ in generation.cycles():
        pass
    return generation, time.perf_counter() - begin


def compare_to_plain(results: Sequence[MethodResult]) -> list[Comparison]:
    """Table rows of one temperature, with speed-ups over its plain row."""
    plain = next(result for result in results if result.method == "plain")
    return [
        Comparison(
            result.method,
            result.temperature,
            round(result.tokens_per_second, 2),
            round(result.statistics.acceptance_length, 3),
            round(result.tokens_per_second / plain.tokens_per_second, 3),
            result.identical,
        )
        for result in results
    ]
