"""A run's checkpoints, and whose an output folder is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from custom_diffusion.command_line import CONFIG_NAME
from custom_diffusion.concept.checkpoint_folders import checkpoint_step, list_checkpoints
from custom_diffusion.concept.files import CARD_NAME, WEIGHTS_STEM, concept_files
from custom_diffusion.errors import UserError
from custom_diffusion.files import remove_half_written, remove_tree
from custom_diffusion.text import first_line
from custom_diffusion.training.settings import SETTINGS_NAME, check_settings, write_settings

logger = logging.getLogger("custom_diffusion")

# What resuming needs of a checkpoint: optimizer, schedule, random states, settings.
STATE_NAME = "training_state"

START_AFRESH = "start afresh in another --output_dir or with --overwrite"
RESUME_ADVICE = f"resume with the same settings, or {START_AFRESH}"


def remove_leftovers(output_dir: Path) -> None:
    """Clean up what a run that was killed has left half-written; a complete checkpoint that was moved aside returns."""
    for aside in output_dir.glob(".checkpoint-*.old"):
        checkpoint = output_dir / aside.name.removeprefix(".").removesuffix(".old")
        if checkpoint.exists():
            remove_tree(aside)
        else:
            aside.rename(checkpoint)
    for half in output_dir.glob(".checkpoint-*.tmp"):
        remove_tree(half)
    remove_half_written(output_dir)


def find_checkpoint(output_dir: Path, name: str | None) -> Path | None:
    """The checkpoint to continue from, or None to start afresh.

    Args:
        output_dir: the run's folder.
        name: a checkpoint in it, or ``latest``, or None.

    Raises:
        UserError: for a named checkpoint that is not there, and for one that holds the concept alone.
    """
    if name is None:
        return None
    present = list_checkpoints(output_dir)
    if name == "latest" and not present:
        logger.info(
            f"--resume_from_checkpoint latest: no checkpoint is in {str(output_dir)!r}, so training starts afresh"
        )
        return None
    wanted = present[-1].name if name == "latest" else Path(name).name
    for path in present:
        if path.name == wanted:
            if not (path / STATE_NAME).is_dir():
                raise UserError(f"{str(path)!r} cannot be continued, as it has no {STATE_NAME}: {instead_of(path)}")
            return path
    there = ", ".join(path.name for path in present) or "none"
    raise UserError(f"there is no checkpoint {wanted!r} in {str(output_dir)!r} (there: {there})")


def instead_of(path: Path) -> str:
    """Words about what to do where a checkpoint cannot be continued; those beside it that can are named."""
    others = [one.name for one in list_checkpoints(path.parent) if one != path and (one / STATE_NAME).is_dir()]
    return (f"resume from {' or '.join(others)}, or " if others else "") + START_AFRESH


def check_is_within(checkpoint: Path, total_steps: int) -> None:
    """Make sure that a checkpoint is not beyond the end of the run that continues it.

    Raises:
        UserError: where it is; the other checkpoints are named.
    """
    if checkpoint_step(checkpoint) > total_steps:
        others = [path.name for path in list_checkpoints(checkpoint.parent) if checkpoint_step(path) <= total_steps]
        raise UserError(
            f"{str(checkpoint)!r} is of step {checkpoint_step(checkpoint)}, and the run is to end at {total_steps}: "
            "give a larger --max_train_steps" + (f", or resume from {' or '.join(others)}" if others else "")
        )


def put_checkpoint(temporary: Path, path: Path, limit: int | None) -> None:
    """Give a complete checkpoint its name, and then remove older ones beyond the limit.

    Args:
        temporary: the folder that it was written into, beside ``path``.
        path: ``checkpoint-<step>``; an earlier run's is replaced.
        limit: how many are kept, if not all.
    """
    # An earlier run's checkpoint of the same step is moved aside first: a folder cannot be renamed onto another.
    replaced = path.with_name(f".{path.name}.old")
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    with suppress(OSError):  # the next run clears it away
        remove_tree(replaced)
    if limit is not None:
        # Only up to this step: later ones are of an earlier, longer run in the same folder.
        own = [older for older in list_checkpoints(path.parent) if checkpoint_step(older) <= checkpoint_step(path)]
        for older in own[:-limit]:
            remove_checkpoint(older)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that at no moment half of one has its name."""
    half = path.with_name(f".{path.name}.tmp")  # what a later run clears away
    remove_tree(half)
    path.rename(half)
    remove_tree(half)


def last_checkpoint(output_dir: Path) -> str:
    """Words about what a run can continue from."""
    present = list_checkpoints(output_dir)
    return f"the last good checkpoint is {str(present[-1])!r}" if present else "there is no checkpoint yet"


def way_on(output_dir: Path) -> str:
    """Words about how to continue a run that was ended at once."""
    advice = (
        "continue with --resume_from_checkpoint=latest"
        if list_checkpoints(output_dir)
        else "run the same command again"
    )
    return f"{last_checkpoint(output_dir)}: {advice}"


def cannot_write(path: Path, error: Exception, output_dir: Path) -> UserError:
    """The error of a full disk or a folder that cannot be written to."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(
        f"{str(path)!r} cannot be written: {reason}; earlier files are intact, {last_checkpoint(output_dir)}"
    )


def has_result(folder: Path) -> bool:
    """Whether a folder holds something that a run has learned."""
    return bool(list_checkpoints(folder)) or any(folder.glob(f"{WEIGHTS_STEM}.*"))


def check_output_dir(
    folder: Path,
    settings: dict[str, Any],
    checkpoint: Path | None,
    overwrite: bool,
    max_train_steps: int | None = None,
    config: str | None = None,
) -> list[Path]:
    """Make sure that the output folder holds this run or none.

    A run that has come to no result leaves the folder to the next one.

    Args:
        checkpoint: what to continue from.
        overwrite: another run may be there.
        max_train_steps: how far the run goes, where that is known.
        config: the file with this run's flags, which may be in the folder.

    Returns:
        The checkpoints and files that :func:`claim_output_dir` has to remove, of the run that is overwritten.

    Raises:
        UserError: where another run is there, or was checkpointed, or the checkpoint is beyond the run's end, or files
            are there that no run has left and this one would replace; and where nobody knows what to overwrite, see
            :func:`files.concept_files`.
    """
    advice = "give another --output_dir, or --overwrite"
    if checkpoint is not None:
        path = checkpoint / STATE_NAME / SETTINGS_NAME
        check_settings(settings, path, RESUME_ADVICE)
        # One without settings may be of another run altogether, which its weights will show.
        if max_train_steps is not None and path.is_file():
            check_is_within(checkpoint, max_train_steps)
    elif overwrite:
        return [*list_checkpoints(folder), *concept_files(folder)]
    elif (folder / SETTINGS_NAME).is_file():
        if has_result(folder):
            check_settings(settings, folder / SETTINGS_NAME, advice)
    else:
        # A concept that was merged or downloaded, or the user's own files.
        for pattern in ("checkpoint-*", f"{WEIGHTS_STEM}.*", CARD_NAME, CONFIG_NAME, "image_*.png"):
            for path in folder.glob(pattern):
                if config is None or path.resolve() != Path(config).resolve():
                    raise UserError(f"{str(path)!r} already exists and was not written by training: {advice}")
    return []


def claim_output_dir(folder: Path, settings: dict[str, Any], overwritten: Sequence[Path]) -> None:
    """Leave the settings in the output folder, after removing what another run has learned."""
    for path in overwritten:
        if path.is_dir():
            remove_checkpoint(path)
        else:
            path.unlink()
    write_settings(settings, folder)
