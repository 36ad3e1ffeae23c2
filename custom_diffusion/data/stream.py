"""The stream of training samples: which images an item shows, how, and what its prompt says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from custom_diffusion.concept.prompts import side_by_side
from custom_diffusion.data.augmentation import Augmentation, augmentation_pool, draw_augmentation
from custom_diffusion.data.buckets import BucketOrder, Shape
from custom_diffusion.data.views import View


@dataclass(frozen=True)
class Sample:
    """What an item of the stream is made of.

    Attributes:
        instance: one view, or two that are beside each other, the left one first.
        instance_prompt: what they show.
        class_image: alike; empty without prior preservation.
        class_prompt: alike.
        noise_seed: from which noise and timestep are drawn.
    """

    instance: tuple[View, ...]
    instance_prompt: str
    class_image: tuple[View, ...]
    class_prompt: str
    noise_seed: int


class SampleStream:
    """Decides what every training sample shows; no image is read for it.

    The stream is endless: item p is sample ``p % len(self)`` of epoch ``p // len(self)``. What it looks like depends
    on seed, epoch and sample alone, not on workers, processes or restarts, so that a resumed run and a run on several
    devices see what a single uninterrupted one sees.

    Args:
        instance_images, class_images, size, center_crop, hflip, aug, seed, variants, cutmix_probability,
            cutmix_images, samples_per_step: see :class:`dataset.CustomDiffusionDataset`.
        shapes: the bucket of each image, so that every step has one shape (see :class:`buckets.BucketOrder`); if
            there are none, all are shown as squares.
    """

    def __init__(
        self,
        instance_images: Sequence[tuple[Path, str]],
        class_images: Sequence[tuple[Path, str]],
        size: int,
        center_crop: bool,
        hflip: bool,
        aug: bool,
        seed: int,
        variants: int | None,
        cutmix_probability: float,
        samples_per_step: int,
        shapes: Mapping[Path, Shape] | None = None,
        cutmix_images: Sequence[tuple[Path, str]] = (),
    ) -> None:
        self.instance_images = instance_images
        self.class_images = class_images
        self.size = size
        self.center_crop = center_crop
        self.flip_probability = 0.5 if hflip else 0.0
        self.aug = aug
        self.seed = seed
        self.variants = variants
        self.cutmix_probability = cutmix_probability
        self.cutmix_images = cutmix_images
        self.samples_per_step = samples_per_step
        self._buckets = BucketOrder(instance_images, class_images, shapes, seed, samples_per_step) if shapes else None
        self._instances_elsewhere = numbers_elsewhere(instance_images)
        self._class_images_elsewhere = numbers_elsewhere(class_images)
        self._order_of: tuple[int, np.ndarray] | None = None
        self._pools: dict[int, list[Augmentation]] = {}

    def __len__(self) -> int:
        return max(len(self.instance_images), len(self.class_images))

    def positions(self, steps: range) -> range:
        """The items of the stream that optimizer steps take."""
        return range(steps.start * self.samples_per_step, steps.stop * self.samples_per_step)

    def draw(self, position: int) -> Sample:
        """Decide what an item is made of."""
        if self._buckets is not None:
            return self._draw_in_bucket(self._buckets, position)
        epoch, sample = divmod(position, len(self))
        index = int(self._order(epoch)[sample])
        random = np.random.default_rng((self.seed, epoch, index))
        noise_seed = int(random.integers(2**63))
        if self._shows_pair(position):
            return self._draw_pair(index, random, noise_seed)
        # The class image first: it is then the same with and without variants, where it has but one crop.
        class_image: tuple[View, ...] = ()
        class_prompt = ""
        if self.class_images:
            number = index % len(self.class_images)
            class_image, class_prompt = (self._draw_class_image(number, random),), self.class_images[number][1]
        count = len(self.instance_images)
        number = index % count
        # How often an epoch shows the image, and so how often it was shown before.
        times = len(range(number, len(self), count))
        instance, prompt = self._draw_instance(number, epoch * times + index // count, random)
        return Sample((instance,), prompt, class_image, class_prompt, noise_seed)

    def drawn(self, positions: Iterable[int]) -> tuple[list[View], dict[str, list[str]]]:
        """What these items show.

        Returns:
            Their different views, and their different ``"instance"`` and ``"class"`` prompts.
        """
        views: dict[View, None] = {}
        prompts: dict[str, dict[str, None]] = {"instance": {}, "class": {}}
        most = self._most_views()
        for position in positions:
            sample = self.draw(position)
            views |= dict.fromkeys((*sample.instance, *sample.class_image))
            prompts["instance"].setdefault(sample.instance_prompt)
            if sample.class_image:
                prompts["class"].setdefault(sample.class_prompt)
            # A long run need not be walked through: after a while it shows nothing new.
            if len(views) == most:
                break
        return list(views), {kind: list(found) for kind, found in prompts.items()}

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self)))
        return self._order_of[1]

    def _shows_pair(self, position: int) -> bool:
        if not self.cutmix_probability:
            return False
        # Not from the sample's own numbers: the samples of a step decide alike, and without pairs nothing changes.
        step = position // self.samples_per_step
        return bool(np.random.default_rng((self.seed, step, 3)).random() < self.cutmix_probability)

    def _draw_in_bucket(self, order: BucketOrder, position: int) -> Sample:
        place = order.at(position)
        random = np.random.default_rng((self.seed, position, 0, 6))
        noise_seed = int(random.integers(2**63))
        # A view of the square is the same view that there is without buckets.
        canvas = None if place.shape == (self.size, self.size) else place.shape
        class_image: tuple[View, ...] = ()
        class_prompt = ""
        if place.class_image is not None:
            class_image = (replace(self._draw_class_image(place.class_image, random), canvas=canvas),)
            class_prompt = self.class_images[place.class_image][1]
        instance, prompt = self._draw_instance(place.instance, place.shown, random)
        return Sample((replace(instance, canvas=canvas),), prompt, class_image, class_prompt, noise_seed)

    def _draw_instance(self, number: int, shown: int, random: np.random.Generator) -> tuple[View, str]:
        """How an instance image is shown that was shown so often before."""
        path, prompt = self.instance_images[number]
        if not self.aug:
            return self._draw_whole_instance(number, random), prompt
        if self.variants is None:
            drawn = draw_augmentation(self.size, self.flip_probability, random)
        else:
            drawn = self._draw_from_pool(number, shown, self.variants)
        return View(path, drawn.flip, drawn.scale, drawn.top, drawn.left), drawn.words + prompt

    def _draw_from_pool(self, number: int, shown: int, variants: int) -> Augmentation:
        """One of the image's augmentations: all of them, in an order drawn at random, before one comes again."""
        if number not in self._pools:
            random = np.random.default_rng((self.seed, number, 0, 5))
            self._pools[number] = augmentation_pool(variants, self.size, self.flip_probability, random)
        rounds, place = divmod(shown, variants)
        order = np.random.default_rng((self.seed, number, rounds, 4)).permutation(variants)
        return self._pools[number][order[place]]

    def _draw_whole_instance(self, number: int, random: np.random.Generator) -> View:
        return View(self.instance_images[number][0], random.random() < self.flip_probability, self.size, 0.0, 0.0)

    def _draw_class_image(self, number: int, random: np.random.Generator) -> View:
        flip, place = random.random() < self.flip_probability, random.random(2)
        if self.variants is not None:
            place = np.random.default_rng((self.seed, number, flip, 2)).random(2)
        top, left = (0.5, 0.5) if self.center_crop else map(float, place)
        return View(self.class_images[number][0], flip, None, top, left)

    def _draw_pair(self, index: int, random: np.random.Generator, noise_seed: int) -> Sample:
        def beside(
            images: Sequence[tuple[Path, str]],
            elsewhere: dict[Path, list[int]],
            draw_view: Callable[[int, np.random.Generator], View],
        ) -> tuple[tuple[View, ...], str]:
            if not images:
                return (), ""
            one = index % len(images)
            others = elsewhere[images[one][0].parent]
            pair = random.permutation([one, others[int(random.integers(len(others)))]]).tolist()
            left, right = pair
            return tuple(draw_view(number, random) for number in pair), side_by_side(images[left][1], images[right][1])

        # Of several concepts, as often beside another image as beside another of them.
        if self.cutmix_images and (len(self._instances_elsewhere) == 1 or random.random() < 0.5):
            instance, prompt = self._draw_beside_other_image(index % len(self.instance_images), random)
        else:
            instance, prompt = beside(self.instance_images, self._instances_elsewhere, self._draw_whole_instance)
        class_image, class_prompt = beside(self.class_images, self._class_images_elsewhere, self._draw_class_image)
        return Sample(instance, prompt, class_image, class_prompt, noise_seed)

    def _draw_beside_other_image(self, number: int, random: np.random.Generator) -> tuple[tuple[View, ...], str]:
        """An instance image to the left or right of one of ``cutmix_images``, and a prompt that says so."""
        own = self._draw_whole_instance(number, random), self.instance_images[number][1]
        path, caption = self.cutmix_images[int(random.integers(len(self.cutmix_images)))]
        other = View(path, random.random() < self.flip_probability, self.size, 0.0, 0.0), caption
        (left, words), (right, more) = (own, other) if random.random() < 0.5 else (other, own)
        return (left, right), side_by_side(words, more)

    def _most_views(self) -> float:
        """How many views there can be, with all that prompts say about them."""
        if self.cutmix_probability:
            return math.inf  # pairs have new prompts long after the last new view
        flips = 2 if self.flip_probability else 1
        class_image = flips if self.variants or self.center_crop or not self.class_images else math.inf
        instance = flips if not self.aug else math.inf if self.variants is None else self.variants
        class_images = self._buckets.different_class_images() if self._buckets else len(self.class_images)
        return len(self.instance_images) * instance + class_images * class_image


def numbers_elsewhere(images: Sequence[tuple[Path, str]]) -> dict[Path, list[int]]:
    """For each folder, the numbers of the images in other folders; of all images where there is but one folder."""
    folders = [path.parent for path, _ in images]
    everywhere = list(range(len(folders)))
    return {
        folder: [number for number in everywhere if folders[number] != folder] or everywhere
        for folder in dict.fromkeys(folders)
    }
