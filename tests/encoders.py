"""Feature encoders with random weights, tiny, in the exact layout in which transformers saves the real ones."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def write_clip(folder: Path, tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(4)  # of which images and texts have some cosines above 0
    text = {**SMALL, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_dino(folder: Path) -> None:
    torch.manual_seed(1)
    ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(**IMAGENET).save_pretrained(folder)


def write_dinov2(folder: Path) -> None:
    torch.manual_seed(2)
    sizes = {name: size for name, size in SMALL.items() if name != "intermediate_size"}
    Dinov2Model(Dinov2Config(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(**IMAGENET).save_pretrained(folder)
