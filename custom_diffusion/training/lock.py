"""One run at a time in an output folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from custom_diffusion.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: dict[Path, int] = {}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def lock_folder(folder: Path) -> None:
    """Keep other runs out of a folder, until :func:`unlocks_folders` or the end of this process.

    The folder itself is locked, so that nothing stays behind. Without locks (Windows, some network disks) nothing is
    done.

    Raises:
        UserError: where another process has it.
    """
    folder = folder.resolve()
    if fcntl is None or folder in _held:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another run is writing to {str(folder)!r}: wait for it, end it, or give another --output_dir"
        ) from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return
    _held[folder] = descriptor


def _let_go() -> None:
    while _held:
        os.close(_held.popitem()[1])


# A data worker that outlives a killed run for some seconds would keep the folder from the run that continues it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def unlocks_folders(main: _Function) -> _Function:
    """Give the folders back that a command has locked, however it ends."""

    @wraps(main)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return main(*args, **options)
        finally:
            _let_go()

    return run  # type: ignore[return-value]
