"""Class images from a user's own files: a folder or a tar, which give the same images and captions."""

from __future__ import annotations

import json
import os
import tarfile
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from custom_diffusion.data.hub_datasets import captions_of
from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.archives import Contents, opened_tar
from custom_diffusion.retrieval.messages import warn
from custom_diffusion.retrieval.sources import Candidate, Source, SourceError
from custom_diffusion.retrieval.words import has_words, matching_caption, query_words, text_or_empty
from custom_diffusion.text import one_line

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".mpo"),
)
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

# Images that the web does not show, and archives of other kinds: they are counted, not read.
_OTHER_IMAGES = (
    *(".heic", ".heif", ".svg", ".svgz", ".jxl", ".jp2", ".j2k", ".ico", ".psd", ".xcf", ".tga", ".eps", ".ppm"),
    *(".pgm", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
_OTHER_ARCHIVES = (".zip", ".rar", ".7z", ".tar.zst", ".tar.lz4")
_TEXT_ENDINGS = (".txt", ".json")
_HEAD = 16
_MOST_NESTED = 4


@dataclass(frozen=True)
class _File:
    """A file in a folder or in a tar.

    Attributes:
        parts: its folders and its name, below where the search began.
        origin: gives where it comes from, for people.
        size: in bytes.
        problem: why it cannot be read; empty where it can.
        open: gives its content.
    """

    parts: tuple[str, ...]
    origin: Callable[[], str]
    size: int
    problem: str
    open: Callable[[], IO[bytes]]

    @property
    def name(self) -> str:
        return self.parts[-1]

    def has_ending(self, *endings: str) -> bool:
        return self.name.lower().endswith(endings)

    def read(self, most: int = -1) -> bytes:
        with self.open() as file:
            return file.read(most)


class LocalFiles(Source):
    """A folder of images (with subfolders and tars), or a tar, searched by the words of the captions.

    A caption lies beside its image, under the same name: ``7.jpg``, ``7.txt`` or ``7.json`` ({"caption": ...}), as
    img2dataset writes them. One of ``7.txt`` also belongs to ``7.0.jpg`` and ``7.1.jpg``, where these have none of
    their own. Without one, the words of the path are searched.

    Args:
        path: folder or tar file.
        words: words that a caption must hold; those of the class prompt if None, and any caption will do if empty.
        max_bytes: longer images are left out.

    Raises:
        UserError: where there is no such folder or tar.
    """

    def __init__(self, path: str, words: str | None = None, max_bytes: int = 20 * 2**20) -> None:
        super().__init__()
        self.path = Path(path)
        self.words = words
        self.max_bytes = max_bytes
        self._told: set[str] = set()
        if not self.path.exists():
            raise UserError(f"there is no folder or tar {path!r} (--path)")
        if self.path.is_file() and not path.lower().endswith(TAR_ENDINGS):
            raise UserError(f"--path {path!r} is neither a folder nor a tar ({', '.join(TAR_ENDINGS)}): unpack it")

    def describe(self) -> str:
        """The folder or tar."""
        return str(self.path)

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`; in the order of the names."""
        words = query_words(class_prompt if self.words is None else self.words)
        self._told.clear()
        if self.path.is_dir():
            yield from self._of_folder(self.path, (), words, set())
            return
        file = _on_disk(self.path, (self.path.name,))
        try:
            damage = yield from self._of_tar(file, words)
        except OSError as error:
            raise SourceError(f"{str(self.path)!r} cannot be read: {error.strerror or error}") from error
        if damage:
            raise SourceError(f"{str(self.path)!r} is a broken tar: {one_line(damage)}")

    # --- folders and tars ------------------------------------------------------------------------

    def _of_folder(
        self, folder: Path, parts: tuple[str, ...], words: Sequence[str], linked: set[Path]
    ) -> Iterator[Candidate]:
        try:
            paths = sorted(folder.iterdir(), key=lambda path: path.name)
        except OSError as error:
            if not parts:
                raise SourceError(f"{str(folder)!r} cannot be read: {error.strerror}") from error
            self.left_out["folder that cannot be read"] += 1
            warn(f"{str(folder)!r} cannot be read: {error.strerror}")
            return
        files = [_on_disk(path, (*parts, path.name)) for path in paths if not path.is_dir()]
        captions = _captions_by_stem(files)
        by_name = {file.name: file for file in files}
        for path in paths:
            if path.name in by_name:
                yield from self._of_file(by_name[path.name], captions, words, 0)
            elif not path.is_symlink() or self._is_elsewhere(path, linked):
                yield from self._of_folder(path, (*parts, path.name), words, linked)

    def _is_elsewhere(self, link: Path, linked: set[Path]) -> bool:
        """Whether a link leads to a folder that is not read anyway, and has not been yet."""
        target, root = link.resolve(), self.path.resolve()
        if target.is_relative_to(root) or target in linked:
            return False
        if root.is_relative_to(target):
            self.left_out["link to a folder around this one"] += 1
            return False
        linked.add(target)
        return True

    def _of_tar(self, tar: _File, words: Sequence[str], nested: int = 0) -> Generator[Candidate, None, str | None]:
        """The candidates in a tar; gives what is wrong with the tar in the end."""
        with tar.open() as file, opened_tar(file, tar.name) as contents:
            files = _in_tar(contents, tar.origin())
            for replaced in contents.replaced:
                self.left_out["replaced by a later file of the tar"] += _is_image(replaced.parts[-1])
            by_folder: dict[tuple[str, ...], list[_File]] = {}
            for found in files:
                by_folder.setdefault(found.parts[:-1], []).append(found)
            captions = {folder: _captions_by_stem(beside) for folder, beside in by_folder.items()}
            for found in files:
                yield from self._of_file(found, captions[found.parts[:-1]], words, nested + 1)
            return contents.damage

    def _of_file(
        self, file: _File, captions: Mapping[str, Sequence[_File]], words: Sequence[str], nested: int
    ) -> Iterator[Candidate]:
        """The candidate of a file, or of all files in it; whatever is an image is yielded or counted."""
        is_hidden = any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in file.parts)
        is_image = _is_image(file.name)
        try:
            if is_hidden or file.problem:
                reason = file.problem or "hidden file"
                self.left_out[reason] += is_image or file.has_ending(*_OTHER_IMAGES)
            elif file.has_ending(*_OTHER_IMAGES):
                self.left_out["image of a kind that is not read"] += 1
            elif file.has_ending(*_OTHER_ARCHIVES) or (file.has_ending(*TAR_ENDINGS) and nested > _MOST_NESTED):
                self.left_out["archive that is not read"] += 1
            elif file.has_ending(*TAR_ENDINGS):
                damage = yield from self._of_tar(file, words, nested)
                if damage:
                    self.left_out["broken tar"] += 1
                    warn(f"{file.origin()} is a broken tar: {one_line(damage)}")
            elif is_image or (not file.has_ending(*_TEXT_ENDINGS) and looks_like_image(file.read(_HEAD))):
                yield from self._of_image(file, captions, words)
        except (OSError, EOFError, ValueError, tarfile.TarError):
            self.left_out["cannot be read"] += 1

    # --- images and their captions ---------------------------------------------------------------

    def _of_image(
        self, file: _File, captions: Mapping[str, Sequence[_File]], words: Sequence[str]
    ) -> Iterator[Candidate]:
        if file.size > self.max_bytes:
            self.left_out["too many bytes"] += 1
            return
        told, address = self._caption(file, captions)
        caption = matching_caption(told, words) if told else ""
        if caption is None or (not told and not has_words("/".join(file.parts), words)):
            self.left_out["caption without the words"] += 1
        else:
            yield Candidate(address or file.origin(), caption, image=file.read())

    def _caption(self, file: _File, captions: Mapping[str, Sequence[_File]]) -> tuple[list[str], str]:
        """Captions and web address from the text files beside an image."""
        stem = file.name
        while "." in stem.lstrip("."):
            stem = stem.rpartition(".")[0]
            if stem in captions:
                break
        told, address = [], ""
        for beside in captions.get(stem, ()):
            if beside.size > self.max_bytes or beside.problem:
                continue
            data = beside.read()
            if beside.has_ending(".json"):
                entries = _json(data)
                told += captions_of(entries.get("caption"))
                address = address or self._address(entries, beside, file)
            else:
                told = [*captions_of(data.removeprefix(b"\xef\xbb\xbf")), *told]
        return told, address

    def _address(self, entries: Mapping[str, object], beside: _File, file: _File) -> str:
        """The address that a sample tells, made different for each of its images."""
        address = text_or_empty(entries.get("url")).strip()
        if not address or beside.origin() not in self._told:
            self._told.add(beside.origin())
            return address
        return f"{address}#{file.name}"


def _on_disk(path: Path, parts: tuple[str, ...]) -> _File:
    try:
        problem = "" if path.is_file() else "no regular file" if path.exists() else "link that leads nowhere"
        size = path.stat().st_size if not problem else 0
    except OSError:
        problem, size = "cannot be read", 0
    return _File(parts, lambda: Path(os.path.realpath(path)).as_uri(), size, problem, lambda: path.open("rb"))


def _in_tar(contents: Contents, tar: str) -> list[_File]:
    def never() -> IO[bytes]:
        raise FileNotFoundError

    def origin(name: str) -> str:
        # As it stands there, unless that is no line of text: the list of origins has one line for each.
        shown = name if one_line(name) == name else urllib.parse.quote(os.fsencode(name))
        return f"{tar}#{shown}"

    return [
        _File(member.parts, partial(origin, member.name), member.size, member.problem, member.open or never)
        for member in contents.members
    ]


def _captions_by_stem(files: Iterable[_File]) -> dict[str, list[_File]]:
    """Text files by their names without the ending; of one name, the text before the JSON."""
    found: dict[str, list[_File]] = {}
    for ending in _TEXT_ENDINGS:
        for file in files:
            if file.has_ending(ending):
                found.setdefault(file.name[: -len(ending)], []).append(file)
    return found


def _json(data: bytes) -> dict[str, object]:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def looks_like_image(head: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of an image that can be read, whatever its name says."""
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*")
    is_bmp = head.startswith(b"BM") and head[6:10] == bytes(4)
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    is_avif = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis")
    return head.startswith(starts) or is_bmp or is_webp or is_avif
