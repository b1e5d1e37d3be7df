"""What ends a run before its last step: SIGTERM and Ctrl-C, with a checkpoint; a loss that is no number, without."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(Exception):
    """A signal ended a run, whose checkpoint of `step` is complete."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal_number, self.step = signal_number, step


class TrainingDiverged(ValueError):
    """The loss, a gradient or a figure of an evaluation is not finite; what was saved before is kept."""


class StopOnSignal(TrainerCallback):
    """Listens within its `with` block; a second Ctrl-C in a run of one process stops at once, without a checkpoint."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> "StopOnSignal":
        self._previous: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python has handlers there only
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        if self.received:
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes on a Ctrl-C that its processes have had from the terminal already.
        if number == self.received == signal.SIGINT and "WORLD_SIZE" not in os.environ:
            raise KeyboardInterrupt
        self.received = self.received or number

    def _agree(self) -> None:
        """Take over another process's signal, so that all stop after the same step."""
        if distributed.is_initialized():
            number = torch.tensor(self.received)
            distributed.all_reduce(number, distributed.ReduceOp.MAX)
            self.received = int(number)
