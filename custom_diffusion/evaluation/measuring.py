"""From images to measures: which features are compared with which, and what their control is."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from custom_diffusion.errors import UserError
from custom_diffusion.evaluation.encoders import ClipEncoder, ImageEncoder
from custom_diffusion.evaluation.layouts import GeneratedImage, images_in
from custom_diffusion.evaluation.prompts import without_tokens
from custom_diffusion.evaluation.results import Measure
from custom_diffusion.evaluation.scores import (
    Kid,
    check_kid_size,
    grouped_image_alignment,
    image_alignment,
    kid,
    text_alignment,
)

UNTRAINED = "the untrained word"
BASE_MODEL = "the base model"


@dataclass(frozen=True)
class Encoders:
    """The encoders of an evaluation.

    Attributes:
        clip: for texts and images; None where text alignment is not wanted.
        others: for images alone.
    """

    clip: ClipEncoder | None
    others: tuple[ImageEncoder, ...]

    def all(self) -> list[ImageEncoder]:
        """Those that encode images."""
        return [*([self.clip] if self.clip else []), *self.others]


def load_encoders(args: argparse.Namespace, device: str) -> Encoders:
    """The encoders that the flags ``clip``, ``dino`` and ``encoder`` name; "none" for no CLIP.

    Raises:
        UserError: where none is named, or one cannot be had.
    """
    clip = None if args.clip == "none" else ClipEncoder("--clip", args.clip, device)
    others = [("--dino", args.dino), ("--encoder", args.encoder)]
    found = Encoders(clip, tuple(ImageEncoder(flag, name, device) for flag, name in others if name is not None))
    if not found.all():
        raise UserError("--clip none leaves no encoder: give one with --dino or --encoder")
    return found


class FeatureCache:
    """The features of images, each image encoded once by each encoder."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Path], Tensor] = {}

    def of(self, encoder: ImageEncoder, paths: Sequence[Path]) -> Tensor:
        """Features (N, width) of N images."""
        new = [path for path in dict.fromkeys(paths) if (encoder.name, path) not in self._known]
        if new:
            for path, features in zip(new, encoder.images(new), strict=True):
                self._known[encoder.name, path] = features
        return torch.stack([self._known[encoder.name, path] for path in paths])


@dataclass(frozen=True)
class Ruler:
    """Measures images.

    Attributes:
        encoders: whose features are compared.
        tokens: the modifier tokens; None for all that stands in angle brackets.
        cache: of features.
    """

    encoders: Encoders
    tokens: Sequence[str] | None
    cache: FeatureCache

    def text(self, images: Sequence[GeneratedImage], control: Sequence[GeneratedImage] = ()) -> list[Measure]:
        """Text alignment, with the modifier token in the scored prompt and without it.

        The paper leaves the token out, its code leaves it in, so both are given.
        """
        clip = self.encoders.clip
        if clip is None:
            return []
        measures = []
        ways = {"with": lambda prompt: prompt, "without": lambda prompt: without_tokens(prompt, self.tokens)}
        for word, scored in ways.items():
            values = [
                text_alignment(self._features(clip, some), clip.texts([scored(image.prompt) for image in some]))
                for some in (images, control)
                if some
            ]
            name = f"text alignment, {word} the new word in the scored prompt"
            measures.append(_beside(Measure(name, "text", clip.name, values[0]), values[1:]))
        return measures

    def image(
        self,
        images: Sequence[GeneratedImage],
        targets: Sequence[Path],
        control: Sequence[GeneratedImage] = (),
    ) -> list[Measure]:
        """Image alignment by every encoder with every folder of real images, or with the images' own targets."""
        measures = []
        real = {str(folder): real_images(folder) for folder in targets}
        for encoder in self.encoders.all():
            for name, paths in real.items():
                wanted = self.cache.of(encoder, paths)
                values = [image_alignment(self._features(encoder, some), wanted) for some in (images, control) if some]
                measure = Measure(f"image alignment with {name}", "image", encoder.name, values[0])
                measures.append(_beside(measure, values[1:]))
            if not real and all(image.targets for image in images):
                own = [self.cache.of(encoder, image.targets) for image in images]
                value = grouped_image_alignment(self._features(encoder, images), own)
                measures.append(Measure("image alignment with each one's own subject", "image", encoder.name, value))
        return measures

    def kid(
        self,
        class_prompt: str,
        images: Sequence[GeneratedImage],
        real: Sequence[Path],
        control: Sequence[GeneratedImage],
        subset_size: int,
        subsets: int,
    ) -> list[Measure]:
        """KID x 1000 of images of the plain class prompt, by every encoder, beside that of the base model.

        Args:
            real: real images of the class.
            control: images of the same prompt by the base model.
        """
        measures = []
        for encoder in self.encoders.all():
            wanted = self.cache.of(encoder, real)
            found: list[Kid] = [
                kid(self._features(encoder, some), wanted, subset_size, subsets) for some in (images, control) if some
            ]
            name = f"KID x 1000 of {class_prompt!r} ({subsets} subsets of {subset_size})"
            last = found[1] if len(found) > 1 else None
            measures.append(
                Measure(
                    name,
                    "kid",
                    encoder.name,
                    found[0].mean,
                    spread=found[0].spread,
                    control=last.mean if last else None,
                    control_spread=last.spread if last else None,
                    control_name=BASE_MODEL if last else "",
                    higher_is_better=False,
                )
            )
        return measures

    def _features(self, encoder: ImageEncoder, images: Sequence[GeneratedImage]) -> Tensor:
        return self.cache.of(encoder, [image.path for image in images])


def _beside(measure: Measure, control: Sequence[float]) -> Measure:
    if not control:
        return measure
    return Measure(
        measure.name, measure.kind, measure.encoder, measure.value, control=control[0], control_name=UNTRAINED
    )


def real_images(folder: Path) -> list[Path]:
    """The real images of a concept.

    Raises:
        UserError: where there are none.
    """
    paths = images_in(folder)
    if not paths:
        raise UserError(f"there is no image in {str(folder)!r} (--instance_data_dir)")
    return paths


def real_class_images(folder: Path, subset_size: int) -> list[Path]:
    """The images of a class folder, as retrieve.py fills it (``images/``) or directly in it.

    Raises:
        UserError: where there are fewer than KID needs.
    """
    paths = images_in(folder / "images" if (folder / "images").is_dir() else folder)
    check_kid_size(len(paths), subset_size, f"real class images in {str(folder)!r}")
    return paths


def words_of(text: str | None) -> list[str]:
    """The parts of a flag's value that are joined with '+'."""
    return [part for part in re.split(r"\+", text or "") if part]
