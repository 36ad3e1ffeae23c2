"""Masks of instance images: which file is whose, and whether it can be used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torchvision.transforms.v2.functional as TF
from PIL import Image

from custom_diffusion.data.buckets import Shape, largest_part
from custom_diffusion.errors import UserError
from custom_diffusion.images import image_size, load_alpha, load_image
from custom_diffusion.text import first_line, some

logger = logging.getLogger("custom_diffusion")

FOLDER_NAME = "mask"
ENDING = "-masklabel"  # OneTrainer's
LEAST_INSIDE = 128  # of 255: a mask of the numbers 0 and 1, as programs write them, is no mask but nearly black
MOST_NAMES = 5  # in a message


def find_mask_files(folder: Path, images: Sequence[Path]) -> tuple[dict[Path, Path], list[Path]]:
    """Masks that are files of their own: ``mask/photo.png`` or ``photo-masklabel.png`` beside ``photo.jpg``.

    The ending is of no account, but of several in the folder ``mask`` the one with the image's own is taken first.

    Args:
        folder: holds the images.
        images: of the folder, those that are trained on.

    Returns:
        Image to mask, and the files in the folder ``mask`` that are of no image.
    """
    inside = _files(folder / FOLDER_NAME)
    by_name = {path.name: path for path in inside}
    by_stem = {path.stem: path for path in reversed(inside)}
    labels = {path.stem: path for path in reversed(_files(folder)) if path.stem.lower().endswith(ENDING)}
    labels = {stem[: -len(ENDING)]: path for stem, path in labels.items()}
    found = {}
    for image in images:
        mask = by_name.get(image.name) or by_stem.get(image.stem) or labels.get(image.stem)
        if mask is not None:
            found[image] = mask
    used = set(found.values())
    return found, [path for path in inside if path not in used]


def _files(folder: Path) -> list[Path]:
    """The files of a folder in the order of their names, without hidden ones."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in entries if path.is_file() and not path.name.startswith(".")]


def find_masks(images: Sequence[Path], shapes: Mapping[Path, Shape]) -> dict[Path, Path]:
    """The masks of images, each of which can be used.

    Says how many there are, and which images have none.

    Args:
        images: those that are trained on or validated with.
        shapes: the bucket of each image; if there are none, all are squares.

    Returns:
        Image to the file with its mask (see :func:`find_mask_files`), or to itself where its own alpha channel is its
        mask. An image that has none is not in it.

    Raises:
        UserError: for a mask that cannot be read, is of another size than its image, or has nothing inside; and where
            no image has a mask.
    """
    masks: dict[Path, Path] = {}
    for folder in dict.fromkeys(image.parent for image in images):
        own = [image for image in images if image.parent == folder]
        files, _ = find_mask_files(folder, own)
        masks |= files
        masks |= {image: image for image in own if image not in files and load_alpha(image) is not None}
    if not masks:
        raise UserError(
            "--masked_loss finds no mask: put mask/photo.png or photo-masklabel.png beside photo.jpg, or give images "
            "with an alpha channel"
        )
    for image, mask in masks.items():
        _check(image, mask, shapes.get(image, (1, 1)))
    alone = sum(image == mask for image, mask in masks.items())
    own_alpha = f", of {alone} in the alpha channel" if alone else ""
    logger.info(f"masks of {len(masks)} of {len(images)} images{own_alpha}")
    without = [image for image in images if image not in masks]
    if without:
        logger.warning(f"no mask, so that the whole image counts: {some(without, MOST_NAMES)}")
    return masks


def load_mask(image: Path, mask: Path) -> Image.Image:
    """The mask of an image in the mode L: 255 inside, 0 outside.

    Args:
        image, mask: as :func:`find_masks` gives them. Transparent parts of a mask's own file are outside.

    Raises:
        OSError, Image.DecompressionBombError: where the file cannot be read.
    """
    alpha = load_alpha(image) if mask == image else None
    return load_image(mask, background="black").convert("L") if alpha is None else alpha


def _check(image: Path, mask: Path, shape: Shape) -> None:
    """Make sure that a mask can be used; ``shape`` has the proportions of the part of the image that is shown."""
    try:
        pixels = load_mask(image, mask)
    except (OSError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"the mask {str(mask)!r} cannot be read: {reason}; save it again as PNG, or remove it"
        ) from error
    size = image_size(image)
    if pixels.size != size:
        raise UserError(
            f"the mask {str(mask)!r} has {pixels.width} x {pixels.height} pixels, and its image {str(image)!r} "
            f"{size[0]} x {size[1]}: give them the same size"
        )
    what = f"the alpha channel of {str(image)!r}" if mask == image else f"the mask {str(mask)!r}"
    if _is_empty(pixels):
        raise UserError(f"{what} has nothing inside: what is to be learned must be white, or opaque")
    if _is_empty(TF.center_crop(pixels, list(largest_part(size, shape)))):
        raise UserError(
            f"{what} has nothing inside the centre of the image, which is all that is shown: crop image and mask "
            "around the object, or give --aspect_buckets"
        )


def _is_empty(mask: Image.Image) -> bool:
    return bool(np.asarray(mask).max() < LEAST_INSIDE)
