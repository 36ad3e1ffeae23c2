"""Signals that end a run."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
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


class Signalled(KeyboardInterrupt):
    """A signal ends the run at once.

    Attributes:
        number: which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def during(doing: str, way_on: Callable[[], str]) -> Iterator[None]:
    """Name what was going on, and the way on, where a signal ends it at once.

    Args:
        doing: such as "the final images".
        way_on: gives what is safe, and what to type next.

    Raises:
        Interrupted: in place of Ctrl-C's exception.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        number = getattr(interrupt, "number", signal.SIGINT)
        raise Interrupted(number, f"interrupted during {doing}; {way_on()}") from None


class StopSignal:
    """Notes SIGINT and SIGTERM, so that a run ends after its step with a checkpoint; a second one ends it at once.

    Within `ECHO_SECONDS` it is the same one: torchrun passes on what the whole process group has got already.

    Args:
        at_once: let the first one end it at once, too.
    """

    ECHO_SECONDS = 1.0

    def __init__(self, accelerator: Accelerator, at_once: bool = False) -> None:
        self.accelerator = accelerator
        self.at_once = at_once
        self.number: int | None = None
        before = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        self._before = before if isinstance(before, StopSignal) else None
        # One that came in the last step may still have its echo to come.
        self._noted: float | None = self._before._noted if self._before is not None else None
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, _: Any) -> None:
        now = time.monotonic()
        is_echo = self._noted is not None and now - self._noted <= self.ECHO_SECONDS
        if is_echo:
            return
        self._noted = now
        if self.at_once:
            raise Signalled(number)
        self.number, self.at_once = number, True

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._before is not None:
            self.restore()
            self._before.restore()
        elif self._noted is None:
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
