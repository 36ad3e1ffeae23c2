"""Captions of single images."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom_diffusion.errors import UserError
from custom_diffusion.files import read_text

CAPTION_ENDINGS = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")  # of an image folder's metadata, the first that there is


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
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from error
    pairs = []
    for number, row in enumerate(rows, 1):
        column = next((name for name in CAPTION_COLUMNS if isinstance(row, dict) and row.get(name) is not None), None)
        if column is None or not isinstance(row.get("file_name"), str) or not isinstance(row[column], str):
            raise UserError(f"{str(path)!r}: entry {number} needs file_name and one of {', '.join(CAPTION_COLUMNS)}")
        pairs.append((row["file_name"], row[column]))
    return pairs
