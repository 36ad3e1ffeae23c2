"""The resize augmentation of the paper's appendix: instance images smaller or larger, with words that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from custom_diffusion.concept.prompts import LARGE_WORDS, SMALL_WORDS

SMALLER_PROBABILITY = 0.66  # of an image that is at most as large as the canvas


@dataclass(frozen=True)
class Augmentation:
    """How an instance image is shown.

    Attributes:
        flip: whether it is mirrored.
        scale: its side in pixels.
        words: what its prompt begins with, if anything.
        top, left: see :class:`views.View`.
    """

    flip: bool
    scale: int
    words: str
    top: float
    left: float


def draw_augmentation(size: int, flip_probability: float, random: np.random.Generator) -> Augmentation:
    """Draw one at random.

    Args:
        size: side of the canvas in pixels.
    """
    flip = random.random() < flip_probability
    low, end = _scales(size, random.random() < SMALLER_PROBABILITY)
    scale = int(random.integers(low, end))
    choices = _choices_of_words(scale, size)
    words = str(random.choice(choices)) if len(choices) > 1 else ""
    # Where there is no room, there is but one view of the image.
    top, left = (0.0, 0.0) if scale == size else map(float, random.random(2))
    return Augmentation(flip, scale, words, top, left)


def augmentation_pool(
    count: int, size: int, flip_probability: float, random: np.random.Generator
) -> list[Augmentation]:
    """Several augmentations that together are what :func:`draw_augmentation` draws on average.

    Each is distributed as one drawn alone. But of every decision, each of ``count`` equally probable parts of all
    outcomes is in exactly one of them (a Latin hypercube, McKay et al. 1979). Where 20 are drawn independently, small
    views are from 24 to 47 % of an image's instead of 26 %.
    """
    parts = np.stack([random.permutation(count) for _ in range(5)], axis=1)
    return [_augmentation_at(size, flip_probability, *row) for row in (parts + random.random(parts.shape)) / count]


def _augmentation_at(
    size: int, flip_probability: float, flip: float, scale: float, word: float, top: float, left: float
) -> Augmentation:
    """Turn numbers that are evenly distributed from 0 to 1 into an augmentation."""
    is_smaller = scale < SMALLER_PROBABILITY
    low, end = _scales(size, is_smaller)
    within = scale / SMALLER_PROBABILITY if is_smaller else (scale - SMALLER_PROBABILITY) / (1 - SMALLER_PROBABILITY)
    side = min(low + int(within * (end - low)), end - 1)  # rounding may reach the end
    choices = _choices_of_words(side, size)
    place = (0.0, 0.0) if side == size else (float(top), float(left))
    return Augmentation(bool(flip < flip_probability), side, choices[int(word * len(choices))], *place)


def _scales(size: int, is_smaller: bool) -> tuple[int, int]:
    """The smallest side in pixels, and the largest + 1."""
    if is_smaller:
        return size // 3, size + 1
    return int(1.2 * size), max(int(1.4 * size), int(1.2 * size) + 1)


def _choices_of_words(scale: int, size: int) -> Sequence[str]:
    if scale < 0.6 * size:
        return SMALL_WORDS
    return LARGE_WORDS if scale > size else ("",)
