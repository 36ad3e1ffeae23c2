"""Run a training as it is, and note how long each of its stages takes.

``accelerate launch benchmarks/stages.py RESULT.json [arguments of train_custom_diffusion.py]``

A stage within another, such as a validation between the steps, counts as its own alone.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as `python train_custom_diffusion.py` has it

import train_custom_diffusion  # noqa: E402
from custom_diffusion.models.base_model import BaseModel  # noqa: E402
from custom_diffusion.training import saving  # noqa: E402

# What belongs to each stage: functions, where they are looked up when they are called.
STAGES: dict[str, list[tuple[Any, str]]] = {
    "loading the model": [
        *((BaseModel, name) for name in ("tokenizers", "pipeline", "vae", "text_encoders", "unet")),
        (train_custom_diffusion, "fit_to_machine"),
    ],
    "class images": [(train_custom_diffusion, "generate_class_images")],
    "encoding": [(train_custom_diffusion, "prepare_latents"), (train_custom_diffusion, "cache_texts")],
    "steps": [(train_custom_diffusion, "train")],
    "validation": [(saving, "show_progress"), (saving, "measure_validation")],
    "saving": [(train_custom_diffusion, "save_checkpoint"), (saving, "save_result")],
}
REST = "everything else"


class StageClock:
    """Counts the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.open = [REST]
        self.since = time.perf_counter()

    def note(self) -> None:
        """Count the time since the last note to the stage that is open."""
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def watch(self, owner: Any, name: str, stage: str) -> None:
        """Count a function of a module or class to a stage."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            self.note()
            self.open.append(stage)
            try:
                return function(*args, **options)
            finally:
                self.note()
                self.open.pop()

        setattr(owner, name, timed)


def main() -> None:
    """Train, and write what each stage took, in seconds."""
    result, *arguments = sys.argv[1:]
    # As the script calls itself in its messages and in what it asks of other processes.
    sys.argv = [str(ROOT / "train_custom_diffusion.py"), *arguments]
    clock = StageClock()
    for stage, functions in STAGES.items():
        for owner, name in functions:
            clock.watch(owner, name, stage)
    train_custom_diffusion.main()
    clock.note()
    Path(result).write_text(json.dumps(clock.seconds))


if __name__ == "__main__":
    main()
