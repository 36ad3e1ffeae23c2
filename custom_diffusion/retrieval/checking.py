"""Checking a downloaded image before it counts."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from custom_diffusion.images import load_image, open_damaged_image
from custom_diffusion.retrieval.fingerprints import Fingerprint
from custom_diffusion.retrieval.sources import Refused

# What the web serves as images. Pillow reads much more, some of it by running other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")


@dataclass(frozen=True)
class CheckedImage:
    """An image that was decoded whole.

    Attributes:
        jpeg: the image as it is kept.
        fingerprint: what near-duplicates are found by.
    """

    jpeg: bytes
    fingerprint: Fingerprint


# Each decoded image takes memory: as many at a time as there are cores is as fast as all at once.
_decoding = threading.Semaphore(os.cpu_count() or 1)


def check_image(data: bytes, min_size: int, max_size: int, max_pixels: float) -> CheckedImage:
    """Decode an image whole, and make a JPEG of at most ``max_size`` pixels on the shorter side of it.

    A JPEG that is small enough stays as it is, byte for byte.

    Args:
        data: the encoded image.
        min_size: pixels that the shorter side must have.
        max_size: pixels that the shorter side is reduced to; 0 for no reduction.
        max_pixels: pixels that the image may have in all.

    Raises:
        Refused: with the reason.
    """
    try:
        with open_damaged_image(data, _known_formats()) as opened:
            width, height = opened.size
            is_jpeg = opened.format in ("JPEG", "MPO")
        if width * height > max_pixels:
            raise Refused("too many pixels")
        if min(width, height) < min_size:
            raise Refused("too small")
        with _decoding:
            image = load_image(io.BytesIO(data))
            reduction = max_size / min(width, height) if max_size else 1.0
            if reduction < 1:
                image = image.resize([max(1, round(side * reduction)) for side in image.size], Image.Resampling.LANCZOS)
            return CheckedImage(data if is_jpeg and reduction >= 1 else _as_jpeg(image), Fingerprint.of(image))
    except Refused:
        raise
    except UnidentifiedImageError as error:
        raise Refused("no image") from error
    except Image.DecompressionBombError as error:
        raise Refused("too many pixels") from error
    except Exception as error:  # broken files make Pillow's decoders raise nearly anything
        raise Refused("broken image") from error


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _as_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()
