"""Class images from a user's own files and from datasets of the Hub."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from custom_diffusion.errors import UserError
from custom_diffusion.retrieval.sources import Candidate, Source, SourceError
from custom_diffusion.retrieval.words import has_words, query_words, text_or_empty
from custom_diffusion.text import one_line

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")


class LocalFiles(Source):
    """A folder of images (with subfolders and tars), or a tar, searched by the words of the captions.

    A caption lies beside its image, under the same name: ``7.jpg``, ``7.txt`` or ``7.json`` ({"caption": ...}), as
    img2dataset writes them. Without one, the words of the path are searched.

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
        if not self.path.exists():
            raise UserError(f"there is no folder or tar {path!r} (--path)")
        if self.path.is_file() and not path.lower().endswith(TAR_ENDINGS):
            raise UserError(f"--path {path!r} is neither a folder nor a tar ({', '.join(TAR_ENDINGS)})")

    def describe(self) -> str:
        """The folder or tar."""
        return str(self.path)

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`; in the order of the names."""
        words = query_words(class_prompt if self.words is None else self.words)
        try:
            for path in [self.path] if self.path.is_file() else sorted(self.path.rglob("*")):
                if path.name.startswith(".") or not path.is_file():
                    continue
                if path.name.lower().endswith(TAR_ENDINGS):
                    yield from self._of_tar(path, words)
                elif path.suffix.lower() in IMAGE_ENDINGS:
                    yield from self._of_file(path, words)
        except OSError as error:
            raise SourceError(f"{error.filename or str(self.path)!r} cannot be read: {error.strerror}") from error

    def _of_file(self, path: Path, words: Sequence[str]) -> Iterator[Candidate]:
        beside = {
            ending: path.with_suffix(ending).read_bytes()
            for ending in (".txt", ".json")
            if path.with_suffix(ending).is_file()
        }
        name = path.relative_to(self.path).as_posix()
        if path.stat().st_size > self.max_bytes:
            self.left_out["too many bytes"] += 1
        else:
            yield from self._matching(name, beside, words, path.resolve().as_uri(), path.read_bytes)

    def _of_tar(self, path: Path, words: Sequence[str]) -> Iterator[Candidate]:
        # Read in one pass, which also works for compressed ones; the files of a sample lie side by side.
        try:
            with tarfile.open(path, "r|*") as tar:
                key, parts, image = None, {}, None
                for member in tar:
                    stem, dot, ending = PurePosixPath(member.name).name.partition(".")
                    if not member.isfile() or not stem:
                        continue
                    here = str(PurePosixPath(member.name).parent / stem)
                    if here != key:
                        yield from self._of_sample(path, image, parts, words)
                        key, parts, image = here, {}, None
                    ending = dot + ending.lower()
                    if member.size > self.max_bytes:
                        self.left_out["too many bytes"] += ending.endswith(IMAGE_ENDINGS)
                    elif ending.endswith((*IMAGE_ENDINGS, ".txt", ".json")):
                        parts[ending] = tar.extractfile(member).read()
                        image = (member.name, ending) if ending.endswith(IMAGE_ENDINGS) else image
                yield from self._of_sample(path, image, parts, words)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise SourceError(f"{str(path)!r} is a broken tar: {one_line(str(error))}") from error

    def _of_sample(
        self, tar: Path, image: tuple[str, str] | None, parts: dict[str, bytes], words: Sequence[str]
    ) -> Iterator[Candidate]:
        if image is not None:
            name, ending = image
            origin = f"{tar.resolve().as_uri()}#{one_line(name)}"
            yield from self._matching(name, parts, words, origin, lambda: parts[ending])

    def _matching(
        self, name: str, beside: dict[str, bytes], words: Sequence[str], origin: str, read: Callable[[], bytes]
    ) -> Iterator[Candidate]:
        caption, address = _caption_beside(beside)
        if has_words(caption or name, words):
            yield Candidate(address or origin, caption, image=read())
        else:
            self.left_out["caption without the words"] += 1


def _caption_beside(beside: dict[str, bytes]) -> tuple[str, str]:
    """Caption and web address from the text files beside an image."""
    try:
        told = json.loads(beside.get(".json", b"null"))
    except (ValueError, RecursionError):
        told = None
    told = told if isinstance(told, dict) else {}
    text = beside.get(".txt", b"").decode("utf-8", "replace").strip()
    return text or text_or_empty(told.get("caption")), text_or_empty(told.get("url"))


class HubDataset(Source):
    """A dataset of the Hugging Face Hub (or a folder that `datasets` can read), streamed, searched by captions.

    Args:
        path: its name, such as "user/dataset", or a folder.
        words: as for :class:`LocalFiles`.
        split: such as "train".
        config: the dataset's configuration, where it has several.
        image_column, caption_column: found by type and name if None. The image column may hold web addresses.

    Raises:
        UserError: where the package is missing.
    """

    IMAGE_COLUMNS = ("image", "img", "jpg", "png", "image_url", "url", "img_url")
    CAPTION_COLUMNS = ("caption", "text", "captions", "txt", "prompt", "description", "title")

    def __init__(
        self,
        path: str,
        words: str | None = None,
        split: str = "train",
        config: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        super().__init__()
        self.path, self.words, self.split, self.config = path, words, split, config
        self.image_column, self.caption_column = image_column, caption_column
        try:
            import datasets
        except ImportError as error:
            raise UserError('--source dataset needs the package datasets: pip install ".[datasets]"') from error
        self._datasets = datasets

    def describe(self) -> str:
        """Name and split of the dataset."""
        return f"the dataset {self.path!r}, split {self.split!r}"

    def candidates(self, class_prompt: str, wanted: int) -> Iterator[Candidate]:
        """See :class:`Source`; in the order of the dataset."""
        words = query_words(class_prompt if self.words is None else self.words)
        try:
            data = self._datasets.load_dataset(self.path, self.config, split=self.split, streaming=True)
            columns = dict(data.features or next(iter(data)))
            image, caption = self._columns(columns)
            if isinstance(columns[image], self._datasets.Image):
                # The encoded bytes: decoding is for those whose caption fits.
                data = data.cast_column(image, self._datasets.Image(decode=False))
            for number, row in enumerate(data.select_columns([image, caption])):
                yield from self._candidate(number, row[image], row[caption], words)
        except UserError:
            raise
        except Exception as error:  # the package raises its own, the Hub's and the readers' errors
            reason = one_line(str(error)) or type(error).__name__
            raise SourceError(f"the dataset {self.path!r} cannot be read: {reason[:300]}") from error

    def _columns(self, columns: dict[str, Any]) -> tuple[str, str]:
        by_type = [name for name, feature in columns.items() if isinstance(feature, self._datasets.Image)]
        image = self.image_column or next(iter(by_type), None) or _named(columns, self.IMAGE_COLUMNS)
        caption = self.caption_column or _named(columns, self.CAPTION_COLUMNS)
        for flag, name in (("--image_column", image), ("--caption_column", caption)):
            if name not in columns:
                known = f"{self.path!r} has the columns {', '.join(columns)}"
                raise UserError(f"{known}, and no {name!r}: choose with {flag}" if name else f"{known}: give {flag}")
        return image, caption

    def _candidate(self, number: int, value: Any, caption: Any, words: Sequence[str]) -> Iterator[Candidate]:
        caption = (
            next((text for text in caption if isinstance(text, str)), "") if isinstance(caption, list) else caption
        )
        if not has_words(text_or_empty(caption), words):
            self.left_out["caption without the words"] += 1
        elif isinstance(value, str):
            yield Candidate(value, text_or_empty(caption), value)
        elif isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            yield Candidate(f"{self.path}#{self.split}/{number}", text_or_empty(caption), image=value["bytes"])
        elif isinstance(value, dict) and value.get("path"):
            yield from self._of_path(number, value["path"], caption)
        else:
            self.left_out["neither address nor image"] += 1

    def _of_path(self, number: int, path: str, caption: str) -> Iterator[Candidate]:
        with self._datasets.utils.file_utils.xopen(path, "rb") as file:
            yield Candidate(f"{self.path}#{self.split}/{number}", caption, image=file.read())


def _named(columns: Iterable[str], names: Sequence[str]) -> str | None:
    by_lower = {column.lower(): column for column in columns}
    return next((by_lower[name] for name in names if name in by_lower), None)
