"""The lists of a class folder with real images: line k of each list is about the same image.

retrieve.py writes them, and training with ``--real_prior`` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from custom_diffusion.errors import UserError
from custom_diffusion.files import read_text, write_bytes

CAPTIONS, ORIGINS, IMAGES = "caption.txt", "urls.txt", "images.txt"
LISTS = (CAPTIONS, ORIGINS, IMAGES)


def read_lists(folder: Path, advice: str) -> list[tuple[Path, str]]:
    """The images of a class folder with their captions, in the order of the lists.

    Args:
        folder: a class folder.
        advice: how to get one, for the message of an error.

    Raises:
        UserError: for lists that are missing, cannot be read, or do not belong together.
    """
    lines = {}
    for name in (IMAGES, CAPTIONS):
        try:
            lines[name] = lines_of(read_text(folder / name))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{str(folder / name)!r} cannot be read; {advice}") from error
    names, captions = without_blank_end([lines[IMAGES], lines[CAPTIONS]])
    if len(names) != len(captions):
        raise UserError(
            f"in {str(folder)!r} {IMAGES} has {len(names)} lines and {CAPTIONS} has {len(captions)}: captions would go "
            f"to the wrong images; {advice}"
        )
    return [(_image_path(folder, name), text) for name, text in zip(names, captions, strict=True) if name.strip()]


def write_lists(folder: Path, entries: Sequence[tuple[Path, str, str]]) -> None:
    """Write all lists; those that are up to date stay untouched.

    Args:
        folder: the class folder.
        entries: path, caption and origin of each image, none with a line break.
    """
    content = {
        IMAGES: [path.as_posix() for path, _, _ in entries],
        CAPTIONS: [caption for _, caption, _ in entries],
        ORIGINS: [origin for _, _, origin in entries],
    }
    for name in LISTS:
        data = "".join(f"{line}\n" for line in content[name]).encode()
        path = folder / name
        if not path.is_file() or path.read_bytes() != data:
            write_bytes(path, data)


def lines_of(text: str) -> list[str]:
    """The lines of a list, however an editor has ended them."""
    # Not splitlines(): it also breaks at characters that captions of the web do hold, such as U+2028.
    lines = text.removeprefix("\ufeff").removesuffix("\n").split("\n")
    return [line.rstrip("\r") for line in lines]


def without_blank_end(lists: Sequence[list[str]]) -> list[list[str]]:
    """Lists without the blank lines at their ends that only some of them have."""
    length = min(map(len, lists), default=0)
    return [lines[:length] if not any(map(str.strip, lines[length:])) else lines for lines in lists]


def _image_path(folder: Path, name: str) -> Path:
    # The list holds paths as seen from where retrieve.py ran; a folder that was moved still has its images/.
    path = Path(name)
    return path if path.is_file() else folder / "images" / path.name
