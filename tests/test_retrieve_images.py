"""Checking images, and telling near-duplicates from others."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from custom_diffusion.retrieval.checking import check_image
from custom_diffusion.retrieval.sources import Refused
from tests.retrieval_images import drawing, encoded


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_every_mode_becomes_a_jpeg(mode):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(drawing(1).convert("L"), dtype=np.uint16) * 257)
    else:
        image = drawing(1).convert(mode)
    data = encoded(image, "TIFF" if mode in ("CMYK", "LA") else "PNG")
    result = check_image(data, 256, 1024, 1e8)
    with Image.open(io.BytesIO(result.jpeg)) as opened:
        assert opened.format == "JPEG" and opened.size == (320, 300)
    shown = drawing(1).convert(mode if mode == "1" else "L").convert("L")
    with Image.open(io.BytesIO(result.jpeg)) as opened:
        off = np.asarray(opened.convert("L"), dtype=float) - np.asarray(shown, dtype=float)
    assert abs(off).mean() < 12


def test_large_images_become_smaller():
    result = check_image(encoded(drawing(1, (2400, 1800))), 256, 600, 1e8)
    with Image.open(io.BytesIO(result.jpeg)) as opened:
        assert opened.size == (800, 600)
    same = check_image(encoded(drawing(1, (2400, 1800))), 256, 0, 1e8)
    assert same.jpeg == encoded(drawing(1, (2400, 1800)))


def test_nothing_but_formats_of_the_web_is_opened():
    # Pillow would start Ghostscript for this one.
    with pytest.raises(Refused, match="no image"):
        check_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n", 256, 1024, 1e8)
