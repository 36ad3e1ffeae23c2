"""The base model: where it is, and the parts of it that a command or a training run needs."""

from __future__ import annotations

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
from custom_diffusion.models.vocabulary import limit_length
from custom_diffusion.text import first_line

INDEX_NAME = "model_index.json"
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

    def pipeline(self, dtype: torch.dtype, **options: Any) -> DiffusionPipeline:
        """The whole pipeline; ``options`` go to ``from_pretrained``."""
        family = self.family()
        if self.tokenizer is not None:
            tokenizers = self.tokenizers(family)
            options = {part.tokenizer: tokenizers[part.name] for part in family.text_encoders} | options
        pipeline = self.load(family.pipeline_class.from_pretrained, dtype=dtype, variant=self.variant, **options)
        for name, tokenizer in text_models_of(family, pipeline)[0].items():
            limit_length(tokenizer, getattr(pipeline, name).config)
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
                tokenizer, whose = _other_tokenizer(other, self.revision), f"{other!r} (--tokenizer_name)"
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


def _other_tokenizer(name: str, revision: str | None) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(name, revision=revision or "main")
    except Exception as error:
        raise UserError(f"cannot load the tokenizer {name!r} (--tokenizer_name)") from error


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
        UserError: for a model that is missing, of another family or not whole, or that could not be trained and then
            drawn with; or a resolution that the VAE cannot take.
    """
    family, parts = base_model.family(), {}
    problem = _index_problem(family, base_model.index())
    if not problem:
        parts = {"unet": base_model.load(UNet2DConditionModel.load_config, "unet")}
        parts["vae"] = base_model.load(AutoencoderKL.load_config, "vae")
        parts["scheduler"] = base_model.load(DDPMScheduler.load_config, "scheduler")
        parts |= {part.name: base_model.text_configuration(part) for part in family.text_encoders}
        problem = _class_problem(parts) or family.problem(base_model.index(), parts)
    if problem:
        raise UserError(f"{base_model.name!r} cannot be trained: {problem}")
    if Path(base_model.name).is_dir():
        weighted = ["unet", "vae", *(part.name for part in family.text_encoders)]
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
            f"--resolution {resolution} is no multiple of {factor}, which the VAE needs: "
            f"take {below or factor} or {below + factor}"
        )
    return ModelConfiguration(base_model, family, noise_scheduler, vae, vae["latent_channels"], resolution // factor)


def _index_problem(family: Family, index: Mapping[str, Any]) -> str:
    """Which part of a model is missing, or of another class than this family's; "" where all are as they should be."""
    expected = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": None}
    for text_encoder in family.text_encoders:
        expected |= {text_encoder.name: text_encoder.kind.__name__, text_encoder.tokenizer: "CLIPTokenizer"}
    for part, wanted in expected.items():
        entry = index.get(part)
        found = entry[1] if isinstance(entry, (list, tuple)) and len(entry) == 2 else None
        if found is None:
            return f"it has no {part}"
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
