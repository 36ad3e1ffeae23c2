"""What a run has to tell of itself: losses, validations and images, kept in the output folder for its report."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from custom_diffusion.files import write_bytes
from custom_diffusion.report.page import LOG_NAME, write_report
from custom_diffusion.text import first_line

logger = logging.getLogger("custom_diffusion")


@dataclass
class History:
    """A run so far.

    Attributes:
        facts: what it is: images, prompts, settings, and at its end time and memory.
        steps: a row for each optimizer step, with ``step``, ``loss``, ``lr`` and with prior preservation
            ``instance_loss`` and ``prior_loss``.
        validations: rows with ``step``, ``validation_loss`` and with prior preservation ``validation_prior_loss``.
        images: validation images, rows with ``step``, ``prompt`` and ``files``, relative to the output folder.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)

    def best(self) -> dict[str, float] | None:
        """The validation with the lowest loss after the first step, the earliest of equals; None without any."""
        learned = [row for row in self.validations if row["step"] > 0]
        return min(learned, key=lambda row: row["validation_loss"], default=None)


def read_history(folder: Path, last_step: int) -> History:
    """What a run has kept in its folder, up to the step that it is resumed from; empty for a run from step 0."""
    if last_step == 0 or not (folder / LOG_NAME).is_file():
        return History()
    try:
        kept = History(**json.loads((folder / LOG_NAME).read_text()))
        for name in ("steps", "validations", "images"):
            setattr(kept, name, [row for row in getattr(kept, name) if row["step"] <= last_step])
    except (ValueError, TypeError, KeyError):
        # The curves then begin at the checkpoint; nothing that is learned depends on them.
        logger.warning(f"{str(folder / LOG_NAME)!r} is damaged: the report begins at step {last_step}")
        return History()
    return kept


def keep_history(history: History, folder: Path, with_report: bool = True) -> None:
    """Write the log and the report, each whole; where that fails, the run continues without them."""
    try:
        write_bytes(folder / LOG_NAME, json.dumps(asdict(history)).encode())
        if with_report:
            write_report(folder)
    except Exception as error:  # nothing that is learned depends on it
        logger.warning(
            f"the report of {str(folder)!r} cannot be written: {getattr(error, 'strerror', None) or first_line(error)}"
        )
