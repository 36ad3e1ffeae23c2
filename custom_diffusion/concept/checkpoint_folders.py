"""The folders in which a run keeps what it has learned on the way, ``checkpoint-<step>``."""

from __future__ import annotations

from pathlib import Path


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(path.name.removeprefix("checkpoint-"))
