"""The training samples, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from custom_diffusion.data.buckets import Shape, shapes_of
from custom_diffusion.data.stream import Sample, SampleStream
from custom_diffusion.data.views import Renderer, View
from custom_diffusion.models.families import Conditioning


class CustomDiffusionDataset(Dataset):
    """Instance images (and class images beside them) with their prompts, augmented and tokenised.

    The dataset is endless and repeatable: see :class:`stream.SampleStream`.

    Args:
        instance_images: paths and prompts, as :func:`images.find_instance_images` gives them.
        class_images: alike, as :func:`images.find_class_images` gives them; none without prior preservation.
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
        cutmix_images: paths and captions of other images to show beside a concept there, as
            :func:`images.find_cutmix_images` gives them.
        samples_per_step: how many samples, of all processes, make a step: they are all pairs or none, so that a batch
            has one shape.
        padding_mode: see :class:`views.Renderer`.
        with_time_ids: say with each sample which part of how large an image it shows.
        buckets: shapes, as :func:`buckets.find_buckets` gives them, in which images keep their proportions; the
            samples of a step have one shape. None: all images are squares. Not together with ``cutmix_probability``.
        masks: of instance images, as :func:`masks.find_masks` gives them; samples then say where the object is.

    Attributes:
        posteriors: what :func:`caching.encode_views` gives; samples then have posteriors in place of pixels.
        conditioning: what :func:`caching.encode_captions` gives, for ``"instance"`` or ``"class"`` prompts; samples
            then have this in place of their ids.
        object_masks: of views, as :meth:`views.Renderer.object_mask` gives them; those of other views are made when
            they are wanted.
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
        cutmix_images: Sequence[tuple[Path, str]] = (),
        samples_per_step: int = 1,
        padding_mode: str = "constant",
        with_time_ids: bool = False,
        buckets: Sequence[Shape] = (),
        masks: Mapping[Path, Path] | None = None,
    ) -> None:
        self.stream = SampleStream(
            instance_images,
            class_images,
            size=size,
            center_crop=center_crop,
            hflip=hflip,
            aug=aug,
            seed=seed,
            variants=variants,
            cutmix_probability=cutmix_probability,
            cutmix_images=cutmix_images,
            samples_per_step=samples_per_step,
            shapes=shapes_of([*instance_images, *class_images], buckets),
        )
        self.renderer = Renderer(size, mask_size, padding_mode, masks)
        self.instance_images = instance_images
        self.class_images = class_images
        self.with_time_ids = with_time_ids
        self.buckets = buckets
        self.with_object_masks = masks is not None
        self.object_masks: dict[View, Tensor] = {}
        self.posteriors: dict[View, Tensor] = {}
        self.conditioning: dict[str, dict[str, Conditioning]] = {}
        self._tokenize = tokenize
        self._ids_of: dict[str, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """How many samples an epoch has."""
        return len(self.stream)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """One item of the stream.

        Returns:
            ``instance_images`` (3, size, size) in [-1, 1], as :meth:`views.Renderer.render` gives them;
            ``instance_mask`` (mask_size, mask_size), 1 where the loss counts; ``instance_prompt_ids``, per text
            encoder (length,); with prior preservation ``class_images``, ``class_mask`` (all ones) and
            ``class_prompt_ids`` alike; ``noise_seed``, from which :func:`batches.collate_fn` draws noise and
            timesteps. Where the images are encoded already, ``instance_posterior`` (2, C, mask_size, mask_size) and
            ``class_posterior`` take the place of the images; where the captions are, ``instance_conditioning`` and
            ``class_conditioning`` that of the ids. ``instance_time_ids`` and ``class_time_ids`` (6,), where they are
            wanted, as :meth:`views.Renderer.time_ids` gives them. Two images beside each other are twice as wide, and
            so are their masks and posteriors. In buckets, all have the shape of the step. With ``masks``,
            ``instance_object_mask`` (mask_size, mask_size), from 0 outside to 1 inside the image's mask, and
            ``class_object_mask`` (all ones).
        """
        sample = self.draw(position)
        example: dict[str, Any] = {"noise_seed": sample.noise_seed}
        for kind, views, prompt in (
            ("instance", sample.instance, sample.instance_prompt),
            ("class", sample.class_image, sample.class_prompt),
        ):
            if not views:
                continue
            if self.posteriors:
                example[f"{kind}_posterior"] = torch.cat([self.posteriors[view] for view in views], dim=-1)
            else:
                example[f"{kind}_images"] = torch.cat([self.renderer.render(view) for view in views], dim=-1)
            example[f"{kind}_mask"] = torch.cat([self.renderer.mask(view) for view in views], dim=-1)
            if self.with_object_masks:
                example[f"{kind}_object_mask"] = torch.cat([self._object_mask(view) for view in views], dim=-1)
            if self.with_time_ids:
                example[f"{kind}_time_ids"] = self.renderer.time_ids(views)
            if kind in self.conditioning:
                example[f"{kind}_conditioning"] = self.conditioning[kind][prompt]
            else:
                example[f"{kind}_prompt_ids"] = self.tokenize(prompt)
        return example

    def _object_mask(self, view: View) -> Tensor:
        return self.object_masks[view] if view in self.object_masks else self.renderer.object_mask(view)

    def positions(self, steps: range) -> range:
        """The items that optimizer steps take."""
        return self.stream.positions(steps)

    def draw(self, position: int) -> Sample:
        """What an item shows, see :meth:`stream.SampleStream.draw`."""
        return self.stream.draw(position)

    def drawn(self, positions: Iterable[int]) -> tuple[list[View], dict[str, list[str]]]:
        """What these items show together, see :meth:`stream.SampleStream.drawn`."""
        return self.stream.drawn(positions)

    def tokenize(self, prompt: str) -> dict[str, Tensor]:
        """The ids of a prompt per text encoder, cut and padded to (length,)."""
        if prompt not in self._ids_of:
            self._ids_of[prompt] = self._tokenize(prompt)
        return self._ids_of[prompt]
