"""The base model of a concept: which one it is, and the parts of it that a command or a training run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import formats
from concept import Concept, UserError, is_hub_id
from images import UserError, first_line


@dataclass(frozen=True)
class BaseModel:
    """Where a base model is: folder or Hub id, with revision (of the Hub) and variant (of the files, such as fp16)."""

    name: str
    revision: str | None = None
    variant: str | None = None

    def load(self, loader: Callable[..., Any] = DiffusionPipeline.from_pretrained, **options: Any) -> Any:
        """Call a ``from_pretrained`` on it.

        Raises:
            UserError: in one line, where the libraries' errors are pages.
        """
        try:
            return loader(self.name, revision=self.revision, **options)
        except Exception as error:  # the libraries raise OSError, ValueError, EntryNotFoundError, ...
            reason = first_line(error)
            raise UserError(f"cannot load the base model {self.name!r}: {reason}") from error

    def pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The whole pipeline."""
        return self.load(dtype=dtype, variant=self.variant)

    def projections(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The UNet's weights under the keys of :attr:`concept.Concept.attention`, float32; the rest is not kept.

        Raises:
            UserError: where the UNet has no such weights.
        """
        loader = UNet2DConditionModel.from_pretrained
        unet = self.load(loader, subfolder="unet", variant=self.variant, dtype=torch.float32)
        parameters = dict(unet.named_parameters())
        try:
            return {key: parameters[formats.parameter_name(key)].detach().clone() for key in keys}
        except KeyError as error:
            raise UserError(f"the base model {self.name!r} has no {error.args[0]}: it is another model") from None

    def text_models(self) -> tuple[CLIPTokenizer, CLIPTextModel]:
        """Tokenizer and text encoder, the latter in float32."""
        tokenizer = self.load(CLIPTokenizer.from_pretrained, subfolder="tokenizer")
        loader = CLIPTextModel.from_pretrained
        return tokenizer, self.load(loader, subfolder="text_encoder", variant=self.variant, dtype=torch.float32)


def find_base_model(
    given: str | None, revision: str | None, variant: str | None, concepts: Sequence[Concept]
) -> BaseModel:
    """The base model of the command line, or else the one that the concepts' cards name.

    Raises:
        UserError: where none is known, the cards disagree, or there is no such folder.
    """
    known = {concept.base_model: concept.source for concept in concepts if concept.base_model}
    if given is None and len(known) > 1:
        (one, its), (other, others) = list(known.items())[:2]
        raise UserError(
            f"{its!r} was trained on {one!r} and {others!r} on {other!r}; "
            "if these are the same model, give --pretrained_model_name_or_path"
        )
    name = given or next(iter(known), None)
    if name is None:
        raise UserError(
            f"the card of {concepts[0].source!r} names no base model: give --pretrained_model_name_or_path"
        )
    if not Path(name).is_dir() and not is_hub_id(name):
        raise UserError(f"there is no base model folder {name!r}: give --pretrained_model_name_or_path")
    return BaseModel(name, revision, variant)


# --- for training --------------------------------------------------------------------------------


def load_pretrained(base: BaseModel, loader: Callable[..., Any], subfolder: str | None = None, **options: Any) -> Any:
    """Call a ``from_pretrained`` or ``load_config`` on the base model that is to be trained.

    Raises:
        UserError: in one line that names the part, where the libraries' errors are pages.
    """
    if not Path(base.name).is_dir() and not is_hub_id(base.name):
        raise UserError(f"there is no model folder {base.name!r} (--pretrained_model_name_or_path)")
    if subfolder is not None:
        options["subfolder"] = subfolder
    try:
        return loader(base.name, revision=base.revision, **options)
    except Exception as error:  # the libraries raise OSError, ValueError, EntryNotFoundError, KeyError, ...
        reason = first_line(error)
        what = subfolder or "model_index.json"
        where = (
            f"in the folder {base.name!r}"
            if Path(base.name).is_dir()
            else f"of {base.name!r} from the Hub, and no such folder is here"
        )
        raise UserError(f"cannot load the {what} {where} (--pretrained_model_name_or_path): {reason}") from error


def load_tokenizer(base: BaseModel, name: str | None = None) -> CLIPTokenizer:
    """The base model's tokenizer, or another (folder or Hub id).

    Raises:
        UserError: where it cannot be loaded.
    """
    if name is None:
        return load_pretrained(base, CLIPTokenizer.from_pretrained, "tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(name, revision=base.revision)
    except Exception as error:
        raise UserError(f"cannot load the tokenizer {name!r} (--tokenizer_name)") from error


def check_base_model(base: BaseModel, resolution: int) -> tuple[DDPMScheduler, int, int]:
    """Look at the model's configuration files, which are small, before any weights are read.

    Args:
        resolution: side of the training images in pixels.

    Returns:
        The noise scheduler, the number of latent channels and the side of the latents.

    Raises:
        UserError: for a model that is missing or of another family, or a resolution that the VAE cannot take.
    """
    index = load_pretrained(base, DiffusionPipeline.load_config)
    if "text_encoder_2" in index or "unet" not in index:
        raise UserError(
            f"{base.name!r} is a {index.get('_class_name')}: Stable Diffusion 1.x and 2.x can be trained so far"
        )
    noise_scheduler = load_pretrained(base, DDPMScheduler.from_pretrained, "scheduler")
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the base model predicts {noise_scheduler.config.prediction_type!r}, not epsilon or v_prediction"
        )
    vae_config = load_pretrained(base, AutoencoderKL.load_config, "vae")
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if resolution % factor:
        below = resolution // factor * factor
        raise UserError(
            f"--resolution {resolution} is no multiple of {factor}, which the VAE needs: "
            f"take {below or factor} or {below + factor}"
        )
    return noise_scheduler, vae_config["latent_channels"], resolution // factor
