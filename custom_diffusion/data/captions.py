"""Captions of single images, and datasets of the Hub."""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from custom_diffusion.errors import UserError
from custom_diffusion.files import read_text
from custom_diffusion.text import first_line

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
        return read_text(path)
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
