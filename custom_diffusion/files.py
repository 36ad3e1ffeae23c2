"""Files: those that exist whole or not at all, the folders that hold them, and text that people wrote."""

from __future__ import annotations

import codecs
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from custom_diffusion.errors import UserError

# UTF-32 before UTF-16: the mark of its little-endian form begins with the other's.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HALF_WRITTEN = (".half-written-", ".tmp")
_read_from_pipes: dict[Path, str] = {}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# --- names ---------------------------------------------------------------------------------------


def has_hub_form(name: str) -> bool:
    """Whether a name has the form of a Hub repository, ``owner/name``."""
    return _HUB_ID.fullmatch(name) is not None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub repository and is no local file or folder."""
    return has_hub_form(name) and not Path(name).exists()


# --- folders -------------------------------------------------------------------------------------


def output_folder(path: str | os.PathLike) -> Path:
    """The folder of ``--output_dir``, made if it is not there.

    Raises:
        UserError: where it cannot be made or written to, before hours are spent on what cannot be saved.
    """
    if not str(path).strip():
        raise UserError("--output_dir is empty: give the name of a folder")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {str(path)!r} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {str(path)!r} cannot be written to")
    return folder


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """The folder of ``--output_dir`` for a result that replaces nothing; as it was before, where the result fails.

    Raises:
        UserError: where it cannot be made or written to, or holds something.
    """
    is_new = not Path(path).exists()
    folder = output_folder(path)
    occupied = next(folder.iterdir(), None)
    if occupied is not None:
        advice = "give a new or empty folder"
        if occupied.name.startswith(_HALF_WRITTEN[0]):
            advice += ", or remove this one if the run that wrote it was killed"
        raise UserError(f"--output_dir {str(path)!r} holds {occupied.name!r} already: {advice}")
    try:
        yield folder
    except BaseException:
        # Half a result would keep the same command from being run again.
        for path in folder.iterdir() if folder.is_dir() else ():
            with suppress(OSError):  # such as a file that a network's disk still holds: the first error counts
                remove_tree(path)
        if is_new and folder.is_dir():
            with suppress(OSError):
                folder.rmdir()
        raise


def is_same_folder(one: str, other: str) -> bool:
    """Whether two names are of one folder on this machine."""
    return Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other)


def remove_tree(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; of a link, the link. What is not there is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- text ----------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike) -> str:
    """The text of a file that a person may have written with any editor, see :func:`decode_text`.

    Raises:
        OSError: where it cannot be read.
        UnicodeDecodeError: where it is no text.
    """
    return decode_text(Path(path).read_bytes())


def read_text_again(path: str | os.PathLike) -> str:
    """As :func:`read_text`, also a second time where the first has emptied the file: a pipe, such as ``/dev/stdin``.

    Command lines are parsed twice: first without the libraries, which take seconds.

    Raises:
        OSError, UnicodeDecodeError: as :func:`read_text` does.
    """
    path = Path(path)
    if path.is_file():
        return read_text(path)
    if path not in _read_from_pipes:
        _read_from_pipes[path] = read_text(path)
    return _read_from_pipes[path]


def decode_text(content: bytes) -> str:
    """Bytes to text: UTF-8, or what a byte order mark says; the mark is no part of the text, line ends stay.

    Raises:
        UnicodeDecodeError: for bytes that are no text.
    """
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding)
    return content.decode("utf-8")


# --- files ---------------------------------------------------------------------------------------


def write_whole(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that it exists whole or not at all: a temporary name, flushed to disk, then renamed.

    Args:
        path: the file to write; what was there stays until the new content is complete.
        write: called with the open binary file.

    Raises:
        OSError: where it cannot be written.
    """

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    write_by_name(path, fill)


def write_by_name(path: str | os.PathLike, write: Callable[[Path], Any]) -> None:
    """As :func:`write_whole`, for libraries that write no open file; ``write`` is called with the temporary name.

    Raises:
        OSError: where it cannot be written.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=_HALF_WRITTEN[0], suffix=_HALF_WRITTEN[1], dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes private files; a result follows the user's umask like any other.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None:
            raise
        if cause.errno is not None:
            cause.filename = str(path)
        raise cause from None


def _os_error(error: BaseException) -> OSError | None:
    """The system's error behind another one, if it is one."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return error.__context__  # torch.save speaks of a position in the file instead
    number = re.search(r"\(os error (\d+)\)", str(error))  # what safetensors says, in words alone
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file's content whole or not at all."""
    write_whole(path, lambda file: file.write(content))


def half_written(folder: Path, name: str) -> Path:
    """Where a library may write a folder of its own, before its parts get their names: see :func:`new_folder`."""
    return folder / f"{_HALF_WRITTEN[0]}{name}{_HALF_WRITTEN[1]}"


def remove_half_written(folder: Path) -> None:
    """Remove what :func:`write_whole` has left in a folder where the process was killed."""
    for path in folder.glob(f"{_HALF_WRITTEN[0]}*{_HALF_WRITTEN[1]}"):
        remove_tree(path)
