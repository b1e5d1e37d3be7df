"""The processes of a run, which torchrun starts; alone, a process is the main one and sums are its own."""

import atexit
import os
import sys
from datetime import timedelta

import torch
from torch import distributed

LONGEST_WAIT = timedelta(days=2)
"""For a process that prepares data or decodes while the others wait; torchrun notices one that dies by itself."""


def start_processes() -> None:
    """Join the processes that torchrun started, if it did: gloo for tensors on the CPU, nccl for those on GPUs."""
    if "WORLD_SIZE" not in os.environ or distributed.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=LONGEST_WAIT)


def end_processes(status: int) -> None:
    """End this process with a status, after the others have come here too; alone, do nothing.

    Python's own way out is left out but for what was registered with atexit: gloo's threads live on while anything
    (a device mesh, say) holds the group, and one that drops a tensor while the interpreter ends aborts the process.
    """
    if not distributed.is_initialized():
        return
    wait_for_others()
    distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def num_processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_index() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this process logs and writes files."""
    return process_index() == 0


def wait_for_others() -> None:
    """Return when every process has come here."""
    sum_over_processes(torch.zeros(()))  # a barrier of the CPU's backend, which a GPU need not wait for


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor, on the tensor's device."""
    if distributed.is_initialized():
        values = values.clone()
        distributed.all_reduce(values)
    return values


def current_device() -> torch.device:
    """Where this process's head and target are."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
