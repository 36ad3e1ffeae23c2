"""Datasets of the Hugging Face Hub: which columns hold images and captions, and what a caption may be."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from custom_diffusion.errors import UserError
from custom_diffusion.text import first_line

# The first of these that a dataset has, in upper or lower case.
CAPTION_COLUMNS = ("text", "caption", "captions", "txt", "prompt", "description", "title")
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "image_url", "url", "img_url")

# Keys under which a caption in several parts has its text.
_TEXT_KEYS = (*CAPTION_COLUMNS, "raw", "sentence", "en")

# What PNG can hold, of Pillow's modes.
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def import_datasets(what_for: str) -> ModuleType:
    """The package ``datasets``, which only those need who use it.

    Args:
        what_for: the start of the error's message, such as "--source dataset needs the package datasets".

    Raises:
        UserError: where it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f'{what_for}: pip install ".[datasets]"') from error
    return datasets


def find_image_column(features: Mapping[str, Any], datasets: ModuleType) -> str | None:
    """The column with the images: one of their type before one that is only called so.

    Args:
        features: names and types of all columns.
        datasets: the package.
    """
    typed = [name for name, feature in features.items() if _holds_images(feature, datasets)]
    return named_column(typed, IMAGE_COLUMNS) or next(iter(typed), None) or named_column(features, IMAGE_COLUMNS)


def find_caption_column(features: Mapping[str, Any]) -> str | None:
    """The column with the captions, by its name."""
    return named_column(features, CAPTION_COLUMNS)


def named_column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first of ``names`` that is a column, in upper or lower case."""
    by_lower = {column.lower(): column for column in columns}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _holds_images(feature: Any, datasets: ModuleType) -> bool:
    inner = _inner(feature)
    return isinstance(feature, datasets.Image) or (inner is not None and _holds_images(inner, datasets))


def _inner(feature: Any) -> Any:
    """The type of a list's entries; None for anything else."""
    if isinstance(feature, (list, tuple)):
        return feature[0] if feature else None
    return getattr(feature, "feature", None)


def captions_of(value: Any, feature: Any = None) -> list[str]:
    """All captions in a value: a text, a number, a class label, or lists and dictionaries of those.

    Args:
        value: what a row of a dataset has in its caption column; anything.
        feature: the column's type, which knows the names of class labels.

    Returns:
        Captions without white space around them, none empty, each once.
    """
    return list(dict.fromkeys(text for text in map(str.strip, _texts(value, feature)) if text))


def _texts(value: Any, feature: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield value.decode("utf-8", "replace")
    elif isinstance(value, int) and hasattr(feature, "int2str"):
        # Datasets write -1 where a label is not known.
        yield feature.int2str(value) if 0 <= value < feature.num_classes else ""
    elif isinstance(value, Mapping):
        of_text = [key for key in _TEXT_KEYS if key in value]
        types = feature if isinstance(feature, Mapping) else {}
        for key in of_text or value:
            yield from _texts(value[key], types.get(key, _inner(feature)))
    elif isinstance(value, Iterable):
        for entry in value:
            yield from _texts(entry, _inner(feature))
    elif value is not None:
        yield str(value)


def dataset_folder(name: str, cache: Path) -> Path:
    """Copy the images of a Hugging Face dataset into a folder, with their captions beside them.

    Args:
        name: the dataset's id on the Hub, ``owner/name`` or ``owner/name@revision``; its split ``train`` is taken.
        cache: where the folder is made; one that is there from an earlier run is used again.

    Raises:
        UserError: where the package ``datasets`` or the dataset is missing, or it has no images.
    """
    folder = cache / name.replace("/", "--")
    if folder.is_dir():
        return folder
    datasets = import_datasets(f"there is no folder {name!r} (instance_data_dir); to take it for a dataset of the Hub")
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
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix="."))
    try:
        _write_rows(rows, image, temporary)
        if not any(temporary.glob("*.png")):
            raise UserError(f"the dataset {name!r} (instance_data_dir) has no image in its column {image!r}")
        # Under its name only when it is complete; another process of the same run may have been first.
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_rows(rows: Any, image: str, folder: Path) -> None:
    caption = find_caption_column(rows.features)
    for number, row in enumerate(rows):
        shown = row[image]
        if shown is None:
            continue
        shown = shown if shown.mode in _PNG_MODES else shown.convert("RGB")
        shown.save(folder / f"{number:05d}.png")
        if caption is not None and (captions := captions_of(row[caption], rows.features[caption])):
            (folder / f"{number:05d}.txt").write_text(captions[0], encoding="utf-8")
