"""The most memory that one run used: the allocator's on CUDA, the process's resident set on a CPU."""

import re
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from draftwing.evaluation.compare import Decode, Decoded

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
