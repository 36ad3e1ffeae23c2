"""What is in a tar: every file in it, and whether all of it could be read."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import posixpath
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from custom_diffusion.errors import UserError

# The first bytes of compressed files, and what opens them.
_COMPRESSED: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}

# Unpacking must leave this much room on the disk.
_ROOM = 2**30
_CHUNK = 2**20


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        name: as it stands in the tar.
        parts: the folders and the name that it is extracted to.
        size: in bytes.
        problem: why it cannot be read; empty where it can.
        open: gives its content.
    """

    name: str
    parts: tuple[str, ...]
    size: int = 0
    problem: str = ""
    open: Callable[[], IO[bytes]] | None = None


@dataclass
class Contents:
    """What is in a tar.

    Attributes:
        members: its files in the order of their names, as extracting it would leave them.
        replaced: files that a later one of the same name replaces.
        damage: what is wrong with the tar; empty where all of it could be read.
    """

    members: list[Member] = field(default_factory=list)
    replaced: list[Member] = field(default_factory=list)
    damage: str = ""


@contextlib.contextmanager
def opened_tar(file: IO[bytes], name: str) -> Iterator[Contents]:
    """All files in a tar, which can be read as long as the context lasts.

    Args:
        file: the tar, compressed or not.
        name: of the tar, for messages.

    Raises:
        UserError: where there is no room to unpack a compressed one.
        OSError: where it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        start = file.read(8)
        file.seek(0)
        damage = ""
        for magic, open_compressed in _COMPRESSED.items():
            if start.startswith(magic):
                # Going back in a compressed file is slow, and captions may come after their images.
                plain = stack.enter_context(tempfile.TemporaryFile())
                damage = _unpack(stack.enter_context(open_compressed(file)), plain, name)
                file = plain
                file.seek(0)
                break
        contents = Contents(damage=damage)
        try:
            tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:", ignore_zeros=True))
            _read_headers(tar, file, contents)
        except (tarfile.TarError, EOFError, ValueError) as error:  # a header's own numbers may be no numbers
            contents.damage = contents.damage or str(error)
        yield contents


def _unpack(compressed: Any, plain: IO[bytes], name: str) -> str:
    """Unpack a compressed file as far as possible; returns what is wrong with it."""
    written = 0
    while True:
        try:
            chunk = compressed.read(_CHUNK)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            return str(error) or type(error).__name__
        if not chunk:
            return ""
        if written % (64 * _CHUNK) == 0 and shutil.disk_usage(tempfile.gettempdir()).free < _ROOM:
            raise UserError(
                f"there is no room in {tempfile.gettempdir()!r} to unpack {name!r}: unpack it elsewhere and give the "
                "folder with --path, or set TMPDIR to a folder on a larger disk"
            )
        plain.write(chunk)
        written += len(chunk)


def _read_headers(tar: tarfile.TarFile, file: IO[bytes], contents: Contents) -> None:
    """Find all members, and whether there is anything between them that is none."""
    found: dict[tuple[str, ...], tarfile.TarInfo] = {}
    end = 0
    try:
        while (info := tar.next()) is not None:
            if not contents.damage and _holds_data(file, end, info.offset):
                contents.damage = "something between its files is no file"
            end = tar.offset
            parts = _parts(info.name)
            if parts in found and not found[parts].isdir():
                contents.replaced.append(_member(tar, found[parts], found))
            found[parts] = info
    except (tarfile.TarError, ValueError) as error:
        contents.damage = contents.damage or str(error)
    if not contents.damage and _holds_data(file, end, None):
        contents.damage = "something after its last file is no file"
    contents.members = [_member(tar, found[parts], found) for parts in sorted(found) if not found[parts].isdir()]


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, found: dict[tuple[str, ...], tarfile.TarInfo]) -> Member:
    parts = _parts(info.name)
    target: tarfile.TarInfo | None = info
    for _ in range(8):  # a link to a link is usual, a chain without end is not
        if target is None or not (target.islnk() or target.issym()):
            break
        base = "" if target.islnk() else posixpath.dirname(target.name)
        target = found.get(_parts(posixpath.normpath(posixpath.join(base, target.linkname))))
    if target is None or target.islnk() or target.issym():
        return Member(info.name, parts, problem="link that leads nowhere")
    if target.isdir():
        return Member(info.name, parts, problem="link to a folder")
    if not target.isreg():
        return Member(info.name, parts, problem="no regular file")

    def opened() -> IO[bytes]:
        file = tar.extractfile(target)
        assert file is not None, "it is a regular file"
        return file

    return Member(info.name, parts, target.size, open=opened)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _holds_data(file: IO[bytes], start: int, end: int | None) -> bool:
    """Whether anything but zeros is in this part of a file."""
    file.seek(start)
    left = end - start if end is not None else -1
    while left and (chunk := file.read(_CHUNK if left < 0 else min(left, _CHUNK))):
        if chunk.count(0) < len(chunk):
            return True
        left -= len(chunk) if left > 0 else 0
    return False
