"""Run a training script as it is; note when each optimizer step ended, how much memory it took, and its arithmetic.

``accelerate launch benchmarks/measure.py RESULT.json [--count] SCRIPT [its arguments]``

With ``--count`` the arithmetic of the second step is counted, which slows it down: times are of no use then.
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _forward_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward_flops(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# The counter does not know attention on CPUs by itself.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
}


class StepClock:
    """Notes the end of every optimizer step; on a GPU without waiting for it, as the scripts themselves may not."""

    def __init__(self, count: bool) -> None:
        self.started = time.perf_counter()
        self.ends: list[float] = []
        self.events: list[torch.cuda.Event] = []
        self.counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) if count else None

    def note(self, *_: object) -> None:
        """Called by torch after each step."""
        if not self.events and not self.ends and torch.cuda.is_available():
            torch.cuda.synchronize()
        if torch.cuda.is_available():
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        self.ends.append(time.perf_counter() - self.started)
        if self.counter is not None and len(self.ends) <= 2:
            if len(self.ends) == 1:
                self.counter.__enter__()
            else:
                self.counter.__exit__(None, None, None)

    def step_ends(self) -> list[float]:
        """Seconds from the start to the end of each step."""
        if not self.events:
            return self.ends
        torch.cuda.synchronize()
        return [self.ends[0] + self.events[0].elapsed_time(event) / 1000 for event in self.events]


def peak_resident_bytes() -> int:
    """The largest resident set of this process; on Linux without that of the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the script of the command line, and write the measurements when it ends, well or not."""
    result, *arguments = sys.argv[1:]
    count = arguments[0] == "--count"
    script, *arguments = arguments[1:] if count else arguments
    clock = StepClock(count)
    register_optimizer_step_post_hook(clock.note)
    sys.argv = [script, *arguments]
    # As `python script.py` would find its own modules.
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        measured = {
            "step_ends": clock.step_ends(),
            "flops": None if clock.counter is None else clock.counter.get_total_flops(),
            "resident_bytes": peak_resident_bytes(),
            "device_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
        }
        Path(result).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
