"""How an image is shown: the views of it, their pixels, and which part of them counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import Tensor

from custom_diffusion.data.buckets import Shape, largest_part
from custom_diffusion.data.masks import load_mask
from custom_diffusion.images import image_size, load_image

# To be raised when the pixels of any view change, here or in images.py: kept latents are then encoded again.
RENDERING_VERSION = 1


@dataclass(frozen=True)
class View:
    """How an image is shown: all that decides its pixels.

    Attributes:
        path: of the image.
        flip: whether it is mirrored.
        scale: side in pixels of an instance image's centre square; None for a class image, of which the largest part
            in the proportions of the canvas fills the canvas.
        top, left: where it lies on the canvas, or is cropped, in parts of the room that there is: at least 0, below 1.
        canvas: height and width in pixels of another canvas than the square; the image is then cropped to its
            proportions, and ``scale`` is relative to the side of the square.
    """

    path: Path
    flip: bool
    scale: int | None
    top: float
    left: float
    canvas: Shape | None = None


class Renderer:
    """Makes pixels and masks of views.

    Args:
        size: side of the canvas in pixels.
        mask_size: side of the latents, ``size`` divided by the VAE's factor.
        padding_mode: what surrounds an image that is smaller than the canvas: "constant", grey, which the mask leaves
            out; or "edge", its outermost pixels continued, which the mask takes in.
        object_masks: of images, as :func:`masks.find_masks` gives them. One whose own alpha channel is its mask shows
            the colours that it hides; others are laid on white.
    """

    def __init__(
        self,
        size: int,
        mask_size: int,
        padding_mode: str = "constant",
        object_masks: Mapping[Path, Path] | None = None,
    ) -> None:
        self.size = size
        self.mask_size = mask_size
        self.padding_mode = padding_mode
        self.object_masks = object_masks or {}
        self._last_image: tuple[Path, Image.Image] | None = None
        self._last_mask: tuple[Path, Image.Image] | None = None
        self._sizes: dict[Path, tuple[int, int]] = {}

    def render(self, view: View) -> Tensor:
        """The pixels of a view, (3, size, size) or those of its own canvas, in [-1, 1].

        An instance image's centre, in the proportions of the canvas, is laid on the canvas or cropped to it. The
        example squashes the whole image into the square; here its proportions stay, as in the authors' older CompVis
        script.
        """
        return self._shown(self._load(view), view, _to_tensor)

    def _shown(self, image: Image.Image, view: View, to_tensor: Callable[[Image.Image], Tensor]) -> Tensor:
        """What a view shows of an image of any mode; around it are zeros, or its edges."""
        canvas = self.canvas(view)
        if view.scale is None:
            # Cropped before it is resized: a panorama would otherwise become gigabytes first.
            width, height = image.size
            rows, columns = largest_part(image.size, canvas)
            top, left = _offset(view.top, height - rows), _offset(view.left, width - columns)
            return to_tensor(_resized(TF.crop(image, top, left, rows, columns), canvas))
        scaled = self._scaled(view, view.scale)
        pixels = to_tensor(_resized(TF.center_crop(image, list(largest_part(image.size, canvas))), scaled))
        top, left = self._place(view, view.scale)
        if view.scale >= self.size:
            return pixels[:, top : top + canvas[0], left : left + canvas[1]]
        below, right = canvas[0] - scaled[0] - top, canvas[1] - scaled[1] - left
        return TF.pad(pixels, [left, top, right, below], padding_mode=self.padding_mode)

    def mask(self, view: View) -> Tensor:
        """Which latents count: 1 inside the image and 0 outside, in the shape of :meth:`latent_shape`."""
        if view.scale is None or view.scale >= self.size or self.padding_mode == "edge":
            return torch.ones(self.latent_shape(view))
        factor = self.size // self.mask_size
        mask = torch.zeros(self.latent_shape(view))
        (top, left), (height, width) = self._place(view, view.scale), self._scaled(view, view.scale)
        mask[slice(*_cells_inside(top, height, factor)), slice(*_cells_inside(left, width, factor))] = 1.0
        return mask

    def object_mask(self, view: View) -> Tensor:
        """How much of each latent is inside the mask of the image, from 0 to 1, in the shape of :meth:`latent_shape`.

        The mask is flipped, scaled, placed and cropped as the image is, and averaged over the pixels of each latent.
        Around the image it is 0, or its edges continue where the image's do. All ones where the image has no mask.
        """
        if view.path not in self.object_masks:
            return torch.ones(self.latent_shape(view))
        if self._last_mask is None or self._last_mask[0] != view.path:
            self._last_mask = (view.path, load_mask(view.path, self.object_masks[view.path]))
        mask = ImageOps.mirror(self._last_mask[1]) if view.flip else self._last_mask[1]
        return F.adaptive_avg_pool2d(self._shown(mask, view, _to_mask), self.latent_shape(view))[0]

    def hides_nothing(self, view: View) -> bool:
        """Whether the image is shown with the colours that its own alpha channel hides."""
        return self.object_masks.get(view.path) == view.path

    def canvas(self, view: View) -> Shape:
        """Height and width in pixels of what a view is laid on."""
        return view.canvas or (self.size, self.size)

    def latent_shape(self, view: View) -> Shape:
        """Height and width of a view's latents, (mask_size, mask_size) of a square."""
        if view.canvas is None:
            return self.mask_size, self.mask_size
        factor = self.size // self.mask_size
        return view.canvas[0] // factor, view.canvas[1] // factor

    def time_ids(self, views: Sequence[View]) -> Tensor:
        """What views beside each other show of their originals (Stable Diffusion XL's paper, section 2.2).

        One view shows its image at this size, cropped there: away from the part that is taken, or by a zoom. Several
        make an image of their own, of which all is seen.

        Returns:
            (6,): height and width of the original, top and left of the crop in the image as it was resized, and
            height and width of what is shown, all in pixels.
        """
        rows, columns = self.canvas(views[0])
        shown = [rows, columns * len(views)]
        if len(views) > 1:
            return torch.tensor([*shown, 0, 0, *shown], dtype=torch.float32)
        (view,) = views
        # A dictionary, which other processes can be sent: not functools.cache.
        if view.path not in self._sizes:
            self._sizes[view.path] = image_size(view.path)
        width, height = self._sizes[view.path]
        taken = largest_part((width, height), (rows, columns))
        room = (height - taken[0], width - taken[1])
        zoom = (0, 0)
        if view.scale is None:
            corner, scaled = (_offset(view.top, room[0]), _offset(view.left, room[1])), (rows, columns)
        else:
            corner, scaled = (room[0] // 2, room[1] // 2), self._scaled(view, view.scale)
            if view.scale > self.size:
                zoom = self._place(view, view.scale)
        crop = [
            int(start * (after / before)) + offset
            for start, after, before, offset in zip(corner, scaled, taken, zoom, strict=True)
        ]
        return torch.tensor([height, width, *crop, *shown], dtype=torch.float32)

    def _load(self, view: View) -> Image.Image:
        # Where views are encoded, those of an image follow each other: it is decoded once then.
        if self._last_image is None or self._last_image[0] != view.path:
            background = None if self.hides_nothing(view) else "white"
            self._last_image = (view.path, load_image(view.path, background=background))
        image = self._last_image[1]
        return ImageOps.mirror(image) if view.flip else image

    def _scaled(self, view: View, scale: int) -> Shape:
        """Height and width in pixels that the part taken of an instance image has."""
        height, width = self.canvas(view)
        return max(1, round(height * scale / self.size)), max(1, round(width * scale / self.size))

    def _place(self, view: View, scale: int) -> Shape:
        (rows, columns), (height, width) = self.canvas(view), self._scaled(view, scale)
        return _offset(view.top, abs(rows - height)), _offset(view.left, abs(columns - width))


def _resized(image: Image.Image, shape: Shape) -> Image.Image:
    return image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)


def _offset(part: float, room: int) -> int:
    return int(part * (room + 1))


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) in [-1, 1]."""
    return TF.pil_to_tensor(image).float() / 127.5 - 1.0


def _to_mask(image: Image.Image) -> Tensor:
    """(1, height, width) in [0, 1]."""
    return TF.pil_to_tensor(image).float() / 255


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
