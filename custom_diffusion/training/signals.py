"""Signals that end a run."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
from accelerate import Accelerator

from custom_diffusion.errors import Interrupted


def leave_signals_to_the_run(worker: int) -> None:
    """Let a data worker, as its ``worker_init_fn``, ignore what :class:`StopSignal` notes.

    A terminal, ``timeout`` and batch systems send signals to a whole process group, and a worker that dies of one takes
    the step and the checkpoint with it. Workers end when the run closes them, or is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class StopSignal:
    """Notes SIGINT and SIGTERM, so that a run ends after its step with a checkpoint; a second one ends it at once.

    Within `ECHO_SECONDS` it is the same one: torchrun passes on what the whole process group has got already.
    """

    ECHO_SECONDS = 1.0

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.number: int | None = None
        self._noted: float | None = None
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self._noted is None:
            self.number, self._noted = number, now
        elif now - self._noted > self.ECHO_SECONDS:
            self.restore()
            signal.raise_signal(number)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_: object) -> None:
        # A noted one may still have its echo to come.
        if self._noted is None:
            self.restore()

    def restore(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def interruption(self, step: int) -> Interrupted:
        """What to raise after this step, whose checkpoint is written."""
        assert self.number is not None
        name = signal.Signals(self.number).name
        return Interrupted(
            self.number, f"stopped by {name} after step {step}; continue with --resume_from_checkpoint=latest"
        )

    def came(self) -> bool:
        """Whether any process was told to stop; all processes have to ask, after the same step."""
        if self.accelerator.num_processes == 1:
            return self.number is not None
        mine = torch.tensor([self.number or 0], device=self.accelerator.device)
        self.number = int(self.accelerator.gather(mine).max()) or None
        return self.number is not None
