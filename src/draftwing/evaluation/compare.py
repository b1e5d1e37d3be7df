"""Prompts decoded by several methods in turn, timed, with the memory that it took."""

import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

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


def decode_in_turn(
    methods: Mapping[str, Decode],
    prompt: Sequence[int],
    repeats: int,
    **options: Any,
) -> dict[str, list[Decoded] | Exception]:
    """Decode one prompt with every method, `repeats` times in turn, so that a drift of the machine hits all alike.

    An exception ends its method's turns and stands in the place of its runs.
    """
    runs: dict[str, list[Decoded]] = {name: [] for name in methods}
    failed: dict[str, Exception] = {}
    for _ in range(repeats):
        for name in methods:
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
    most = min(WARM_UP_TOKENS, max_new_tokens)
    if least := options.get("min_new_tokens"):
        options["min_new_tokens"] = min(least, most)
    timed(start, [prompt], max_new_tokens=most, **options)


def timed(start: Start, prompts: Sequence[Sequence[int]], **options: Any) -> tuple[Generation, float]:
    """Decode prompts together to their ends; the seconds include the prefill, and no recording of a cycle."""
    begin = time.perf_counter()
    generation = start(prompts, **options).run()
    return generation, time.perf_counter() - begin - generation.statistics.recording_seconds


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
