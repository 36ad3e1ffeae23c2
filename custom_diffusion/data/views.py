"""How an image is shown: the views of it, their pixels, and which part of them counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import Tensor

from custom_diffusion.images import image_size, load_image

# To be raised when the pixels of any view change, here or in images.py: kept latents are then encoded again.
RENDERING_VERSION = 1


@dataclass(frozen=True)
class View:
    """How an image is shown: all that decides its pixels.

    Attributes:
        path: of the image.
        flip: whether it is mirrored.
        scale: side in pixels of an instance image's centre square; None for a class image, which is cropped to a
            square of its shorter side and fills the canvas.
        top, left: where it lies on the canvas, or is cropped, in parts of the room that there is: at least 0, below 1.
    """

    path: Path
    flip: bool
    scale: int | None
    top: float
    left: float


class Renderer:
    """Makes pixels and masks of views.

    Args:
        size: side of the canvas in pixels.
        mask_size: side of the latents, ``size`` divided by the VAE's factor.
        padding_mode: what surrounds an image that is smaller than the canvas: "constant", grey, which the mask leaves
            out; or "edge", its outermost pixels continued, which the mask takes in.
    """

    def __init__(self, size: int, mask_size: int, padding_mode: str = "constant") -> None:
        self.size = size
        self.mask_size = mask_size
        self.padding_mode = padding_mode
        self._last_image: tuple[Path, Image.Image] | None = None
        self._image_size = cache(image_size)

    def render(self, view: View) -> Tensor:
        """The pixels of a view, (3, size, size) in [-1, 1].

        An instance image's centre square is laid on a canvas, or cropped to the canvas. The example squashes the
        whole image into the square; here its proportions stay, as in the authors' older CompVis script.
        """
        image = self._load(view)
        if view.scale is None:
            # Cropped before it is resized: a panorama would otherwise become gigabytes first.
            width, height = image.size
            side = min(width, height)
            top, left = _offset(view.top, height - side), _offset(view.left, width - side)
            return _to_tensor(_resized(TF.crop(image, top, left, side, side), self.size))
        pixels = _to_tensor(_resized(TF.center_crop(image, [min(image.size)] * 2), view.scale))
        top, left = self._place(view, view.scale)
        room = self.size - view.scale
        if room <= 0:
            return pixels[:, top : top + self.size, left : left + self.size]
        return TF.pad(pixels, [left, top, room - left, room - top], padding_mode=self.padding_mode)

    def mask(self, view: View) -> Tensor:
        """Which latents count: (mask_size, mask_size), 1 inside the image and 0 outside."""
        if view.scale is None or view.scale >= self.size or self.padding_mode == "edge":
            return torch.ones(self.mask_size, self.mask_size)
        factor = self.size // self.mask_size
        mask = torch.zeros(self.mask_size, self.mask_size)
        top, left = self._place(view, view.scale)
        mask[slice(*_cells_inside(top, view.scale, factor)), slice(*_cells_inside(left, view.scale, factor))] = 1.0
        return mask

    def time_ids(self, views: Sequence[View]) -> Tensor:
        """What views beside each other show of their originals (Stable Diffusion XL's paper, section 2.2).

        One view shows its image at this size, cropped there: away from the square that is taken, or by a zoom. Several
        make an image of their own, of which all is seen.

        Returns:
            (6,): height and width of the original, top and left of the crop in the image as it was resized, and
            height and width of what is shown, all in pixels.
        """
        shown = [self.size, self.size * len(views)]
        if len(views) > 1:
            return torch.tensor([*shown, 0, 0, *shown], dtype=torch.float32)
        (view,) = views
        width, height = self._image_size(view.path)
        side = min(width, height)
        zoom = (0, 0)
        if view.scale is None:
            corner, factor = (_offset(view.top, height - side), _offset(view.left, width - side)), self.size / side
        else:
            corner, factor = ((height - side) // 2, (width - side) // 2), view.scale / side
            if view.scale > self.size:
                zoom = self._place(view, view.scale)
        crop = [int(start * factor) + offset for start, offset in zip(corner, zoom, strict=True)]
        return torch.tensor([height, width, *crop, *shown], dtype=torch.float32)

    def _load(self, view: View) -> Image.Image:
        # Where views are encoded, those of an image follow each other: it is decoded once then.
        if self._last_image is None or self._last_image[0] != view.path:
            self._last_image = (view.path, load_image(view.path))
        image = self._last_image[1]
        return ImageOps.mirror(image) if view.flip else image

    def _place(self, view: View, scale: int) -> tuple[int, int]:
        room = abs(scale - self.size)
        return _offset(view.top, room), _offset(view.left, room)


def _resized(square: Image.Image, side: int) -> Image.Image:
    return square.resize((side, side), Image.Resampling.BILINEAR)


def _offset(part: float, room: int) -> int:
    return int(part * (room + 1))


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) in [-1, 1]."""
    return TF.pil_to_tensor(image).float() / 127.5 - 1.0


def _cells_inside(start: int, length: int, factor: int) -> tuple[int, int]:
    """First and last + 1 of the latents that see only image, in one dimension.

    One latent on either side is left out as in the example, because it also sees the canvas. Where an image is so
    small that nothing would remain, its middle latent stays: an empty mask would make the loss 0 / 0.
    """
    first, end = start // factor + 1, (start + length) // factor - 1
    if first >= end:
        first = (start + length // 2) // factor
        end = first + 1
    return first, end
