"""Feature encoders: any CLIP, and any image encoder of transformers, such as DINO and DINOv2."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPModel, CLIPTokenizer

from custom_diffusion.errors import UserError
from custom_diffusion.files import is_hub_id
from custom_diffusion.images import load_image
from custom_diffusion.models.drawing import put_on
from custom_diffusion.text import first_line

# DINO's evaluation, which CustomConcept101 uses: the shorter side becomes 256, and the middle 224 x 224 are seen.
DINO_SIZE = 224
DINO_RESIZE = 256 / 224

_Item = TypeVar("_Item")


class ImageEncoder:
    """Turns images into features.

    Args:
        flag: the flag that named it, for messages.
        name: Hub id or folder.
        device: where it runs, in float32.

    Attributes:
        name: as it was given; it belongs beside every number.

    Raises:
        UserError: where it cannot be had, or is no encoder of images.
    """

    def __init__(self, flag: str, name: str, device: str, batch_size: int = 32) -> None:
        self.flag, self.name, self.device, self.batch_size = flag, name, device, batch_size
        config = self._load(AutoConfig.from_pretrained)
        self._check(config)
        self.model: Any = put_on(self._load_model().eval().requires_grad_(False), device)
        if getattr(self.model, "main_input_name", None) != "pixel_values" and not isinstance(self.model, CLIPModel):
            raise UserError(f"{flag} {name!r} is a {config.model_type} model, which takes no images: {self._advice()}")
        processor = self._load(AutoImageProcessor.from_pretrained)
        size, resize = self._sizes(config)
        self._transform = v2.Compose(
            [
                v2.Resize(resize, interpolation=v2.InterpolationMode.BICUBIC),
                v2.CenterCrop(size),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(processor.image_mean, processor.image_std),
            ]
        )

    def _check(self, config: Any) -> None:
        """Refuse what is no such encoder."""
        if not isinstance(getattr(config, "image_size", None), int):
            raise UserError(f"{self.flag} {self.name!r} is a {config.model_type} model, no encoder of images")

    def _load_model(self) -> Any:
        return self._load(AutoModel.from_pretrained)

    def _sizes(self, config: Any) -> tuple[int, int]:
        """Side of what the encoder sees, and of the shorter side of the image that it is cut from, in pixels."""
        size = min(config.image_size, DINO_SIZE)
        return size, round(size * DINO_RESIZE)

    def _load(self, loader: Callable[..., Any]) -> Any:
        try:
            return loader(self.name)
        except Exception as error:  # OSError, ValueError, KeyError, and the Hub's own
            raise UserError(
                f"{self.flag} {self.name!r} cannot be loaded ({first_line(error)}): {self._advice()}"
            ) from error

    def _advice(self) -> str:
        if Path(self.name).exists() or not is_hub_id(self.name):
            return "give the folder or Hub id of an encoder in transformers' layout, such as facebook/dino-vits16"
        return f"fetch it where there is a network, with: hf download {shlex.quote(self.name)}"

    @torch.no_grad()
    def images(self, paths: Sequence[Path]) -> Tensor:
        """Features of images, (N, width), float32, on the CPU, in batches.

        Raises:
            UserError: where the encoder has none of the outputs that are known.
        """
        batches = []
        with tqdm(total=len(paths), unit="image", desc=f"features by {Path(self.name).name}", leave=False) as progress:
            for batch in _batches(paths, self.batch_size):
                pixels = torch.stack([self._transform(load_image(path)) for path in batch])
                batches.append(self._features(pixels.to(self.device)).float().cpu())
                progress.update(len(batch))
        return torch.cat(batches)

    def _features(self, pixels: Tensor) -> Tensor:
        """Of a transformer the class token, as DINO does; else what the model pools."""
        output = self.model(pixel_values=pixels)
        last = getattr(output, "last_hidden_state", None)
        if last is not None and last.ndim == 3:
            return last[:, 0]
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise UserError(f"{self.flag} {self.name!r} gives no features: it is no encoder of images")
        return pooled.flatten(1)


class ClipEncoder(ImageEncoder):
    """CLIP: features of images and of texts in one space."""

    def _check(self, config: Any) -> None:
        if config.model_type != "clip":
            raise UserError(
                f"--clip {self.name!r} is a {config.model_type} model, no CLIP with both its halves: "
                "give one such as openai/clip-vit-base-patch32; --dino and --encoder take other encoders"
            )

    def _load_model(self) -> Any:
        self.tokenizer = self._load(CLIPTokenizer.from_pretrained)
        return self._load(CLIPModel.from_pretrained)

    def _sizes(self, config: Any) -> tuple[int, int]:
        return config.vision_config.image_size, config.vision_config.image_size

    def _features(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Features of texts, (N, width), float32, on the CPU; what is too long is cut, as in the authors' script."""
        length = self.model.config.text_config.max_position_embeddings
        features = []
        for batch in _batches(prompts, self.batch_size):
            ids = self.tokenizer(
                list(batch), truncation=True, padding="max_length", max_length=length, return_tensors="pt"
            )
            output = self.model.get_text_features(
                input_ids=ids.input_ids.to(self.device), attention_mask=ids.attention_mask.to(self.device)
            )
            features.append(_pooled(output).float().cpu())
        return torch.cat(features)


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _pooled(output: Any) -> Tensor:
    # transformers gives the features themselves before 5.0, and an object that holds them from there on.
    return output if isinstance(output, Tensor) else output.pooler_output
