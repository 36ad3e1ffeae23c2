"""What several processes have to agree on, and who of them speaks."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from custom_diffusion.errors import UserError
from custom_diffusion.training.settings import differences

# Of the others for the main one, which makes validation images and uploads: torch's own ten minutes are too short.
PATIENCE = timedelta(hours=6)
SECONDS_TO_HEAR = 10.0


def _store() -> Any:
    """Where the processes leave each other messages; None for a process alone."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed.distributed_c10d._get_default_store()


def name_to_speak_as(error: str) -> str | None:
    """Who says an error: "" on a machine's first process, and on another one its name where it alone has found it.

    Every process finds most errors, such as a missing folder, and one line of it is enough.

    Returns:
        What to put before the error; None for nothing to say.
    """
    store, machine = _store(), os.environ.get("GROUP_RANK", "0")
    key = f"custom_diffusion/error/{machine}"
    if int(os.environ.get("LOCAL_RANK", "0")) <= 0:
        if store is not None:
            store.set(key, error)
        return ""
    if store is None:
        return None
    try:
        store.wait([key], timedelta(seconds=SECONDS_TO_HEAR))
        is_said = store.get(key).decode() == error
    except RuntimeError:  # a time-out, or the first process is gone with the store
        is_said = False
    return None if is_said else f"process {torch.distributed.get_rank()}: "


def check_processes_agree(settings: dict[str, Any], checkpoint: str | None, accelerator: Accelerator) -> None:
    """Make sure that all processes were given the same, and see the same files.

    Two machines may each have a folder of a name, with other images in it; the shares of the work would not fit then.

    Args:
        settings: see :func:`settings.describe_settings`.
        checkpoint: name of the checkpoint to continue from.

    Raises:
        UserError: on every process, naming one that differs from the main one and in what.
    """
    if accelerator.num_processes == 1:
        return
    everyone = gather_object([(socket.gethostname(), checkpoint, settings)])
    host, expected_checkpoint, expected = everyone[0]
    for number, (other_host, other_checkpoint, other) in enumerate(everyone):
        found = differences(other, expected)
        if other_checkpoint != expected_checkpoint:
            found.append(f"checkpoint {expected_checkpoint} -> {other_checkpoint}")
        if found:
            raise UserError(
                f"process {number} ({other_host}) sees other inputs than process 0 ({host}): {'; '.join(found)}; give "
                "all of them the same command, and folders with the same files or one that they share"
            )
