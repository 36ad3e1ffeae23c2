"""The seam between model families: all that Stable Diffusion's descendants do not have in common.

The rest of the code is blind to families. It knows text encoders by the names that diffusers gives them
(``text_encoder``), a prompt as a dictionary of token ids per text encoder, what the UNet is told of it as a dictionary
of tensors (the conditioning), and a modifier token as one vector per text encoder. A new family is a class here, named
in :data:`FAMILIES`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from custom_diffusion.errors import UserError
from custom_diffusion.models.recognizing import DISTILLED, text_encoder_problem, unet_problem, vae_problem

# How many numbers an image's time ids are.
TIME_IDS = 6

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
        tag: what the Hub calls it.
        resolution: side of the images in pixels that its models are made for.
        reads_time_ids: whether the UNet is told which part of how large an image it sees.
        unchecked: arguments of ``from_pretrained`` that leave out what a pipeline does to images that it has drawn.
        without: what a model is that lacks a part, by the part's name.
    """

    name: str
    text_encoders: tuple[TextEncoder, ...]
    pipeline_class: type[DiffusionPipeline]
    tag: str
    resolution: int = 512
    reads_time_ids: bool = False
    unchecked: Mapping[str, Any] = MappingProxyType({})
    without: Mapping[str, str] = MappingProxyType({})

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
        self,
        unet: Callable[..., Any],
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        time_ids: Tensor | None,
    ) -> Tensor:
        """What the UNet (or its compiled forward pass) predicts: (N, C, H, W), like the noisy latents.

        Args:
            time_ids: which part of how large an image each shows, (N, 6): height and width of the original, top and
                left of the crop, height and width of what is shown. None for a family that is not told.
        """

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
        index: Mapping[str, Any],
    ) -> DiffusionPipeline:
        """A pipeline of models that are in memory already.

        Args:
            index: the base model's ``model_index.json``.
        """

    def kohya_name(self, layer: str, unet: Mapping[str, Any]) -> str:
        """What kohya-ss' scripts call a layer of the UNet, such as ``down_blocks.0.attentions.0...attn2.to_k``.

        Args:
            unet: the UNet's configuration.
        """
        return layer.replace(".", "_")

    @abstractmethod
    def kohya_version(self, text_width: int) -> str:
        """What kohya-ss' LoRA files call the version of a model, judged by the width of its text features."""


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: one text encoder, whose last hidden state is all that the UNet is told."""

    name = "Stable Diffusion 1.x and 2.x"
    text_encoders = (TextEncoder("text_encoder", "tokenizer", CLIPTextModel),)
    pipeline_class = StableDiffusionPipeline
    tag = "stable-diffusion"
    unchecked = MappingProxyType({"safety_checker": None, "requires_safety_checker": False})

    def fits(self, components: Collection[str]) -> bool:
        """See :class:`Family`."""
        return "unet" in components and "text_encoder_2" not in components

    def problem(self, index: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
        """See :class:`Family`."""
        if "Consistency" in str(index.get("_class_name")):
            return DISTILLED
        unet, text_encoder, vae = (parts.get(name, {}) for name in ("unet", "text_encoder", "vae"))
        if problem := vae_problem(vae):
            return problem
        if problem := text_encoder_problem(text_encoder, "text encoder"):
            return problem
        width, wanted = text_encoder.get("hidden_size"), unet.get("cross_attention_dim")
        if None not in (width, wanted) and width != wanted:
            return f"its text encoder gives {width} features, and its UNet takes {wanted}"
        return unet_problem(unet, vae.get("latent_channels", 4))

    def encode(self, text_encoders: TextEncoders, input_ids: Mapping[str, Tensor]) -> Conditioning:
        """``features``, (N, length, text width)."""
        return {"features": text_encoders["text_encoder"](input_ids["text_encoder"])[0]}

    def predict(
        self,
        unet: Callable[..., Any],
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        time_ids: Tensor | None,
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
        index: Mapping[str, Any],
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

    def kohya_version(self, text_width: int) -> str:
        """See :class:`Family`."""
        return {768: "sd_v1", 1024: "sd_v2"}.get(text_width, "unknown")


class StableDiffusionXL(Family):
    """Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952), and what was made from it.

    Two text encoders are read at their last layer but one, side by side. The UNet is also told the pooled features
    of the second, and which part of how large an image it sees.
    """

    name = "Stable Diffusion XL"
    text_encoders = (
        TextEncoder("text_encoder", "tokenizer", CLIPTextModel, "clip_l"),
        TextEncoder("text_encoder_2", "tokenizer_2", CLIPTextModelWithProjection, "clip_g"),
    )
    pipeline_class = StableDiffusionXLPipeline
    tag = "stable-diffusion-xl"
    resolution = 1024
    reads_time_ids = True
    # Nor a watermark, which would be learned with the class images.
    unchecked = MappingProxyType({"add_watermarker": False})
    without = MappingProxyType(
        {"text_encoder": "it is a refiner, which only finishes images: take the base model that it is for"}
    )

    def fits(self, components: Collection[str]) -> bool:
        """See :class:`Family`."""
        return {"unet", "text_encoder_2"} <= set(components)

    def problem(self, index: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
        """See :class:`Family`."""
        unet, vae = parts.get("unet", {}), parts.get("vae", {})
        first, second = (parts.get(part.name, {}) for part in self.text_encoders)
        if "Consistency" in str(index.get("_class_name")):
            return DISTILLED
        for part in self.text_encoders:
            if problem := text_encoder_problem(parts.get(part.name, {}), part.name):
                return problem
        one, other, wanted = first.get("hidden_size"), second.get("hidden_size"), unet.get("cross_attention_dim")
        if one is not None and other is not None and wanted not in (None, one + other):
            return f"its text encoders give {one} + {other} features, and its UNet takes {wanted}"
        problem = vae_problem(vae) or unet_problem(unet, vae.get("latent_channels", 4), "text_time")
        if problem:
            return problem
        told = unet.get("projection_class_embeddings_input_dim")
        pooled, each = second.get("projection_dim"), unet.get("addition_time_embed_dim")
        if told is None or pooled is None or each is None or told == pooled + TIME_IDS * each:
            return ""
        return f"its UNet is told {told} values beside the text, not {pooled} + {TIME_IDS} x {each} as XL's base is"

    def encode(self, text_encoders: TextEncoders, input_ids: Mapping[str, Tensor]) -> Conditioning:
        """``features``, (N, length, sum of both widths), and ``pooled``, (N, projection width)."""
        outputs = [
            text_encoders[part.name](input_ids[part.name], output_hidden_states=True) for part in self.text_encoders
        ]
        features = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"features": features, "pooled": outputs[1].text_embeds}

    def predict(
        self,
        unet: Callable[..., Any],
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        time_ids: Tensor | None,
    ) -> Tensor:
        """See :class:`Family`."""
        told = {"text_embeds": conditioning["pooled"], "time_ids": time_ids}
        return unet(noisy_latents, timesteps, conditioning["features"], added_cond_kwargs=told).sample

    def vae_dtype(self, config: Mapping[str, Any], compute_type: torch.dtype) -> torch.dtype:
        """Float32 for a VAE that says so, as XL's own does, which overflows in fp16."""
        return torch.float32 if config.get("force_upcast", True) else compute_type

    def pipeline(
        self,
        vae: nn.Module,
        unet: nn.Module,
        scheduler: Any,
        text_encoders: TextEncoders,
        tokenizers: Mapping[str, CLIPTokenizer],
        index: Mapping[str, Any],
    ) -> DiffusionPipeline:
        """See :class:`Family`."""
        return StableDiffusionXLPipeline(
            vae=vae,
            unet=unet,
            scheduler=scheduler,
            **{part.name: text_encoders[part.name] for part in self.text_encoders},
            **{part.tokenizer: tokenizers[part.name] for part in self.text_encoders},
            force_zeros_for_empty_prompt=index.get("force_zeros_for_empty_prompt", True),
        )

    def kohya_name(self, layer: str, unet: Mapping[str, Any]) -> str:
        """See :class:`Family`: as in Stability's code, which counts all layers of a side, samplers among them."""
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", layer)
        if match is None:
            return layer.replace("mid_block.attentions.0.", "middle_block.1.").replace(".", "_")
        number = int(match[2]) * (unet["layers_per_block"] + 1) + int(match[3])
        side = f"input_blocks_{number + 1}" if match[1] == "down" else f"output_blocks_{number}"
        return f"{side}_1_{match[4].replace('.', '_')}"

    def kohya_version(self, text_width: int) -> str:
        """See :class:`Family`."""
        return "sdxl_base_v1-0"


FAMILIES: tuple[Family, ...] = (StableDiffusion(), StableDiffusionXL())


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
