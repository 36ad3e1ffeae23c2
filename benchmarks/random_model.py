"""Stable Diffusion models with random weights: the exact layout and CLIP's real vocabulary, at several sizes.

They learn nothing that one would want to look at, but every command runs on them as on the real ones, at the cost of
the real ones. From the command line: ``python -m benchmarks.random_model sd14 /tmp/sd14``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.base.tokenizer import clip_merges, write_tokenizer
from tools.base.train_unet import new_scheduler


@dataclass(frozen=True)
class Shape:
    """Sizes in which the models differ; see the configuration files of the models they are named after."""

    text: dict[str, Any]
    unet: dict[str, Any]
    vae_channels: tuple[int, ...]
    prediction_type: str = "epsilon"


SHAPES = {
    "tiny": Shape(
        text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        unet={"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "attention_head_dim": 2},
        vae_channels=(8, 8, 8, 8),
    ),
    # Stable Diffusion 2.x in small: linear projections, head sizes per block, velocity.
    "tiny-v": Shape(
        text={"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        unet={
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "attention_head_dim": (1, 2),
            "use_linear_projection": True,
        },
        vae_channels=(8, 8, 8, 8),
        prediction_type="v_prediction",
    ),
    "sd14": Shape(
        text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        unet={"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8},
        vae_channels=(128, 256, 512, 512),
    ),
    "sd21": Shape(
        text={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
        unet={
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        vae_channels=(128, 256, 512, 512),
        prediction_type="v_prediction",
    ),
}


def build_random_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the model ``name`` of :data:`SHAPES` into ``folder``, in diffusers' layout; gives the folder."""
    shape = SHAPES[name]
    torch.manual_seed(seed)
    blocks = len(shape.unet["block_out_channels"])
    text_encoder = CLIPTextModel(
        CLIPTextConfig(**shape.text, vocab_size=49408, projection_dim=shape.text["hidden_size"], bos_token_id=49406,
                       eos_token_id=49407, pad_token_id=49407)
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64 if name.startswith("sd") else 8,
        cross_attention_dim=shape.text["hidden_size"],
        down_block_types=("CrossAttnDownBlock2D",) * (blocks - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (blocks - 1),
        **shape.unet,
    )
    levels = len(shape.vae_channels)
    vae = AutoencoderKL(
        block_out_channels=shape.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2 if name.startswith("sd") else 1,
        latent_channels=4,
        norm_num_groups=min(32, *shape.vae_channels),
        sample_size=512,
    )
    scheduler = new_scheduler(shape.prediction_type)
    write_tokenizer(folder / "tokenizer", clip_merges())
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    # What Stable Diffusion's own repositories hold is older than what save_pretrained writes today: vocab.json and
    # merges.txt rather than tokenizer.json, and a prefix before the text encoder's weights.
    write_tokenizer(folder / "tokenizer", clip_merges())
    path = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a Stable Diffusion model with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(build_random_model(arguments.shape, arguments.folder))
