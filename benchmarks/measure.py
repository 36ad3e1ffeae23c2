"""Run a training script as it is and note when each optimizer step ended and how much memory it took.

``accelerate launch benchmarks/measure.py RESULT.json SCRIPT [its arguments]``
"""

from __future__ import annotations

import json
import resource
import runpy
import sys
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def main() -> None:
    """Run the script of the command line, and write the measurements when it ends, well or not."""
    started = time.perf_counter()
    result, script, *arguments = sys.argv[1:]
    ends: list[float] = []

    def note(*_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter() - started)

    register_optimizer_step_post_hook(note)
    sys.argv = [script, *arguments]
    # As `python script.py` would find its own modules.
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        measured = {
            "step_ends": ends,
            "seconds": time.perf_counter() - started,
            "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "device_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }
        Path(result).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
