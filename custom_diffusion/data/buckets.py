"""Shapes of equal area for images that keep their proportions, and the order in which steps take them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from custom_diffusion.errors import UserError
from custom_diffusion.images import image_size
from custom_diffusion.text import some

logger = logging.getLogger("custom_diffusion")

Shape = tuple[int, int]  # height and width in pixels

MOST_ELONGATED = 2.5  # longer side over shorter: beyond it, models of square images repeat what they draw
# With fewer class images of a shape in a folder, the same few would be shown over and over: all are cropped to it then.
LEAST_CLASS_IMAGES = 20
MOST_NAMES = 5  # in a message


def find_buckets(resolution: int, multiple: int) -> list[Shape]:
    """The square of a side and the other shapes of its area, from the tallest to the widest.

    Sides are multiples; for each longer side, the shorter is the longest that does not make the area larger, so that
    no shape takes more memory than the square.

    Args:
        resolution: side of the square in pixels.
        multiple: of which all sides are multiples.

    Raises:
        UserError: where the resolution is no multiple itself.
    """
    if resolution % multiple:
        below = resolution // multiple * multiple
        raise UserError(
            f"--aspect_buckets needs a --resolution that is a multiple of {multiple}: "
            f"take {below or multiple} or {below + multiple}"
        )
    wide: list[Shape] = []
    width = resolution + multiple
    while (height := resolution**2 // width // multiple * multiple) and width <= MOST_ELONGATED * height:
        wide.append((height, width))
        width += multiple
    return [*((width, height) for height, width in reversed(wide)), (resolution, resolution), *wide]


def nearest_bucket(size: tuple[int, int], buckets: Sequence[Shape]) -> Shape:
    """The bucket whose proportions are nearest, by the ratio between them, to those of a width and height."""
    width, height = size
    return min(buckets, key=lambda shape: abs(math.log(shape[1] * height / (shape[0] * width))))


def largest_part(size: tuple[int, int], canvas: Shape) -> Shape:
    """Height and width of the largest part with the proportions of a canvas, of an image of this width and height."""
    (width, height), (rows, columns) = size, canvas
    if width * rows >= height * columns:
        return height, max(1, height * columns // rows)
    return max(1, width * rows // columns), width


def shapes_of(images: Iterable[tuple[Path, str]], buckets: Sequence[Shape]) -> dict[Path, Shape]:
    """The bucket of each image, by its path; nothing where there are no buckets."""
    return {path: nearest_bucket(image_size(path), buckets) for path, _ in images} if buckets else {}


def describe_buckets(images: Sequence[tuple[Path, str]], buckets: Sequence[Shape]) -> None:
    """Say how many instance images have which shape, and which of them are cropped because no shape is so long."""
    counts = Counter(shapes_of(images, buckets).values())
    found = ", ".join(f"{counts[shape]} of {shape[1]} x {shape[0]}" for shape in buckets if counts[shape])
    logger.info(f"instance images in buckets of width x height: {found}")
    height, width = buckets[-1]
    longer = [path for path, _ in images if max(ratio := _ratio(path), 1 / ratio) > width / height]
    if longer:
        logger.warning(f"cropped to {width}:{height}, the most elongated bucket: {some(longer, MOST_NAMES)}")


def _ratio(path: Path) -> float:
    width, height = image_size(path)
    return width / height


@dataclass(frozen=True)
class Place:
    """What an item of the stream shows.

    Attributes:
        shape: of the step that the item belongs to.
        instance: number of the instance image.
        shown: how often that image was shown before.
        class_image: number of the class image; None without class images.
    """

    shape: Shape
    instance: int
    shown: int
    class_image: int | None


class BucketOrder:
    """Which shape every step has, and which images its items show: all of a step have one shape.

    A round has as many steps as there are instance images; a bucket of k images has k of them, at places drawn at
    random. So every image is shown equally often, whatever its shape. Beside them stand the class images of the same
    bucket, or all of a folder that has fewer than :data:`LEAST_CLASS_IMAGES` of them.

    Args:
        instance_images, class_images: paths and prompts.
        shapes: the bucket of each image.
        seed: seed of the order.
        samples_per_step: how many items, of all processes, make a step.
    """

    def __init__(
        self,
        instance_images: Sequence[tuple[Path, str]],
        class_images: Sequence[tuple[Path, str]],
        shapes: Mapping[Path, Shape],
        seed: int,
        samples_per_step: int,
    ) -> None:
        self.seed = seed
        self.samples_per_step = samples_per_step
        self._of_step = [shapes[path] for path, _ in instance_images]
        self._instances: dict[Shape, list[int]] = {}
        for number, shape in enumerate(self._of_step):
            self._instances.setdefault(shape, []).append(number)
        self._class_images = {shape: _class_images_for(shape, class_images, shapes) for shape in self._instances}
        self._round: tuple[int, list[Shape]] | None = None

    def at(self, position: int) -> Place:
        """What the item at a position of the stream shows."""
        step, within = divmod(position, self.samples_per_step)
        round_number, step_of_round = divmod(step, len(self._of_step))
        shapes = self._shapes(round_number)
        shape = shapes[step_of_round]
        instances, class_images = self._instances[shape], self._class_images[shape]
        steps_before = round_number * len(instances) + shapes[:step_of_round].count(shape)
        place = steps_before * self.samples_per_step + within
        instance = self._shuffled(instances, place, shape, 7)
        class_image = self._shuffled(class_images, place, shape, 8) if class_images else None
        return Place(shape, instance, place // len(instances), class_image)

    def different_class_images(self) -> int:
        """How many pairs of a class image and a shape in which it is shown there are."""
        return sum(map(len, self._class_images.values()))

    def _shapes(self, round_number: int) -> list[Shape]:
        """The shapes of a round's steps."""
        if self._round is None or self._round[0] != round_number:
            order = np.random.default_rng((self.seed, round_number, 0, 9)).permutation(len(self._of_step))
            self._round = (round_number, [self._of_step[number] for number in order])
        return self._round[1]

    def _shuffled(self, numbers: Sequence[int], place: int, shape: Shape, purpose: int) -> int:
        """One of the numbers: all of them, in an order drawn at random, before one comes again."""
        turn, within = divmod(place, len(numbers))
        return numbers[np.random.default_rng((self.seed, turn, *shape, purpose)).permutation(len(numbers))[within]]


def _class_images_for(
    shape: Shape, class_images: Sequence[tuple[Path, str]], shapes: Mapping[Path, Shape]
) -> list[int]:
    """The numbers of the class images that are shown in a shape."""
    folders: dict[Path, list[int]] = {}
    for number, (path, _) in enumerate(class_images):
        folders.setdefault(path.parent, []).append(number)
    chosen: list[int] = []
    for numbers in folders.values():
        alike: Collection[int] = [number for number in numbers if shapes[class_images[number][0]] == shape]
        chosen += alike if len(alike) >= LEAST_CLASS_IMAGES else numbers
    return chosen
