"""Telling near-duplicates from other images.

A fingerprint is a small version of an image. Two images are compared by laying one small version over the other: the
crop that fits best is found by the method of Lucas and Kanade ("An Iterative Image Registration Technique", 1981), and
what still differs then is set against what saving again, resizing and cropping change.
"""

from __future__ import annotations

import base64
import functools
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float32]

SIDE = 64
COARSE_SIDE = 16

# Errors of colour weigh less than those of brightness, as JPEG keeps less of it.
_COLOUR = 0.5

# Saving again changes brightness by about this much (of 255), and laying over is exact to this part of a pixel.
_NOISE = 1.0
_SHIFT = 0.2

# What differs by this many times as much is another image. Saved again, resized and cropped by up to 3 % on each side,
# photographs and drawings came to at most 4.1; a circle and a heptagon of the same size came to 8.
_DIFFERENT = 5.0

# Colours may be off by this much on average, and contrast by this factor.
_OFFSET = 1.2
_CONTRAST = (0.9, 1.1)

# How much of a side may be cropped away, and what counts as nothing.
_CROP = 0.035
_NO_CROP = 0.005

# The coarse comparison leaves those out that have less in common than this: they cannot be near-duplicates.
_COARSE_DIFFERENT = 0.15

# Old records have 256 bits in place of a small version; they differ in some 20 of them where the images are the same.
_OLD_BITS = 32
_OLD_PART = 0.25


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of an image to find its near-duplicates.

    Attributes:
        bits: difference hash of 256 bits, which older versions of this program compare.
        small: the image in 64 x 64 pixels, as a JPEG.
    """

    bits: int
    small: bytes = b""

    @classmethod
    def of(cls, image: Image.Image) -> Fingerprint:
        """The fingerprint of an image."""
        file = io.BytesIO()
        small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
        small.save(file, "JPEG", quality=92, optimize=True)
        return cls(difference_hash(image), file.getvalue())

    @classmethod
    def read(cls, bits: str, small: str) -> Fingerprint:
        """A fingerprint from what :meth:`written` gives.

        Raises:
            ValueError: for anything else.
        """
        data = base64.b64decode(small, validate=True)
        if data and not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
            raise ValueError("no JPEG")
        return cls(int(bits, 16), data)

    def written(self) -> tuple[str, str]:
        """Bits and small version as text."""
        return f"{self.bits:064x}", base64.b64encode(self.small).decode()


def difference_hash(image: Image.Image) -> int:
    """Where brightness rises from left to right in a 17 x 16 version of the image, in 256 bits."""
    small = image.resize((8 * 17, 8 * 16), Image.Resampling.BOX, reducing_gap=2.0)
    # As floats: rounded to whole greys, even areas would give bits at random.
    pixels = np.asarray(small.convert("F").resize((17, 16), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(pixels[:, 1:] > pixels[:, :-1]).tobytes(), "big")


class SeenImages:
    """Fingerprints of images, and whether a further image is a near-duplicate of one of them.

    Args:
        tolerance: how different near-duplicates may be, where 1 is what saving again, resizing and cropping change; 0
            finds exact copies only.
    """

    def __init__(self, tolerance: float = 1.0) -> None:
        self.tolerance = tolerance
        self._new: list[Fingerprint] = []
        self._old: list[Fingerprint] = []
        self._coarse = np.empty((0, COARSE_SIDE**2 * 3), np.float32)

    def add(self, image: Fingerprint) -> None:
        """Remember an image; one of an old record has no small version."""
        if not image.small:
            self._old.append(image)
            return
        if len(self._new) == len(self._coarse):  # room for as many again
            self._coarse = np.vstack(
                [self._coarse, np.zeros((len(self._coarse) + 64, self._coarse.shape[1]), np.float32)]
            )
        self._coarse[len(self._new)] = _coarse(image.small).reshape(-1)
        self._new.append(image)

    def has_near_duplicate(self, image: Fingerprint) -> bool:
        """Whether an image like this one has been seen."""
        if self.tolerance == 0:
            is_copy = any(seen.small == image.small for seen in self._new)
            return is_copy or any(seen.bits == image.bits for seen in self._old)
        if any(_similar_bits(seen.bits, image.bits, self.tolerance) for seen in self._old):
            return True
        alike = _coarse_differences(_coarse(image.small), self._coarse[: len(self._new)])
        limit = _COARSE_DIFFERENT * max(1.0, self.tolerance)
        # The most similar first, as it is the likeliest to end the search.
        order = [row for row in np.argsort(alike) if alike[row] <= limit]
        return any(difference(image, self._new[row]) <= self.tolerance for row in order)


def difference(one: Fingerprint, other: Fingerprint) -> float:
    """How different two images are, where up to 1 is what saving again, resizing and slight cropping change.

    Args:
        one, other: their fingerprints, with small versions.
    """
    first, second = _layers(one.small), _layers(other.small)
    crop = _best_crop(first[0], second[0], np.zeros(4, np.float32), -_CROP)
    if crop.sum() < 0:  # the first is the one that was cropped
        first, second, crop = second, first, -crop
    for layer, cropped in zip(first, second, strict=True):
        crop = _best_crop(layer, cropped, crop, -_NO_CROP)
    moved, target, _, _ = _laid_over(first[-1], second[-1], crop)
    return _remaining(moved, target)


def _similar_bits(one: int, other: int, tolerance: float) -> bool:
    different, either = (one ^ other).bit_count(), (one | other).bit_count()
    # Drawings on white have few bits, so that any two of them differ in few.
    return different <= tolerance * min(_OLD_BITS, _OLD_PART * either)


# --- laying one image over another -----------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def _layers(small: bytes) -> tuple[Pixels, ...]:
    """A small version from blurred to sharp, each 64 x 64 x 3: brightness and two of colour."""
    with Image.open(io.BytesIO(small)) as opened:
        pixels = np.asarray(opened.convert("YCbCr"), dtype=np.float32) * np.array([1, _COLOUR, _COLOUR], np.float32)
    return tuple(_blurred(pixels, width) for width in (SIDE / 20, SIDE / 40, 0.8))


def _coarse(small: bytes) -> Pixels:
    """A small version in 16 x 16 x 3."""
    step = SIDE // COARSE_SIDE
    return _layers(small)[0].reshape(COARSE_SIDE, step, COARSE_SIDE, step, 3).mean((1, 3))


def _coarse_differences(image: Pixels, others: Pixels) -> NDArray[np.float32]:
    """How much of each of the others cannot be explained by the image, slightly cropped or enlarged.

    Args:
        image: 16 x 16 x 3.
        others: one flat row for each.

    Returns:
        For each row a part from 0 to 1.
    """
    basis, _ = np.linalg.qr(_explaining(image))
    centred = others.reshape(len(others), COARSE_SIDE**2, 3)
    centred = (centred - centred.mean(1, keepdims=True)).reshape(others.shape)
    energy = (centred**2).sum(1)
    rest = energy - ((centred @ basis) ** 2).sum(1)
    return rest / (energy + 0.1 * others.shape[1])


def _explaining(image: Pixels, rows: Any = None, columns: Any = None) -> Pixels:
    """What a slightly cropped image is made of, to first order: one column for each part.

    Args:
        image: height x width x 3.
        rows, columns: where its pixels are, from -1 to 1 over the whole; evenly if None.

    Returns:
        The image; what cropping left, right, top and bottom by a pixel adds; and the three even colours.
    """
    height, width, _ = image.shape
    rows = np.linspace(-1, 1, height, dtype=np.float32) if rows is None else rows
    columns = np.linspace(-1, 1, width, dtype=np.float32) if columns is None else columns
    rows, columns = rows[:, None, None] / 2, columns[None, :, None] / 2
    across, down = _slopes(image)
    parts = [image, across * (0.5 - columns), -across * (0.5 + columns), down * (0.5 - rows), -down * (0.5 + rows)]
    for channel in range(3):
        even = np.zeros_like(image)
        even[..., channel] = 1
        parts.append(even)
    return np.stack(parts, -1).reshape(-1, len(parts))


def _slopes(image: Pixels) -> tuple[Pixels, Pixels]:
    return np.gradient(image, axis=1), np.gradient(image, axis=0)


def _best_crop(whole: Pixels, cropped: Pixels, crop: Any, least: float) -> Any:
    """The crop of the first that is most like the second, found in two steps from one that is near it.

    Args:
        whole, cropped: two images.
        crop: where to begin: pixels at the left, right, top and bottom.
        least: the least that may be cropped, as a part of the side; below 0 the second may show more than the first.
    """
    for _ in range(2):
        moved, target, rows, columns = _laid_over(whole, cropped, crop)
        explaining = _explaining(moved, rows, columns)
        square = explaining.T @ explaining
        square[np.diag_indices(len(square))] += 1e-6 * np.trace(square) + 1e-6
        weights = np.linalg.solve(square, explaining.T @ target.reshape(-1))
        crop = np.clip(crop + weights[1:5] / max(weights[0], 0.3), least * SIDE, _CROP * SIDE)
    return crop


def _laid_over(first: Pixels, second: Pixels, crop: Any) -> tuple[Pixels, Pixels, Any, Any]:
    """The first cropped, and the second, where both have pixels and not quite at their edges; and where that is."""
    even = np.linspace(-1, 1, SIDE, dtype=np.float32)
    left, right, top, bottom = crop
    columns = (even + 1) * (SIDE - 1) / 2 + left * (1 - even) / 2 - right * (1 + even) / 2
    rows = (even + 1) * (SIDE - 1) / 2 + top * (1 - even) / 2 - bottom * (1 + even) / 2
    moved = np.tensordot(_between(rows), first, 1)
    moved = np.tensordot(_between(columns), moved, (1, 1)).transpose(1, 0, 2)
    inside = [(places >= 0) & (places <= SIDE - 1) & (abs(even) < 1) for places in (rows, columns)]
    return moved[inside[0]][:, inside[1]], second[inside[0]][:, inside[1]], even[inside[0]], even[inside[1]]


def _between(places: Any) -> Pixels:
    """A matrix that takes pixels at any places of a row, by cubic interpolation."""
    whole = np.floor(places).astype(int)
    part = places - whole
    weights = (
        (-part + 2 * part**2 - part**3) / 2,
        (2 - 5 * part**2 + 3 * part**3) / 2,
        (part + 4 * part**2 - 3 * part**3) / 2,
        (-(part**2) + part**3) / 2,
    )
    matrix = np.zeros((len(places), SIDE), np.float32)
    for offset, weight in enumerate(weights, -1):
        matrix[np.arange(len(places)), np.clip(whole + offset, 0, SIDE - 1)] += weight
    return matrix


def _remaining(moved: Pixels, target: Pixels) -> float:
    """How different two images are that lie over each other; see :func:`difference`."""
    offset = target.mean((0, 1)) - moved.mean((0, 1))
    moved, target = moved - moved.mean((0, 1)), target - target.mean((0, 1))
    contrast = np.clip((moved * target).sum() / max((moved**2).sum(), 1e-6), *_CONTRAST)
    left = target - contrast * moved
    across, down = _slopes(moved)
    squares = np.stack([(left**2).sum(-1), (across**2 + down**2).sum(-1)], -1)
    left_squared, slope_squared = np.moveaxis(_blurred(squares, 1.0), -1, 0)
    largest = float(np.sqrt((left_squared / (_NOISE**2 + _SHIFT**2 * slope_squared)).max()))
    return max(largest / _DIFFERENT, float(abs(offset).max()) / _OFFSET)


def _blurred(pixels: Pixels, width: float) -> Pixels:
    """Pixels under a Gaussian of this standard deviation, the edges repeated."""
    reach = int(np.ceil(3 * width))
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * width**2)).astype(np.float32)
    weights /= weights.sum()
    for axis in (0, 1):
        padding = [(reach, reach) if one == axis else (0, 0) for one in range(pixels.ndim)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(pixels, padding, "edge"), 2 * reach + 1, axis)
        pixels = windows @ weights
    return pixels
