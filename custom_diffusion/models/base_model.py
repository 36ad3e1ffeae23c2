"""The base model: where it is, and the parts of it that a command or a training run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedModel

from custom_diffusion.errors import UserError
from custom_diffusion.files import is_hub_id
from custom_diffusion.models.families import Family, family_of
from custom_diffusion.text import first_line


@dataclass(frozen=True)
class BaseModel:
    """Where a base model is.

    Attributes:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        variant: of the files, such as fp16.
        tokenizer: folder or Hub id of another tokenizer than the model's own.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    tokenizer: str | None = None

    def load(self, loader: Callable[..., Any], subfolder: str | None = None, **options: Any) -> Any:
        """Call a ``from_pretrained`` or ``load_config`` on the model, or on the part of it in ``subfolder``.

        Raises:
            UserError: in one line that names the part, where the libraries' errors are pages.
        """
        is_folder = Path(self.name).is_dir()
        if not is_folder and not is_hub_id(self.name):
            raise UserError(f"there is no model folder {self.name!r} (--pretrained_model_name_or_path)")
        if subfolder is not None:
            options["subfolder"] = subfolder
        try:
            return loader(self.name, revision=self.revision, **options)
        except Exception as error:  # the libraries raise OSError, ValueError, EntryNotFoundError, KeyError, ...
            what = subfolder or "model_index.json"
            where = f"in the folder {self.name!r}"
            if not is_folder:
                where = f"of {self.name!r} from the Hub, and no such folder is here"
            raise UserError(
                f"cannot load the {what} {where} (--pretrained_model_name_or_path): {first_line(error)}"
            ) from error

    def family(self) -> Family:
        """The family that the model is of, as its ``model_index.json`` says.

        Raises:
            UserError: where it cannot be read, or is of a family that is not supported.
        """
        index = self.load(DiffusionPipeline.load_config)
        return family_of(index.keys(), f"{self.name!r}, a {index.get('_class_name')},")

    def pipeline(self, dtype: torch.dtype, **options: Any) -> DiffusionPipeline:
        """The whole pipeline; ``options`` go to ``from_pretrained``."""
        if self.tokenizer is not None:
            family = self.family()
            tokenizers = self.tokenizers(family)
            options = {part.tokenizer: tokenizers[part.name] for part in family.text_encoders} | options
        return self.load(DiffusionPipeline.from_pretrained, dtype=dtype, variant=self.variant, **options)

    def tokenizers(self, family: Family, other: str | None = None) -> dict[str, CLIPTokenizer]:
        """The tokenizers by the names of their text encoders, or the ones of another model or folder.

        Raises:
            UserError: where one cannot be loaded.
        """
        other = other or self.tokenizer
        if other is None:
            return {
                part.name: self.load(CLIPTokenizer.from_pretrained, part.tokenizer) for part in family.text_encoders
            }
        try:
            tokenizer = CLIPTokenizer.from_pretrained(other, revision=self.revision)
        except Exception as error:
            raise UserError(f"cannot load the tokenizer {other!r} (--tokenizer_name)") from error
        return {part.name: tokenizer for part in family.text_encoders}

    def text_encoders(self, family: Family, dtype: torch.dtype = torch.float32) -> dict[str, PreTrainedModel]:
        """The text encoders by name, frozen."""
        return {
            part.name: self.load(
                part.kind.from_pretrained, part.name, variant=self.variant, dtype=dtype
            ).requires_grad_(False)
            for part in family.text_encoders
        }

    def unet(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """The UNet, frozen."""
        unet = self.load(UNet2DConditionModel.from_pretrained, "unet", variant=self.variant, dtype=dtype)
        return unet.requires_grad_(False)

    def vae(self, dtype: torch.dtype, **options: Any) -> AutoencoderKL:
        """The VAE, frozen; ``options`` go to ``from_pretrained``."""
        vae = self.load(AutoencoderKL.from_pretrained, "vae", variant=self.variant, dtype=dtype, **options)
        return vae.requires_grad_(False)

    def unet_parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the UNet's weights by name, in float32; the rest is not kept.

        Raises:
            UserError: where the UNet has no such weights.
        """
        parameters = dict(self.unet().named_parameters())
        try:
            return {name: parameters[name].detach().clone() for name in names}
        except KeyError as error:
            raise UserError(f"the base model {self.name!r} has no {error.args[0]}: it is another model") from None


@dataclass(frozen=True)
class ModelConfiguration:
    """What a base model's configuration files, which are small, say of it.

    Attributes:
        base_model: the model.
        family: which family it is of.
        noise_scheduler: how its latents are noised, and whether noise or velocity is predicted.
        vae: the VAE's configuration.
        latent_channels: of its latents.
        latent_size: side of the latents of the training images.
    """

    base_model: BaseModel
    family: Family
    noise_scheduler: DDPMScheduler
    vae: dict[str, Any]
    latent_channels: int
    latent_size: int


def read_configuration(base_model: BaseModel, resolution: int) -> ModelConfiguration:
    """Look at a model's configuration files, before any weights are read.

    Args:
        resolution: side of the training images in pixels.

    Raises:
        UserError: for a model that is missing or of another family, or a resolution that the VAE cannot take.
    """
    family = base_model.family()
    noise_scheduler = base_model.load(DDPMScheduler.from_pretrained, "scheduler")
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the base model predicts {noise_scheduler.config.prediction_type!r}, not epsilon or v_prediction"
        )
    vae = base_model.load(AutoencoderKL.load_config, "vae")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if resolution % factor:
        below = resolution // factor * factor
        raise UserError(
            f"--resolution {resolution} is no multiple of {factor}, which the VAE needs: "
            f"take {below or factor} or {below + factor}"
        )
    return ModelConfiguration(base_model, family, noise_scheduler, vae, vae["latent_channels"], resolution // factor)
