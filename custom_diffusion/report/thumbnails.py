"""Small images inside a page, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from custom_diffusion.images import contained, load_image

# Longest side in pixels and JPEG quality; the first that is small enough is taken.
SIZES = ((192, 82), (128, 70), (96, 60))
LARGEST = 14_000  # bytes of one image in the page


class Thumbnails:
    """Makes images that stand in the page itself.

    Args:
        budget: how many bytes all of them together may take in the page.
    """

    def __init__(self, budget: int) -> None:
        self.left = budget

    def element(self, path: Path, text: str) -> str:
        """An ``img`` element; nothing for a file that cannot be read, or when the budget is used up.

        Args:
            text: in place of the image, escaped.
        """
        try:
            image = load_image(path, least_side=SIZES[0][0])
        except (OSError, Image.DecompressionBombError):
            return ""
        for side, quality in SIZES:
            small = contained(image, side)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality)
            content = base64.b64encode(buffer.getvalue()).decode()
            if len(content) <= LARGEST:
                break
        if len(content) > self.left:
            return ""
        self.left -= len(content)
        size = f'width="{small.width}" height="{small.height}"'
        return f'<img src="data:image/jpeg;base64,{content}" alt="{text}" title="{text}" {size}>'


def evenly(items: list, most: int) -> list:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    if most < 2:
        return items[-most:] if most else []
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]
