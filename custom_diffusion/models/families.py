"""The seam between model families: all that Stable Diffusion's descendants do not have in common.

The rest of the code is blind to families. It knows text encoders by the names that diffusers gives them
(``text_encoder``), a prompt as a dictionary of token ids per text encoder, what the UNet is told of it as a dictionary
of tensors (the conditioning), and a modifier token as one vector per text encoder. A new family is a class here, named
in :data:`FAMILIES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from custom_diffusion.errors import UserError
from custom_diffusion.models.recognizing import unet_problem

# Text encoders by name.
TextEncoders = Mapping[str, Any] | nn.ModuleDict
# What the UNet is told of captions, by name; the first dimension of every tensor counts the captions.
Conditioning = dict[str, Tensor]


@dataclass(frozen=True)
class TextEncoder:
    """One of a family's text encoders.

    Attributes:
        name: its folder in a base model, and its attribute of a pipeline.
        tokenizer: the same of its tokenizer.
        kind: what loads it.
        token_key: the key of a modifier token's vector in the token's file; None where that is the token itself.
    """

    name: str
    tokenizer: str
    kind: type[Any]
    token_key: str | None = None


class Family(ABC):
    """A family of base models.

    Attributes:
        name: for messages.
        text_encoders: in the order in which diffusers' pipeline encodes with them.
        pipeline_class: draws images with its models, whatever other pipeline they were saved from.
        resolution: side of the images in pixels that its models are made for.
    """

    name: str
    text_encoders: tuple[TextEncoder, ...]
    pipeline_class: type[DiffusionPipeline]
    resolution: int = 512

    @abstractmethod
    def fits(self, components: Collection[str]) -> bool:
        """Whether a model with these components (``unet``, ``text_encoder``, ...) is of this family."""

    @abstractmethod
    def problem(self, index: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
        """Why a model that fits cannot be trained and then drawn with; "" where it can.

        Args:
            index: its ``model_index.json``.
            parts: the configurations of its parts, by name.
        """

    def tokenize(self, tokenizers: Mapping[str, CLIPTokenizer], prompt: str) -> dict[str, Tensor]:
        """The ids of a prompt per text encoder, cut and padded to (model_max_length,)."""
        return {
            name: tokenizer(
                prompt,
                truncation=True,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids[0]
            for name, tokenizer in tokenizers.items()
        }

    @abstractmethod
    def encode(self, text_encoders: TextEncoders, input_ids: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning of N captions.

        Args:
            input_ids: per text encoder, (N, length).
        """

    @abstractmethod
    def predict(
        self, unet: Callable[..., Any], noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """What the UNet (or its compiled forward pass) predicts: (N, C, H, W), like the noisy latents."""

    def vae_dtype(self, config: Mapping[str, Any], compute_type: torch.dtype) -> torch.dtype:
        """The type that the VAE works in, given its configuration and the type of the other frozen parts."""
        return compute_type

    @abstractmethod
    def pipeline(
        self,
        vae: nn.Module,
        unet: nn.Module,
        scheduler: Any,
        text_encoders: TextEncoders,
        tokenizers: Mapping[str, CLIPTokenizer],
    ) -> DiffusionPipeline:
        """A pipeline of models that are in memory already."""


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder, whose last hidden state is all that the UNet is told."""

    name = "Stable Diffusion 1.x and 2.x"
    text_encoders = (TextEncoder("text_encoder", "tokenizer", CLIPTextModel),)
    pipeline_class = StableDiffusionPipeline

    def fits(self, components: Collection[str]) -> bool:
        """See :class:`Family`."""
        return "unet" in components and "text_encoder_2" not in components

    def problem(self, index: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
        """See :class:`Family`."""
        if "Consistency" in str(index.get("_class_name")):
            return "it is distilled to a few steps: take the model that it was distilled from"
        unet, text_encoder, vae = (parts.get(name, {}) for name in ("unet", "text_encoder", "vae"))
        if vae.get("in_channels", 3) != 3:
            return f"its VAE takes {vae['in_channels']} channels in place of red, green and blue"
        kind = text_encoder.get("model_type", "clip_text_model")
        if kind not in ("clip_text_model", "clip"):
            return f"its text encoder is a {kind} model in place of CLIP's"
        width, wanted = text_encoder.get("hidden_size"), unet.get("cross_attention_dim")
        if None not in (width, wanted) and width != wanted:
            return f"its text encoder gives {width} features, and its UNet takes {wanted}"
        return unet_problem(unet, vae.get("latent_channels", 4))

    def encode(self, text_encoders: TextEncoders, input_ids: Mapping[str, Tensor]) -> Conditioning:
        """``features``, (N, length, text width)."""
        return {"features": text_encoders["text_encoder"](input_ids["text_encoder"])[0]}

    def predict(
        self, unet: Callable[..., Any], noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """See :class:`Family`."""
        return unet(noisy_latents, timesteps, conditioning["features"]).sample

    def pipeline(
        self,
        vae: nn.Module,
        unet: nn.Module,
        scheduler: Any,
        text_encoders: TextEncoders,
        tokenizers: Mapping[str, CLIPTokenizer],
    ) -> DiffusionPipeline:
        """See :class:`Family`; without a safety checker."""
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoders["text_encoder"],
            tokenizer=tokenizers["text_encoder"],
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


FAMILIES: tuple[Family, ...] = (StableDiffusion(),)


def family_of(components: Collection[str], model: str) -> Family:
    """The family of a model.

    Args:
        components: the names of its parts, as ``model_index.json`` and diffusers' pipelines have them.
        model: what to call it in messages.

    Raises:
        UserError: for a model of no family that is known here.
    """
    for family in FAMILIES:
        if family.fits(components):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"{model} is of a family that is not supported: {known} can be trained")


def text_models_of(family: Family, pipeline: Any) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """The tokenizers and the text encoders of a pipeline, both by the text encoder's name."""
    tokenizers = {part.name: getattr(pipeline, part.tokenizer) for part in family.text_encoders}
    return tokenizers, {part.name: getattr(pipeline, part.name) for part in family.text_encoders}


def family_with(text_encoders: Collection[str]) -> Family | None:
    """The family that has exactly these text encoders, by name, such as the vectors of a token are for."""
    wanted = set(text_encoders)
    return next((family for family in FAMILIES if {part.name for part in family.text_encoders} == wanted), None)
