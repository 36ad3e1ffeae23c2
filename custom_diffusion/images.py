"""Image files, without torch: retrieve.py, which needs no more than this, is then ready at once."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from custom_diffusion.files import write_whole


def load_image(path: str | os.PathLike | IO[bytes], least_side: int | None = None) -> Image.Image:
    """Open an image as people see it: upright, transparency on white, any mode as 8-bit RGB.

    Args:
        path: of the file, or the open file.
        least_side: a JPEG may come out smaller than it is, which is several times faster, but not below this many
            pixels.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: for files that are no (whole) image;
            these are what Pillow's decoders raise.
    """
    with Image.open(path) as opened:
        if least_side is not None:
            opened.draft("RGB", (least_side, least_side))
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I") or image.mode == "F":
            # 16-bit and float greys: Pillow would clip at 255 and leave a white image.
            grey = np.asarray(image, dtype=np.float32)
            full_scale = 65535 if grey.max() > 255 else 255
            image = Image.fromarray((grey * (255 / full_scale)).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def readable_images(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split files into those that are images and those that are not (or are broken).

    Every file is decoded whole: a truncated photograph shows itself only then, and would stop the run much later.
    """

    def is_readable(path: Path) -> bool:
        try:
            load_image(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return False
        return True

    with ThreadPoolExecutor() as pool:
        verdicts = list(pool.map(is_readable, paths))
    good = [path for path, verdict in zip(paths, verdicts, strict=True) if verdict]
    bad = [path for path, verdict in zip(paths, verdicts, strict=True) if not verdict]
    return good, bad


def contact_sheet(rows: Sequence[Sequence[Path]], labels: Sequence[str] | None = None, side: int = 256) -> Image.Image:
    """All images small on one.

    Args:
        rows: the images' paths; rows may differ in length.
        labels: a text above each row.
        side: the longest side of an image in pixels.
    """
    band = 24 if labels else 0
    sheet = Image.new("RGB", (side * max(map(len, rows)), (side + band) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)

    def thumbnail(path: Path) -> Image.Image:
        return ImageOps.contain(load_image(path, least_side=side), (side, side))

    with ThreadPoolExecutor() as pool:
        thumbnails = pool.map(thumbnail, [path for paths in rows for path in paths])
        for row, paths in enumerate(rows):
            top = row * (side + band)
            if labels:
                draw.text((4, top + 2), labels[row], fill="black", font=ImageFont.load_default(16))
            for column in range(len(paths)):
                sheet.paste(next(thumbnails), (column * side, top + band))
    return sheet


def write_image(path: str | os.PathLike, image: Image.Image, kind: str, **options: Any) -> None:
    """Write an image whole or not at all.

    Args:
        kind: ``PNG`` or ``JPEG``.
        options: what Pillow's ``save`` takes for it.
    """
    # Encoded first: Pillow writes into a real file by itself, and does not notice when the disk is full.
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))
