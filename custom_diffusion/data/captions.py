"""Captions of single images, and datasets of the Hub."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom_diffusion.errors import UserError
from custom_diffusion.files import read_text
from custom_diffusion.text import first_line

CAPTION_ENDINGS = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")  # of an image folder's metadata, the first that there is


def dataset_folder(name: str, cache: Path) -> Path:
    """Bring the images of a Hugging Face dataset into a folder, with their captions beside them.

    Args:
        name: the dataset's id on the Hub, ``owner/name`` or ``owner/name@revision``; its split ``train`` is taken.
        cache: where the folder is made; one that is there from an earlier run is used again.

    Raises:
        UserError: where the package ``datasets`` or the dataset is missing, or it has no images.
    """
    folder = cache / name.replace("/", "--")
    if folder.is_dir():
        return folder
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"there is no folder {name!r} (instance_data_dir); to take it for a dataset on the Hub, "
            'pip install ".[datasets]"'
        ) from error
    repository, _, revision = name.partition("@")
    try:
        rows = datasets.load_dataset(repository, split="train", revision=revision or None)
    except Exception as error:  # datasets, the Hub client and pyarrow raise their own errors
        reason = first_line(error)
        raise UserError(
            f"there is no folder {name!r} (instance_data_dir), and no such dataset with a split 'train' on the Hub: "
            f"{reason}"
        ) from error
    image = next((column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise UserError(f"the dataset {name!r} (instance_data_dir) has no column of images: {', '.join(rows.features)}")
    caption = next((column for column in CAPTION_COLUMNS if column in rows.features), None)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix="."))
    for number, row in enumerate(rows):
        row[image].save(temporary / f"{number:05d}.png")
        if caption is not None and row[caption]:
            (temporary / f"{number:05d}.txt").write_text(str(row[caption]), encoding="utf-8")
    # Under its name only when it is complete; another process of the same run may have been first.
    try:
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise
    return folder


def is_caption_file(path: Path) -> bool:
    """Whether a file beside images holds captions: by its name, wherever it belongs."""
    return path.suffix.lower() in CAPTION_ENDINGS or path.name.lower() in METADATA_NAMES


def find_captions(folder: Path, images: Sequence[Path]) -> tuple[dict[Path, str], list[Path]]:
    """Captions of single images: a text file of the same name, or a Hugging Face image folder's metadata.

    The caption of ``photo.jpg`` is in ``photo.jpg.txt``, ``photo.jpg.caption``, ``photo.txt`` or ``photo.caption``,
    the first that there is. Else it may be in ``metadata.jsonl`` or ``metadata.csv``, with ``file_name`` and one of
    ``text``, ``caption`` and ``prompt``. Line breaks become spaces, an empty caption is none.

    Args:
        folder: holds them all.
        images: of the folder, those that can be read.

    Returns:
        Image to caption, and the text files that are of no image.

    Raises:
        UserError: for files that cannot be read, and metadata about images that are not there.
    """
    captions: dict[Path, str] = {}
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in (path for path in files if path.name.lower() in METADATA_NAMES):
        for name, caption in _read_metadata(path):
            if folder / name not in files:
                raise UserError(f"{str(path)!r} has a caption for {name!r}, which is not in the folder")
            captions[folder / name] = caption
    texts = {(path.stem, path.suffix.lower()): path for path in files if path.suffix.lower() in CAPTION_ENDINGS}
    unused = dict(texts)
    for image in images:
        names = (image.name, image.stem + image.suffix.lower(), image.stem)
        own = next((key for key in itertools.product(names, CAPTION_ENDINGS) if key in texts), None)
        if own is not None:
            captions[image] = _read_text(texts[own])
            unused.pop(own, None)
    captions = {image: " ".join(captions[image].split()) for image in images if image in captions}
    return {image: caption for image, caption in captions.items() if caption}, list(unused.values())


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_metadata(path: Path) -> list[tuple[str, str]]:
    text = _read_text(path)
    try:
        if path.suffix.lower() == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from error
    pairs = []
    for number, row in enumerate(rows, 1):
        column = next((name for name in CAPTION_COLUMNS if isinstance(row, dict) and row.get(name) is not None), None)
        if column is None or not isinstance(row.get("file_name"), str) or not isinstance(row[column], str):
            raise UserError(f"{str(path)!r}: entry {number} needs file_name and one of {', '.join(CAPTION_COLUMNS)}")
        pairs.append((row["file_name"], row[column]))
    return pairs
