"""What a run says beside its progress bar."""

from __future__ import annotations

import sys

from tqdm.auto import tqdm


def note(message: str) -> None:
    """Say something that explains what is seen."""
    tqdm.write(message, file=sys.stderr)


def warn(message: str) -> None:
    """Say that something is wrong, though the run continues."""
    note(f"warning: {message}")


def duration(seconds: float) -> str:
    """A length of time in words that need no calculation: "45 seconds", "5 minutes", "2 hours"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}s"
    whole = max(1, round(seconds))
    return f"{whole} second{'s' * (whole > 1)}"
