"""The training samples: which image a step shows, how it is augmented, and what its prompt says."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from custom_diffusion.concept.prompts import LARGE_WORDS, SMALL_WORDS, side_by_side
from custom_diffusion.images import load_image
from custom_diffusion.models.families import Conditioning


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


@dataclass(frozen=True)
class Sample:
    """What an item of the stream is made of.

    Attributes:
        instance: one view, or two that are beside each other, the left one first.
        class_image: alike; empty without prior preservation.
    """

    instance: tuple[View, ...]
    instance_prompt: str
    class_image: tuple[View, ...]
    class_prompt: str
    noise_seed: int


class CustomDiffusionDataset(Dataset):
    """Instance images (and class images beside them) with their prompts, augmented and tokenised.

    The dataset is an endless stream: item p is sample ``p % len(self)`` of epoch ``p // len(self)``. What it looks
    like depends on seed, epoch and sample alone, not on workers, processes or restarts, so that a resumed run and
    a run on several devices see what a single uninterrupted one sees.

    Args:
        instance_images: paths and prompts, as :func:`find_instance_images` gives them.
        class_images: alike, as :func:`find_class_images` gives them; none without prior preservation.
        tokenize: a prompt to its ids per text encoder, each (length,); knows the modifier tokens.
        size: side of the images in pixels.
        mask_size: side of the latents, ``size`` divided by the VAE's factor.
        center_crop: crop class images at the centre rather than at random.
        hflip: mirror half of the images.
        aug: the resize augmentation of the paper's appendix, with its prompt words.
        seed: seed of the order and of every sample.
        variants: how many augmentations of each instance image there are to draw from; a class image then has one
            random crop, and another when it is mirrored. None: no two samples are alike.
        cutmix_probability: share of the steps that show two concepts, or class images of two, beside each other, with
            a prompt that names both (after the Cut-Mix of SVDiff, Han et al. 2023). There both are cropped into one
            square; here they stay whole, in an image twice as wide. Concepts are told apart by their folders.
        samples_per_step: how many samples, of all processes, make a step: they are all pairs or none, so that a batch
            has one shape.
        padding_mode: what surrounds an image that the augmentation made smaller: "constant", grey, which the mask
            leaves out; or "edge", its outermost pixels continued, which the mask takes in.

    Attributes:
        posteriors: what :func:`caching.encode_views` gives; samples then have posteriors in place of pixels.
        conditioning: what :func:`caching.encode_captions` gives, for ``"instance"`` or ``"class"`` prompts; samples
            then have this in place of their ids.
    """

    def __init__(
        self,
        instance_images: Sequence[tuple[Path, str]],
        class_images: Sequence[tuple[Path, str]],
        tokenize: Callable[[str], dict[str, Tensor]],
        size: int = 512,
        mask_size: int = 64,
        center_crop: bool = False,
        hflip: bool = False,
        aug: bool = True,
        seed: int = 42,
        variants: int | None = None,
        cutmix_probability: float = 0.0,
        samples_per_step: int = 1,
        padding_mode: str = "constant",
    ) -> None:
        self._tokenize = tokenize
        self.size = size
        self.mask_size = mask_size
        self.center_crop = center_crop
        self.flip_probability = 0.5 if hflip else 0.0
        self.aug = aug
        self.seed = seed
        self.variants = variants
        self.cutmix_probability = cutmix_probability
        self.samples_per_step = samples_per_step
        self.padding_mode = padding_mode
        self.instance_images = instance_images
        self.class_images = class_images
        self._instances_elsewhere = numbers_elsewhere(instance_images)
        self._class_images_elsewhere = numbers_elsewhere(class_images)
        self.posteriors: dict[View, Tensor] = {}
        self.conditioning: dict[str, dict[str, Conditioning]] = {}
        self._order_of: tuple[int, np.ndarray] | None = None
        self._last_image: tuple[Path, Image.Image] | None = None
        self._ids_of: dict[str, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return max(len(self.instance_images), len(self.class_images))

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self)))
        return self._order_of[1]

    def positions(self, steps: range) -> range:
        """The items of the stream that optimizer steps take."""
        return range(steps.start * self.samples_per_step, steps.stop * self.samples_per_step)

    def draw(self, position: int) -> Sample:
        """Decide what an item is made of; no image is read for it."""
        epoch, sample = divmod(position, len(self))
        index = int(self._order(epoch)[sample])
        random = np.random.default_rng((self.seed, epoch, index))
        noise_seed = int(random.integers(2**63))
        if self._shows_pair(position):
            return self._draw_pair(index, random, noise_seed)
        # The class image first: it is then the same with and without variants, where it has but one crop.
        class_image, class_prompt = (), ""
        if self.class_images:
            number = index % len(self.class_images)
            class_image, class_prompt = (self._draw_class_image(number, random),), self.class_images[number][1]
        number = index % len(self.instance_images)
        if self._has_variants():
            random = np.random.default_rng((self.seed, number, int(random.integers(self.variants)), 1))
        instance, prompt = self._draw_instance(number, random)
        return Sample((instance,), prompt, class_image, class_prompt, noise_seed)

    def _has_variants(self) -> bool:
        """Whether there is so much to draw for an instance image that it is drawn from a limited number."""
        return self.variants is not None and self.aug

    def _shows_pair(self, position: int) -> bool:
        if not self.cutmix_probability:
            return False
        # Not from the sample's own numbers: the samples of a step decide alike, and without pairs nothing changes.
        step = position // self.samples_per_step
        return bool(np.random.default_rng((self.seed, step, 3)).random() < self.cutmix_probability)

    def _draw_instance(self, number: int, random: np.random.Generator) -> tuple[View, str]:
        path, prompt = self.instance_images[number]
        flip = random.random() < self.flip_probability
        scale, words = self._draw_scale(random)
        # Where there is no room, there is but one view of the image.
        top, left = (0.0, 0.0) if scale == self.size else map(float, random.random(2))
        return View(path, flip, scale, top, left), words + prompt

    def _draw_whole_instance(self, number: int, random: np.random.Generator) -> View:
        return View(self.instance_images[number][0], random.random() < self.flip_probability, self.size, 0.0, 0.0)

    def _draw_class_image(self, number: int, random: np.random.Generator) -> View:
        flip, place = random.random() < self.flip_probability, random.random(2)
        if self.variants is not None:
            place = np.random.default_rng((self.seed, number, flip, 2)).random(2)
        top, left = (0.5, 0.5) if self.center_crop else map(float, place)
        return View(self.class_images[number][0], flip, None, top, left)

    def _draw_pair(self, index: int, random: np.random.Generator, noise_seed: int) -> Sample:
        drawn: list[Any] = []
        for images, elsewhere, draw_view in (
            (self.instance_images, self._instances_elsewhere, self._draw_whole_instance),
            (self.class_images, self._class_images_elsewhere, self._draw_class_image),
        ):
            if not images:
                drawn += [(), ""]
                continue
            one = index % len(images)
            others = elsewhere[images[one][0].parent]
            pair = random.permutation([one, others[int(random.integers(len(others)))]]).tolist()
            drawn += [tuple(draw_view(number, random) for number in pair)]
            drawn += [side_by_side(*(images[number][1] for number in pair))]
        return Sample(*drawn, noise_seed)

    def _draw_scale(self, random: np.random.Generator) -> tuple[int, str]:
        """Side of the image in pixels, and the words that say so in the prompt (paper, appendix; the example)."""
        if not self.aug:
            return self.size, ""
        if random.random() < 0.66:
            scale = int(random.integers(self.size // 3, self.size + 1))
        else:
            scale = int(random.integers(int(1.2 * self.size), max(int(1.4 * self.size), int(1.2 * self.size) + 1)))
        if scale < 0.6 * self.size:
            return scale, str(random.choice(SMALL_WORDS))
        if scale > self.size:
            return scale, str(random.choice(LARGE_WORDS))
        return scale, ""

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

    def _most_views(self) -> float:
        """How many views there can be, with all that prompts say about them."""
        if self.cutmix_probability:
            return math.inf  # prompts of pairs go on being new when no view is
        flips = 2 if self.flip_probability else 1
        class_image = flips if self.variants or self.center_crop or not self.class_images else math.inf
        instance = self.variants if self._has_variants() else math.inf if self.aug else flips
        return len(self.instance_images) * instance + len(self.class_images) * class_image

    def __getitem__(self, position: int) -> dict[str, Any]:
        """One item of the stream.

        Returns:
            ``instance_images`` (3, size, size) in [-1, 1], as :meth:`render` gives them; ``instance_mask``
            (mask_size, mask_size), 1 where the loss counts (:meth:`mask`); ``instance_prompt_ids``
            (model_max_length,); with prior preservation ``class_images``, ``class_mask`` (all ones) and
            ``class_prompt_ids`` alike; ``noise_seed``, from which :func:`collate_fn` draws noise and timesteps.
            Where the images are encoded already, ``instance_posterior`` (2, C, mask_size, mask_size) and
            ``class_posterior`` take the place of the images; where the captions are, ``instance_text`` and
            ``class_text`` (model_max_length, text width) that of the ids. Two images beside each other are twice
            as wide, and so are their masks and posteriors.
        """
        sample = self.draw(position)
        example: dict[str, Any] = {"noise_seed": sample.noise_seed}
        for kind, views, prompt in (
            ("instance", sample.instance, sample.instance_prompt),
            ("class", sample.class_image, sample.class_prompt),
        ):
            if not views:
                continue
            name, show = ("posterior", self.posteriors.__getitem__) if self.posteriors else ("images", self.render)
            example[f"{kind}_{name}"] = torch.cat([show(view) for view in views], dim=-1)
            example[f"{kind}_mask"] = torch.cat([self.mask(view) for view in views], dim=-1)
            if kind in self.conditioning:
                example[f"{kind}_conditioning"] = self.conditioning[kind][prompt]
            else:
                example[f"{kind}_prompt_ids"] = self.tokenize(prompt)
        return example

    def render(self, view: View) -> Tensor:
        """The pixels of a view, (3, size, size) in [-1, 1].

        An instance image's centre square is laid on a canvas, or cropped to the canvas. The example squashes the
        whole image into the square; the authors' code keeps its proportions, and so does this.
        """
        image = self._image(view)
        if view.scale is None:
            # Cropped before it is resized: a panorama would otherwise become gigabytes first.
            width, height = image.size
            side = min(width, height)
            top, left = _offset(view.top, height - side), _offset(view.left, width - side)
            image = TF.crop(image, top, left, side, side)
            return _to_tensor(image.resize((self.size, self.size), Image.Resampling.BILINEAR))
        pixels = _centre_square(image, view.scale)
        top, left = self._place(view)
        room = self.size - view.scale
        if room <= 0:
            return pixels[:, top : top + self.size, left : left + self.size]
        return TF.pad(pixels, [left, top, room - left, room - top], padding_mode=self.padding_mode)

    def _image(self, view: View) -> Image.Image:
        # Where views are encoded, those of an image follow each other: it is decoded once then.
        if self._last_image is None or self._last_image[0] != view.path:
            self._last_image = (view.path, load_image(view.path))
        image = self._last_image[1]
        return ImageOps.mirror(image) if view.flip else image

    def mask(self, view: View) -> Tensor:
        """Which latents count: (mask_size, mask_size), 1 inside the image and 0 outside."""
        factor = self.size // self.mask_size
        mask = torch.zeros(self.mask_size, self.mask_size)
        if view.scale is None or view.scale >= self.size or self.padding_mode == "edge":
            return torch.ones(self.mask_size, self.mask_size)
        top, left = self._place(view)
        mask[slice(*_cells_inside(top, view.scale, factor)), slice(*_cells_inside(left, view.scale, factor))] = 1.0
        return mask

    def _place(self, view: View) -> tuple[int, int]:
        room = abs(view.scale - self.size)
        return _offset(view.top, room), _offset(view.left, room)

    def tokenize(self, prompt: str) -> dict[str, Tensor]:
        """The ids of a prompt per text encoder, cut and padded to (model_max_length,)."""
        if prompt not in self._ids_of:
            self._ids_of[prompt] = self._tokenize(prompt)
        return self._ids_of[prompt]


def numbers_elsewhere(images: Sequence[tuple[Path, str]]) -> dict[Path, list[int]]:
    """For each folder, the numbers of the images in other folders; of all images where there is but one folder."""
    folders = [path.parent for path, _ in images]
    everywhere = list(range(len(folders)))
    return {
        folder: [number for number in everywhere if folders[number] != folder] or everywhere
        for folder in dict.fromkeys(folders)
    }


def _centre_square(image: Image.Image, side: int) -> Tensor:
    square = TF.center_crop(image, [min(image.size)] * 2)
    return _to_tensor(square.resize((side, side), Image.Resampling.BILINEAR))


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


def collate_fn(
    examples: Sequence[dict[str, Any]], with_prior_preservation: bool, latent_channels: int, num_train_timesteps: int
) -> dict[str, Any]:
    """Batch samples, instance images first and class images behind them, with what diffusion draws for each.

    Noise and timesteps are drawn here, on the CPU and from each sample's own seed: they are then the same on every
    device, for any split of the batch over processes, and after every restart, and cost the training loop nothing.

    Returns:
        ``pixel_values`` (N, 3, size, size) or, of samples that are encoded already, ``posterior``
        (N, 2, latent_channels, mask_size, mask_size); ``mask`` (N, 1, mask_size, mask_size); ``noise`` and
        ``posterior_noise`` (N, latent_channels, mask_size, mask_size), ``timesteps`` (N,), where N is the number of
        examples, doubled with prior preservation. ``input_ids`` per text encoder, (M, length), of the first M
        captions, and ``conditioning``, tensors of N - M each, of the others; either is absent where it would be empty.
    """
    kinds = ["instance", "class"] if with_prior_preservation else ["instance"]
    generators = [torch.Generator().manual_seed(example["noise_seed"]) for example in examples]
    batch: defaultdict[str, list[Any]] = defaultdict(list)
    names = {
        "images": "pixel_values",
        "posterior": "posterior",
        "prompt_ids": "input_ids",
        "conditioning": "conditioning",
    }
    for kind in kinds:
        for example, generator in zip(examples, generators, strict=True):
            for key, name in names.items():
                if f"{kind}_{key}" in example:
                    batch[name].append(example[f"{kind}_{key}"])
            mask = example[f"{kind}_mask"]
            batch["mask"].append(mask.unsqueeze(0))
            shape = (latent_channels, *mask.shape)
            batch["noise"].append(torch.randn(shape, generator=generator))
            batch["posterior_noise"].append(torch.randn(shape, generator=generator))
            batch["timesteps"].append(torch.randint(num_train_timesteps, (), generator=generator))
    return {name: _stack(values) for name, values in batch.items()}


def _stack(values: Sequence[Any]) -> Any:
    """Tensors on a new first dimension; of dictionaries of tensors, every entry."""
    if isinstance(values[0], dict):
        return {name: torch.stack([value[name] for value in values]) for name in values[0]}
    return torch.stack(list(values))


def position_batches(first: int, count: int, batch_size: int, process: int, num_processes: int) -> list[range]:
    """Which items of the stream this process takes: batches ``first`` to ``first + count - 1`` of its own.

    All processes together walk through the stream without gap or overlap, so two with a batch of one see what one
    with a batch of two sees.
    """
    starts = ((batch * num_processes + process) * batch_size for batch in range(first, first + count))
    return [range(start, start + batch_size) for start in starts]
