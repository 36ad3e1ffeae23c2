"""What keeps a run safe: its checkpoints, the settings that a folder belongs to, and signals that end it."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.errors import UserError
from custom_diffusion.files import remove_half_written, write_whole
from custom_diffusion.text import first_line

logger = logging.getLogger("custom_diffusion")

SETTINGS_NAME = "training_settings.json"


# What runs did that were made before there were these flags: they can still be gone on with.
BEFORE_THE_FLAG = {"padding_mode": "constant", "cutmix_probability": 0.0}


# Flags that may change when a run is resumed: they do not touch what is learned, or say how long to go on.
FREE_ON_RESUME = {
    "output_dir", "logging_dir", "report_to", "push_to_hub", "hub_token", "hub_model_id", "no_safe_serialization",
    "validation_prompt", "validation_steps", "num_validation_images", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "overwrite", "max_train_steps", "num_train_epochs", "dataloader_num_workers",
    "sample_batch_size", "prior_generation_precision", "local_rank", "set_grads_to_none", "concepts_list",
    "instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir", "config", "keep_latents",
}  # fmt: skip


def remove_leftovers(output_dir: Path) -> None:
    """Clean up what a run that was killed has left half-written; a complete checkpoint that was moved aside returns."""
    for aside in output_dir.glob(".checkpoint-*.old"):
        checkpoint = output_dir / aside.name.removeprefix(".").removesuffix(".old")
        if checkpoint.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(checkpoint)
    for half in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(half)
    remove_half_written(output_dir)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The optimizer step that a checkpoint was written after."""
    return int(path.name.removeprefix("checkpoint-"))


def find_checkpoint(output_dir: Path, name: str | None) -> Path | None:
    """The checkpoint to go on from, or None to start afresh.

    Args:
        output_dir: the run's folder.
        name: a checkpoint in it, or ``latest``, or None.

    Raises:
        UserError: for a named checkpoint that is not there.
    """
    if name is None:
        return None
    present = list_checkpoints(output_dir)
    if name == "latest":
        if not present:
            logger.info(
                f"--resume_from_checkpoint latest: no checkpoint is in {str(output_dir)!r}, so training starts afresh"
            )
        return present[-1] if present else None
    wanted = Path(name).name
    for path in present:
        if path.name == wanted:
            return path
    there = ", ".join(path.name for path in present) or "none"
    raise UserError(f"there is no checkpoint {wanted!r} in {str(output_dir)!r} (there: {there})")


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
    shutil.rmtree(replaced, ignore_errors=True)
    if limit is not None:
        # Only up to this step: later ones are of an earlier, longer run in the same folder.
        own = [older for older in list_checkpoints(path.parent) if checkpoint_step(older) <= checkpoint_step(path)]
        for older in own[:-limit]:
            remove_checkpoint(older)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint so that at no moment half of one has its name."""
    half = path.with_name(f".{path.name}.tmp")  # what a later run clears away
    shutil.rmtree(half, ignore_errors=True)
    path.rename(half)
    shutil.rmtree(half)


def last_checkpoint(output_dir: Path) -> str:
    """Words about what can be gone on from."""
    present = list_checkpoints(output_dir)
    return f"the last good checkpoint is {str(present[-1])!r}" if present else "there is no checkpoint yet"


def cannot_write(path: Path, error: Exception, output_dir: Path) -> UserError:
    """The error of a full disk or a folder that cannot be written to."""
    reason = getattr(error, "strerror", None) or first_line(error)
    return UserError(
        f"{str(path)!r} cannot be written: {reason}; earlier files are intact, {last_checkpoint(output_dir)}"
    )


def describe_settings(
    args: argparse.Namespace,
    instance_images: Sequence[tuple[Path, str]],
    concepts: Sequence[ConceptEntry],
    num_processes: int,
) -> dict[str, Any]:
    """All that decides what a run learns, for comparison with another run.

    Args:
        instance_images: the instance images with their prompts.
        concepts: with prior preservation, each with ``class_prompt``.
    """
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    settings["samples_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    del settings["train_batch_size"], settings["gradient_accumulation_steps"]
    settings["instance_pictures"] = [[path.name, prompt] for path, prompt in instance_images]
    if args.with_prior_preservation:
        settings["class_prompts"] = [concept.class_prompt for concept in concepts]
    return settings


def check_settings(settings: dict[str, Any], path: Path, advice: str) -> None:
    """Compare with the settings that another run has left in a file, if it has.

    Raises:
        UserError: where they differ, with every difference.
    """
    if not path.is_file():
        return
    try:
        others = json.loads(path.read_text())
        names = sorted(settings.keys() | others.keys())
        others = BEFORE_THE_FLAG | others
    except (ValueError, AttributeError) as error:
        raise UserError(f"{str(path)!r} is damaged: {advice}") from error
    different = [
        f"{name} {_short(others.get(name))} -> {_short(settings.get(name))}"
        for name in names
        if others.get(name) != settings.get(name)
    ]
    if different:
        raise UserError(f"{str(path.parent)!r} is of a run with other settings ({'; '.join(different)}): {advice}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def claim_output_dir(folder: Path, settings: dict[str, Any], checkpoint: Path | None, overwrite: bool) -> None:
    """Make sure that the output folder holds this run or none, and leave the settings in it.

    Raises:
        UserError: where another run is there, or was checkpointed; nothing of it is touched then.
    """
    if checkpoint is not None:
        advice = "resume with the same settings, or start afresh in another --output_dir or with --overwrite"
        check_settings(settings, checkpoint / "training_state" / SETTINGS_NAME, advice)
    elif overwrite:
        for path in list_checkpoints(folder):
            remove_checkpoint(path)
    else:
        advice = "give another --output_dir, or --overwrite"
        check_settings(settings, folder / SETTINGS_NAME, advice)
    write_settings(settings, folder)


def write_settings(settings: dict[str, Any], folder: Path) -> None:
    """Leave the settings where a later run looks for them."""
    content = json.dumps(settings, indent=2).encode()
    write_whole(folder / SETTINGS_NAME, lambda file: file.write(content))
