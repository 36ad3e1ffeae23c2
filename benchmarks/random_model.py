"""Stable Diffusion models with random weights: the exact layout and CLIP's real vocabulary, at several sizes.

They learn nothing that one would want to look at, but every command runs on them as on the real ones, at the cost of
the real ones. From the command line: ``python -m benchmarks.random_model sd14 /tmp/sd14``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

from custom_diffusion.models.families import Family, StableDiffusion, StableDiffusionXL, TextEncoder
from tools.base.tokenizer import clip_merges, write_tokenizer
from tools.base.train_unet import new_scheduler


@dataclass(frozen=True)
class Shape:
    """Sizes in which the models differ; see the configuration files of the models they are named after.

    Attributes:
        texts: a configuration for each text encoder of the family.
        sample_size: side of the latents.
        layers: of each block, in UNet and VAE.
        plain_block: which of the UNet's blocks has no cross-attention: the last in 1.x and 2.x, the first in XL.
        vae: more of the VAE's configuration.
    """

    texts: tuple[dict[str, Any], ...]
    unet: dict[str, Any]
    vae_channels: tuple[int, ...]
    family: Family = field(default_factory=StableDiffusion)
    prediction_type: str = "epsilon"
    sample_size: int = 8
    layers: int = 1
    plain_block: int = -1
    vae: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "tiny": Shape(
        texts=({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},),
        unet={"block_out_channels": (16, 32), "norm_num_groups": 8, "attention_head_dim": 2},
        vae_channels=(8, 8, 8, 8),
    ),
    # Stable Diffusion 2.x in small: linear projections, head sizes per block, velocity.
    "tiny-v": Shape(
        texts=({"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},),
        unet={
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "attention_head_dim": (1, 2),
            "use_linear_projection": True,
        },
        vae_channels=(8, 8, 8, 8),
        prediction_type="v_prediction",
    ),
    # Stable Diffusion XL in small.
    "tiny-xl": Shape(
        texts=(
            {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
            {
                "hidden_size": 48,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "hidden_act": "gelu",
                "projection_dim": 24,
            },
        ),
        unet={
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "attention_head_dim": (1, 2),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        },
        vae_channels=(8, 8, 8, 8),
        family=StableDiffusionXL(),
        layers=2,
        plain_block=0,
        vae={"scaling_factor": 0.13025, "force_upcast": True},
    ),
    "sd14": Shape(
        texts=({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},),
        unet={"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8},
        vae_channels=(128, 256, 512, 512),
        sample_size=64,
        layers=2,
    ),
    "sd21": Shape(
        texts=({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},),
        unet={
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        vae_channels=(128, 256, 512, 512),
        prediction_type="v_prediction",
        sample_size=64,
        layers=2,
    ),
    "sdxl": Shape(
        texts=(
            {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
            {
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 20,
                "hidden_act": "gelu",
                "projection_dim": 1280,
            },
        ),
        unet={
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        vae_channels=(128, 256, 512, 512),
        family=StableDiffusionXL(),
        sample_size=128,
        layers=2,
        plain_block=0,
        vae={"scaling_factor": 0.13025, "force_upcast": True},
    ),
}


def ensure_random_model(name: str, folder: Path) -> None:
    """Have a model in ``folder``: the one that is there, or else the random ``name`` of :data:`SHAPES`."""
    if not (folder / "model_index.json").exists():
        build_random_model(name, folder)


def build_random_model(name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model ``name`` of :data:`SHAPES` into ``folder``, in diffusers' layout; gives the folder."""
    shape = SHAPES[name]
    torch.manual_seed(seed)
    text_encoders = {
        part.name: random_text_encoder(part, text)
        for part, text in zip(shape.family.text_encoders, shape.texts, strict=True)
    }
    unet, vae = random_unet(shape), random_vae(shape)
    tokenizers = {}
    for part in shape.family.text_encoders:
        write_tokenizer(folder / part.tokenizer, clip_merges(), **padding_of(part))
        tokenizers[part.name] = CLIPTokenizer.from_pretrained(folder / part.tokenizer)
    pipeline = shape.family.pipeline(vae, unet, new_scheduler(shape.prediction_type), text_encoders, tokenizers, {})
    for model in (vae, unet, *text_encoders.values()) if dtype != torch.float32 else ():
        model.to(dtype)
    pipeline.save_pretrained(folder)
    # What Stable Diffusion's own repositories hold is older than what save_pretrained writes today: vocab.json and
    # merges.txt rather than tokenizer.json, and a prefix before the text encoders' weights.
    for part in shape.family.text_encoders:
        write_tokenizer(folder / part.tokenizer, clip_merges(), **padding_of(part))
        path = folder / part.name / "model.safetensors"
        weights = {old_name(name): value for name, value in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})
    return folder


def old_name(name: str) -> str:
    """What older versions of transformers called a text encoder's weight."""
    return name if name.startswith("text_") else f"text_model.{name}"


def padding_of(part: TextEncoder) -> dict[str, str]:
    """XL's second tokenizer pads with the vocabulary's first entry, all others with the end of the text."""
    return {"pad_token": "!"} if part.tokenizer == "tokenizer_2" else {}


def random_text_encoder(part: TextEncoder, text: dict[str, Any]) -> PreTrainedModel:
    """A text encoder with CLIP's vocabulary."""
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    if part.token_key is not None:
        # As the configurations of XL have it: transformers then looks for the end by the highest id.
        ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return part.kind(CLIPTextConfig(**{"projection_dim": text["hidden_size"], "vocab_size": 49408} | ids | text))


def random_unet(shape: Shape) -> UNet2DConditionModel:
    """A UNet that reads the text encoders of its shape."""
    down = ["CrossAttnDownBlock2D"] * len(shape.unet["block_out_channels"])
    down[shape.plain_block] = "DownBlock2D"
    return UNet2DConditionModel(
        sample_size=shape.sample_size,
        cross_attention_dim=sum(text["hidden_size"] for text in shape.texts),
        down_block_types=tuple(down),
        up_block_types=tuple(block.replace("Down", "Up") for block in reversed(down)),
        layers_per_block=shape.layers,
        **shape.unet,
    )


def random_vae(shape: Shape) -> AutoencoderKL:
    """A VAE of four latent channels."""
    levels = len(shape.vae_channels)
    return AutoencoderKL(
        block_out_channels=shape.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=shape.layers,
        latent_channels=4,
        norm_num_groups=min(32, *shape.vae_channels),
        sample_size=512,
        **shape.vae,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a Stable Diffusion model with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(build_random_model(arguments.shape, arguments.folder))
