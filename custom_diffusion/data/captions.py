"""Captions of single images."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom_diffusion.errors import UserError

CAPTION_COLUMNS = ("text", "caption", "prompt")  # of an image folder's metadata, the first that there is


def find_captions(folder: Path, files: Sequence[Path]) -> tuple[dict[Path, str], set[Path]]:
    """Captions of single images: ``photo.txt`` beside ``photo.jpg``, or a Hugging Face image folder's metadata.

    That is ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and one of ``text``, ``caption`` and ``prompt``;
    a text file of its own comes before it. Line breaks become spaces, an empty caption is none.

    Returns:
        Image to caption, and the files that were read for it.

    Raises:
        UserError: for files that cannot be read, and metadata about images that are not there.
    """
    captions: dict[Path, str] = {}
    read: set[Path] = set()
    stems = {path.stem: path for path in files if path.suffix.lower() not in (".txt", ".jsonl", ".csv")}
    for path in files:
        if path.name in ("metadata.jsonl", "metadata.csv"):
            read.add(path)
            for name, caption in _read_metadata(path):
                if folder / name not in files:
                    raise UserError(f"{str(path)!r} has a caption for {name!r}, which is not in the folder")
                captions[folder / name] = caption
    for path in files:
        if path.suffix.lower() == ".txt" and path.stem in stems:
            read.add(path)
            captions[stems[path.stem]] = _read_text(path)
    captions = {path: " ".join(caption.split()) for path, caption in captions.items()}
    return {path: caption for path, caption in captions.items() if caption}, read


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_metadata(path: Path) -> list[tuple[str, str]]:
    text = _read_text(path)
    try:
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines(keepends=True)))
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
