"""Run methods over the same prompts, interleaved, and compare tokens and speed with plain decoding."""

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from draftwing.drafts.kinds import PLAIN
from draftwing.engine.generation import Generation
from draftwing.engine.statistics import Statistics

WARM_UP_TOKENS = 8
Start = Callable[..., Generation]
"""Starts a generation over prompts (lists of token ids) with the options of `generate`."""


@dataclass(frozen=True)
class Decoded:
    """One prompt decoded once. Other engines may give a `text` instead of `tokens`, and count no cycles.

    `peak_bytes` is the memory that was used at most, None where nobody measured it.
    """

    seconds: float
    num_tokens: int
    tokens: list[int] | None = None
    text: str | None = None
    statistics: Statistics | None = None
    peak_bytes: int | None = None


Decode = Callable[..., Decoded]
"""Decodes one prompt (token ids) to its end, with options of `generate`."""


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
    """Decode every prompt with every method, `repeats` times in turn.

    `methods` must hold `plain`, whose tokens are the reference. `options` are those of `generate`.
    """
    results = {name: MethodResult(name, temperature) for name in methods}
    decoders = {name: decoder(start) for name, start in methods.items()}
    for start in methods.values():  # warm-up: the first calls of a process pay for its lazy initialisations
        warm_up(start, prompts[0], temperature=temperature, **options)
    for prompt in prompts:
        runs: dict[str, list[Decoded]] = {}
        for name, outcome in decode_in_turn(
            decoders, prompt, repeats, on_progress, temperature=temperature, **options
        ).items():
            if isinstance(outcome, Exception):
                raise outcome
            runs[name] = outcome
        for name, result in results.items():
            last = runs[name][-1]
            assert last.statistics is not None
            median = statistics.median(run.seconds for run in runs[name])
            result.prompts.append(PromptResult(last.num_tokens, last.statistics.num_cycles, median))
            result.identical &= all(run.tokens == runs[PLAIN][-1].tokens for run in runs[name])
            result.statistics.merge(merged(runs[name]))
    return list(results.values())


def decode_in_turn(
    methods: Mapping[str, Decode],
    prompt: Sequence[int],
    repeats: int,
    on_progress: Callable[[str], None] = lambda method: None,
    **options: Any,
) -> dict[str, list[Decoded] | Exception]:
    """Decode one prompt with every method, `repeats` times in turn, so that a drift of the machine hits all alike.

    An exception ends its method's turns and stands in the place of its runs.
    """
    runs: dict[str, list[Decoded]] = {name: [] for name in methods}
    failed: dict[str, Exception] = {}
    for _ in range(repeats):
        for name in methods:
            on_progress(name)
            if name in failed:
                continue
            try:
                runs[name].append(methods[name](prompt, **options))
            except Exception as error:
                failed[name] = error
    return {name: failed.get(name, runs[name]) for name in methods}


def decoder(start: Start) -> Decode:
    """Decodes single prompts by a method of ours."""

    def decode(prompt: Sequence[int], **options: Any) -> Decoded:
        generation, seconds = timed(start, [prompt], **options)
        tokens = generation.outputs[0].tokens
        return Decoded(seconds, len(tokens), tokens, statistics=generation.statistics)

    return decode


def merged(runs: Sequence[Decoded]) -> Statistics:
    """The counts of several runs together."""
    total = Statistics()
    for run in runs:
        if run.statistics is not None:
            total.merge(run.statistics)
    return total


def warm_up(start: Start, prompt: Sequence[int], max_new_tokens: int, **options: Any) -> None:
    """Decode a few tokens that nobody counts."""
    timed(start, [prompt], max_new_tokens=min(WARM_UP_TOKENS, max_new_tokens), **options)


def timed(start: Start, prompts: Sequence[Sequence[int]], **options: Any) -> tuple[Generation, float]:
    """Decode prompts together to their ends; the seconds include the prefill, and no recording of a cycle."""
    begin = time.perf_counter()
    generation = start(prompts, **options).run()
    return generation, time.perf_counter() - begin - generation.statistics.recording_seconds


def compare_to_plain(results: Sequence[MethodResult]) -> list[Comparison]:
    """Table rows of one temperature, with speed-ups over its plain row."""
    plain = next(result for result in results if result.method == PLAIN)
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


CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # proc(5): sets the peak resident set size to the current one


def memory_kind(device: str | torch.device) -> str:
    """What the figures are, for people."""
    return "peak, CUDA allocator" if torch.device(device).type == "cuda" else "peak, process RSS"


def with_peak(decode: Decode, device: torch.device) -> Decode:
    """The same decoding, with its peak measured. A process's RSS holds every model in it."""

    def measured(prompt: Sequence[int], **options: Any) -> Decoded:
        _reset(device)
        decoded = decode(prompt, **options)
        return replace(decoded, peak_bytes=_peak(device))

    return measured


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # no such file, or not ours to write
            CLEAR.write_text(RESET_PEAK)


def _peak(device: torch.device) -> int:
    """Bytes since `_reset`; where the system has no such reset, since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(match[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
