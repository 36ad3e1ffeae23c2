"""The base model: where it is, and the parts of it that a command or a training run needs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer, PretrainedConfig, PreTrainedModel

from custom_diffusion.errors import UserError
from custom_diffusion.files import is_hub_id
from custom_diffusion.models.families import Family, TextEncoder, family_of, text_models_of
from custom_diffusion.models.recognizing import SINGLE_FILES, describe_file, describe_folder, missing_weights
from custom_diffusion.models.vocabulary import limit_length, pool_at_the_end
from custom_diffusion.text import first_line

INDEX_NAME = "model_index.json"
SMALL_IMAGES = 256  # pixels; a model of smaller ones would have hardly a shape in steps of 64
FEWEST_ENTRIES = 10  # transformers makes a tokenizer of two of a folder without vocabulary, and says nothing

# Of models that are not trained on what DDPMScheduler adds.
OTHER_SCHEDULERS = re.compile(
    "FlowMatch|^EDM|CMStochastic|ScoreSde|VQDiffusion|KarrasVe|Amused|Wuerstchen|UnCLIP|CogVideo"
)


@dataclass(frozen=True)
class BaseModel:
    """Where a base model is.

    Attributes:
        name: folder or Hub id.
        revision: branch, tag or commit on the Hub.
        variant: of the files, such as fp16.
        tokenizer: folder or Hub id of another tokenizer than the model's own.
        other_vae: folder or Hub id of another VAE than the model's own.
    """

    name: str
    revision: str | None = None
    variant: str | None = None
    tokenizer: str | None = None
    other_vae: str | None = None

    def load(self, loader: Callable[..., Any], subfolder: str | None = None, **options: Any) -> Any:
        """Call a ``from_pretrained`` or ``load_config`` on the model, or on the part of it in ``subfolder``.

        Raises:
            UserError: in one line that names the part, where the libraries' errors are pages.
        """
        is_folder = Path(self.name).is_dir()
        if Path(self.name).is_file():
            raise UserError(f"{describe_file(Path(self.name))} (--pretrained_model_name_or_path)")
        if not is_folder and (not is_hub_id(self.name) or Path(self.name).suffix in SINGLE_FILES):
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

    def index(self) -> dict[str, Any]:
        """The content of ``model_index.json``.

        Raises:
            UserError: where there is none; what is there instead is named.
        """
        folder = Path(self.name)
        if folder.is_dir() and not (folder / INDEX_NAME).is_file():
            found = describe_folder(folder)
            if found:
                raise UserError(f"{found} (--pretrained_model_name_or_path)")
        return dict(self.load(DiffusionPipeline.load_config))

    def family(self) -> Family:
        """The family that the model is of, as its ``model_index.json`` says.

        Raises:
            UserError: where it cannot be read, or is of a family that is not supported.
        """
        index = self.index()
        return family_of(index.keys(), f"{self.name!r}, a {index.get('_class_name')},")

    def pipeline(self, dtype: torch.dtype, safety_checker: bool = True, **options: Any) -> DiffusionPipeline:
        """The whole pipeline.

        Args:
            safety_checker: load the model's, if it has one; for XL, draw its watermark where diffusers would.
            options: go to ``from_pretrained``.
        """
        family = self.family()
        if not safety_checker:
            options = {**family.unchecked, **options}
        if self.other_vae is not None:
            options = {"vae": self.vae(dtype)} | options
        if self.tokenizer is not None:
            tokenizers = self.tokenizers(family)
            options = {part.tokenizer: tokenizers[part.name] for part in family.text_encoders} | options
        pipeline = self.load(family.pipeline_class.from_pretrained, dtype=dtype, variant=self.variant, **options)
        for name, tokenizer in text_models_of(family, pipeline)[0].items():
            limit_length(tokenizer, getattr(pipeline, name).config)
            pool_at_the_end(getattr(pipeline, name), tokenizer)
        return pipeline

    def text_configuration(self, part: TextEncoder) -> dict[str, Any]:
        """The configuration of a text encoder."""

        def load_config(name: str, **options: Any) -> dict[str, Any]:
            config, _ = PretrainedConfig.get_config_dict(name, **options)
            if not config:
                raise OSError("there is no config.json")
            return config

        return dict(self.load(load_config, part.name))

    def tokenizers(self, family: Family, other: str | None = None) -> dict[str, CLIPTokenizer]:
        """The tokenizers by the names of their text encoders, or the ones of another model or folder.

        Raises:
            UserError: where one cannot be loaded, or does not fit its text encoder.
        """
        other = other or self.tokenizer
        tokenizers = {}
        for part in family.text_encoders:
            if other is None:
                tokenizer, whose = self.load(CLIPTokenizer.from_pretrained, part.tokenizer), f"of {self.name!r}"
            else:
                # Several encoders read the same words, but their tokenizers pad differently.
                subfolder = part.tokenizer if len(family.text_encoders) > 1 else ""
                tokenizer = _other_tokenizer(other, self.revision, subfolder)
                whose = f"{other!r} (--tokenizer_name)"
            config = CLIPTextConfig.from_dict(self.text_configuration(part))
            if not FEWEST_ENTRIES <= len(tokenizer) <= config.vocab_size:
                raise UserError(
                    f"the tokenizer {whose} has {len(tokenizer)} entries, and the {part.name} of {self.name!r} "
                    f"has {config.vocab_size}: they do not belong together"
                )
            tokenizers[part.name] = limit_length(tokenizer, config)
        return tokenizers

    def text_encoders(self, family: Family, dtype: torch.dtype = torch.float32) -> dict[str, PreTrainedModel]:
        """The text encoders by name, frozen."""
        return {
            part.name: self.load(
                part.kind.from_pretrained, part.name, variant=self.variant, dtype=dtype
            ).requires_grad_(False)
            for part in family.text_encoders
        }

    def unet_configuration(self) -> dict[str, Any]:
        """The configuration of the UNet."""
        return dict(self.load(UNet2DConditionModel.load_config, "unet"))

    def unet(self, dtype: torch.dtype = torch.float32, **options: Any) -> UNet2DConditionModel:
        """The UNet, frozen; ``options`` go to ``from_pretrained``."""
        unet = self.load(UNet2DConditionModel.from_pretrained, "unet", variant=self.variant, dtype=dtype, **options)
        return unet.requires_grad_(False)

    def vae(self, dtype: torch.dtype, **options: Any) -> AutoencoderKL:
        """The VAE, frozen; ``options`` go to ``from_pretrained``."""
        if self.other_vae is not None:
            vae = _load_other_vae(self.other_vae, AutoencoderKL.from_pretrained, dtype=dtype, **options)
        else:
            vae = self.load(AutoencoderKL.from_pretrained, "vae", variant=self.variant, dtype=dtype, **options)
        return vae.requires_grad_(False)

    def vae_configuration(self) -> dict[str, Any]:
        """The configuration of the VAE."""
        if self.other_vae is not None:
            return dict(_load_other_vae(self.other_vae, AutoencoderKL.load_config))
        return dict(self.load(AutoencoderKL.load_config, "vae"))

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


def _other_tokenizer(name: str, revision: str | None, subfolder: str) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(name, revision=revision or "main", subfolder=subfolder)
    except Exception as error:
        inside = f": it needs the folder {subfolder}" if subfolder else ""
        raise UserError(f"cannot load the tokenizer {name!r} (--tokenizer_name){inside}") from error


def _load_other_vae(name: str, loader: Callable[..., Any], **options: Any) -> Any:
    """Call a ``from_pretrained`` or ``load_config`` on a VAE, or on the VAE of a whole model."""
    if Path(name, "vae").is_dir():
        options["subfolder"] = "vae"
    try:
        return loader(name, **options)
    except Exception as error:  # the libraries raise OSError, ValueError, EntryNotFoundError, KeyError, ...
        reason = first_line(error)
        raise UserError(f"cannot load the VAE {name!r} (--pretrained_vae_model_name_or_path): {reason}") from error


@dataclass(frozen=True)
class ModelConfiguration:
    """What a base model's configuration files, which are small, say of it.

    Attributes:
        base_model: the model.
        family: which family it is of.
        index: its ``model_index.json``.
        noise_scheduler: how its latents are noised, and whether noise or velocity is predicted.
        vae: the VAE's configuration.
        latent_channels: of its latents.
        resolution: side of the training images in pixels.
        latent_size: side of their latents.
        side_multiple: of which both sides of images should be multiples where they are not square, in pixels: 64, or
            for a model of small images what its VAE and UNet need.
    """

    base_model: BaseModel
    family: Family
    index: dict[str, Any]
    noise_scheduler: DDPMScheduler
    vae: dict[str, Any]
    latent_channels: int
    resolution: int
    latent_size: int
    side_multiple: int


def read_configuration(base_model: BaseModel, resolution: int | None) -> ModelConfiguration:
    """Look at a model's configuration files, before any weights are read.

    Args:
        resolution: side of the training images in pixels; None for what the model's family is made for.

    Raises:
        UserError: for a model that is missing, of another family or not whole, or that could not be trained and then
            drawn with; or a resolution that the VAE cannot take.
    """
    family, index, parts = base_model.family(), base_model.index(), {}
    resolution = resolution or family.resolution
    problem = _index_problem(family, index)
    if not problem:
        parts = {"unet": base_model.unet_configuration()}
        parts["vae"] = base_model.vae_configuration()
        parts["scheduler"] = base_model.load(DDPMScheduler.load_config, "scheduler")
        parts |= {part.name: base_model.text_configuration(part) for part in family.text_encoders}
        problem = _class_problem(parts) or family.problem(index, parts)
    if problem:
        raise UserError(f"{base_model.name!r} cannot be trained: {problem}")
    if Path(base_model.name).is_dir():
        weighted = ["unet", *(part.name for part in family.text_encoders)]
        weighted += [] if base_model.other_vae else ["vae"]
        problem = missing_weights(Path(base_model.name), weighted, base_model.variant)
        if problem:
            raise UserError(problem)
    noise_scheduler = base_model.load(DDPMScheduler.from_pretrained, "scheduler")
    if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{base_model.name!r} predicts {noise_scheduler.config.prediction_type!r}, not epsilon or v_prediction"
        )
    vae = parts["vae"]
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    if resolution % factor:
        below = resolution // factor * factor
        raise UserError(
            f"--resolution {resolution} is not a multiple of {factor}, which the VAE needs: "
            f"take {below or factor} or {below + factor}"
        )
    return ModelConfiguration(
        base_model=base_model,
        family=family,
        index=index,
        noise_scheduler=noise_scheduler,
        vae=vae,
        latent_channels=vae["latent_channels"],
        resolution=resolution,
        latent_size=resolution // factor,
        side_multiple=_side_multiple(parts["unet"], factor),
    )


def _side_multiple(unet: Mapping[str, Any], vae_factor: int) -> int:
    needed = vae_factor * 2 ** (len(unet["block_out_channels"]) - 1)
    made_for = unet.get("sample_size") or 64
    longest = max(made_for) if isinstance(made_for, list | tuple) else made_for
    # Stable Diffusion XL's own shapes are multiples of 64 (section 2.3 of its paper).
    return needed if vae_factor * longest < SMALL_IMAGES else math.lcm(64, needed)


def _index_problem(family: Family, index: Mapping[str, Any]) -> str:
    """Which part of a model is missing, or of another class than this family's; "" where all are as they should be."""
    expected = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": None}
    for text_encoder in family.text_encoders:
        expected |= {text_encoder.name: text_encoder.kind.__name__, text_encoder.tokenizer: "CLIPTokenizer"}
    for part, wanted in expected.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, (list, tuple)) and len(entry) == 2 else None
        if found is None:
            return family.without.get(part, f"it has no {part}")
        if wanted is not None and found.removesuffix("Fast") != wanted:
            return f"its {part} is a {found} in place of a {wanted}"
    return ""


def _class_problem(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The same, as the parts' own files say it."""
    for part, wanted in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        found = parts[part].get("_class_name", wanted)
        if found != wanted:
            return f"its {part} is a {found} in place of a {wanted}"
    scheduler = str(parts["scheduler"].get("_class_name"))
    if OTHER_SCHEDULERS.search(scheduler):
        return f"it was trained with another kind of noise than Stable Diffusion's ({scheduler})"
    return ""
