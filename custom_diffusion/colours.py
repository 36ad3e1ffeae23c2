"""Colours as a viewer shows them: images with a colour profile of their own become sRGB."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

# Of 255: what differs less from sRGB is sRGB, written down by another program.
TOLERANCE = 2
# The mode in which Pillow hands littleCMS the colours of a profile.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image's colours to sRGB, as littleCMS does with the perceptual intent.

    Args:
        image: in any mode of 8 bits.
        profile: its ICC profile. One that is broken, for colours of another kind, or sRGB itself changes nothing.

    Returns:
        The same image where nothing is to be done, else one in the mode RGB or, where it has transparency, RGBA.
    """
    transform = _transform(profile) if profile else None
    if transform is None:
        return image
    colours = _colours_of(image, transform.input_mode)
    if colours is None:
        return image
    converted = transform.apply(colours)
    if image.has_transparency_data:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def _colours_of(image: Image.Image, mode: str) -> Image.Image | None:
    """The image without transparency in a profile's mode; None where the profile is of another kind."""
    is_grey = image.mode in ("1", "L", "LA", "La")
    if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not is_grey):
        return None
    if image.has_transparency_data and not is_grey:
        image = image.convert("RGBA")
    return image.convert(mode)


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where there is nothing to convert or nothing to convert with."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        probe = _probe(mode)
        seen = np.asarray(transform.apply(probe), dtype=int)
    except Exception:  # littleCMS and Pillow raise their own errors, ImportError where Pillow was built without it
        return None
    black, white = seen[0, 0].mean(), seen[-1, -1].mean()
    # A profile whose white is no lighter than its black is damaged.
    if (black - white if mode == "CMYK" else white - black) < 128:
        return None
    is_srgb = mode != "CMYK" and np.abs(seen - np.asarray(probe.convert("RGB"), dtype=int)).max() <= TOLERANCE
    return None if is_srgb else transform


def _probe(mode: str) -> Image.Image:
    """Colours from all over the space, from all channels 0 to all 255."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(17 * 17, 17, 3)
    if mode == "CMYK":
        colours = np.concatenate([colours, colours[..., :1]], axis=-1)
    return Image.fromarray(colours, mode) if mode == "CMYK" else Image.fromarray(colours)
