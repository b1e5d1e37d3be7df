"""Whether an engine's seats fit into memory: what one of them holds, and what is free."""

import math
from contextlib import suppress
from pathlib import Path

import torch

from draftwing.engine.engine import NewDrafter
from draftwing.engine.sampling import SamplingParams
from draftwing.engine.seats import Seats, room_for
from draftwing.engine.stopping import StopRule
from draftwing.engine.tree_plan import TreeShape
from draftwing.target.model import TargetModel

MOST_SHARE = 0.9
"""Of the free memory that seats may take; passes need the rest."""


@torch.inference_mode()
def seat_bytes(target: TargetModel, new_drafter: NewDrafter, capacity: int, largest: TreeShape) -> int:
    """Memory of one seat of so many tokens: keys and values of target and draft, noise, and all else that it keeps."""
    num_slots = capacity + room_for(largest)
    seat = Seats(target, new_drafter(1, num_slots), 1, num_slots, largest.max_depth, coupled=True)
    # A row that makes the sampler hold all that it can be asked for.
    seat.sampler.admit(
        0, SamplingParams(1.0, presence_penalty=1.0, logit_bias={0: 1.0}), (), StopRule(2, (0,), min_new_tokens=1)
    )
    return seat.num_bytes


def check_memory(num_seats: int, capacity: int, num_bytes: int, device: torch.device) -> None:
    """Raise a ValueError where so many seats of `num_bytes` each do not fit into what is free on a device."""
    room = bytes_for_seats(device)
    if num_seats * num_bytes > room:
        raise ValueError(
            f"seats: {num_seats} seats of {capacity} tokens take {in_words(num_seats * num_bytes)} "
            f"({in_words(num_bytes)} each), and of the {in_words(room / MOST_SHARE)} that are free on {device} they "
            f"may have {MOST_SHARE:.0%}: expected at most {int(room / num_bytes)} seats, or fewer tokens"
        )


def bytes_for_seats(device: torch.device) -> float:
    """Bytes that seats may have of what is free on a device; without a limit where the system does not say."""
    free = free_bytes(device)
    return math.inf if free is None else MOST_SHARE * free


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device, within a container's limit; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = [_available(Path("/proc/meminfo")), _left_of_limit(Path("/sys/fs/cgroup"))]
    return min((number for number in free if number is not None), default=None)


def in_words(num_bytes: float) -> str:
    """A number of bytes for people."""
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"


def _available(meminfo: Path) -> int | None:
    """What Linux says that processes can still have."""
    with suppress(OSError, StopIteration):
        lines = meminfo.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return None


def _left_of_limit(group: Path) -> int | None:
    """What a container's limit leaves; files that the kernel keeps in memory give way, so they do not count."""
    with suppress(OSError, ValueError, StopIteration):
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        statistics = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        files = next(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
        return max(0, limit - used + files)
    return None
