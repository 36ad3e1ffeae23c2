"""The resize augmentation of the paper's appendix: instance images smaller or larger, with words that say so."""

from __future__ import annotations

import numpy as np

from custom_diffusion.concept.prompts import LARGE_WORDS, SMALL_WORDS


def draw_scale(size: int, random: np.random.Generator) -> tuple[int, str]:
    """How large an image is shown.

    Args:
        size: side of the canvas in pixels.

    Returns:
        Side of the image in pixels, and the words that say so before its prompt, if any.
    """
    if random.random() < 0.66:
        scale = int(random.integers(size // 3, size + 1))
    else:
        scale = int(random.integers(int(1.2 * size), max(int(1.4 * size), int(1.2 * size) + 1)))
    if scale < 0.6 * size:
        return scale, str(random.choice(SMALL_WORDS))
    if scale > size:
        return scale, str(random.choice(LARGE_WORDS))
    return scale, ""
