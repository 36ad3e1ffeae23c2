"""Where a run is seen besides its output folder: experiment trackers, and the Hub."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import CommitOperationAdd, HfApi
from PIL import Image

from custom_diffusion.command_line import CONFIG_NAME
from custom_diffusion.errors import UserError
from custom_diffusion.report.page import LOG_NAME, REPORT_NAME
from custom_diffusion.text import first_line
from custom_diffusion.training.settings import SETTINGS_NAME


def tracker_address(tracker: Any) -> str:
    """Where a run can be followed: an address, or the command that shows what is kept on this machine."""
    if tracker.name == "tensorboard":
        return f"tensorboard --logdir {shlex.quote(str(tracker.logging_dir))}"
    if tracker.name == "wandb":
        return tracker.run.url or f"wandb sync {shlex.quote(str(Path(tracker.run.dir).parent))}"
    if tracker.name == "comet_ml":
        url = tracker.writer.url or ""
        # Offline it is a sentence; Comet says at the end where its archive is.
        return url if url.startswith("http") else "Comet, offline"
    return str(tracker.name)


def log_images(tracker: Any, images: Sequence[Image.Image], prompt: str, phase: str, step: int) -> None:
    """Show the images of a prompt in a tracker, where it is one that can.

    Args:
        tracker: one of the accelerator's.
        phase: the images' name there.
    """
    if tracker.name == "tensorboard":
        tracker.writer.add_images(phase, np.stack([np.asarray(image) for image in images]), step, dataformats="NHWC")
    elif tracker.name == "wandb":
        import wandb

        captions = [f"{number}: {prompt}" for number in range(len(images))]
        captioned = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
        tracker.log({phase: captioned}, step=step)
    elif tracker.name == "comet_ml":
        for number, image in enumerate(images):
            tracker.writer.log_image(image, name=f"{phase} {number}: {prompt}", step=step)


def create_hub_repository(name: str, token: str | None) -> str:
    """Make the repository before training: a wrong token should not be noticed after it; gives its whole id.

    Raises:
        UserError: where the Hub refuses.
    """
    try:
        return HfApi(token=token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"--push_to_hub: the Hub does not let us make {name!r}: {reason}") from error


def upload_command(repository: str, folder: str) -> str:
    """The command that uploads a result by hand."""
    kept_here = " ".join(f"--exclude {name}" for name in (CONFIG_NAME, SETTINGS_NAME, LOG_NAME, REPORT_NAME))
    return f"hf upload {repository} {shlex.quote(folder)} --include '*.*' --exclude '*/*' {kept_here}"


def push_to_hub(repository: str, contents: Mapping[str, Path | bytes], folder: str, token: str | None) -> str:
    """Upload files in one commit; gives the address.

    Args:
        repository: its whole id.
        contents: of the files, by the names that they get.
        folder: where all of them are on this machine.

    Raises:
        UserError: where the upload fails; the message says how to try again.
    """
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        commit = HfApi(token=token).create_commit(repository, operations, commit_message="End of training")
        return str(commit.repo_url)
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"the upload to {repository!r} failed ({reason}); the files are safe in {folder!r}, upload them with: "
            f"{upload_command(repository, folder)}"
        ) from error
