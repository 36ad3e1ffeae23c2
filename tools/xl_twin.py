"""A twin of the small model in Stable Diffusion XL's layout, made without training.

    python -m tools.xl_twin xl-twin

Its images are those of `base/`, so that everything which shows learning there shows it in XL's layout too. The UNet is
the same but for its keys and values, which read two text encoders side by side, and for what it is told beside the
text, which counts for nothing. What both text encoders do is the base's, by three rearrangements:

- XL reads the last layer but one, without the final layer norm. So a layer that adds the norm of its input follows the
  base's layers, and one that nobody reads follows that. Without attention, a layer adds its MLP of a norm, and an MLP
  is linear where its rows come in pairs: `g(x) - g(-x) = x` for the quick GELU.
- The state is twice as wide: the second half is for the norm, which would otherwise mix with what it is the norm of.
  A layer norm over twice as many values, half of them 0 and the others of mean 0, divides by a root of a half less.
- The UNet's keys and values see the state, too, and though nothing comes of it at first, they learn from it. It is
  made smaller, which layer norms do not see, so that it counts for about as much as what the base reads.
- Both encoders give half of what the base's gives, so that a new word acts through either.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from custom_diffusion.models.families import StableDiffusionXL

BASE = Path(__file__).resolve().parent.parent / "base"
POOLED, TIME_WIDTH = 32, 8  # of what the UNet is told beside the text
STATE = 0.4  # how large the text encoders' state is, in parts of the base's


def build_twin(folder: Path, base: Path = BASE) -> Path:
    """Write the twin of a model whose text encoder uses the quick GELU into `folder`; gives the folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    family = StableDiffusionXL()
    encoders = {part.name: wide_text_encoder(pipeline.text_encoder, part.kind) for part in family.text_encoders}
    tokenizers = {}
    for part in family.text_encoders:
        shutil.copytree(base / "tokenizer", folder / part.tokenizer, dirs_exist_ok=True)
        tokenizers[part.name] = CLIPTokenizer.from_pretrained(folder / part.tokenizer)
    pipeline.vae.register_to_config(force_upcast=False)
    # The base is told of an empty prompt what it is told of any other.
    index = {"force_zeros_for_empty_prompt": False}
    twin = family.pipeline(pipeline.vae, xl_unet(pipeline.unet), pipeline.scheduler, encoders, tokenizers, index)
    twin.save_pretrained(folder)
    for part in family.text_encoders:
        # As they were: transformers writes them in another form.
        shutil.rmtree(folder / part.tokenizer)
        shutil.copytree(base / "tokenizer", folder / part.tokenizer)
    return folder


@torch.no_grad()
def wide_text_encoder(narrow: CLIPTextModel, kind: type) -> nn.Module:
    """A text encoder of twice the width, whose last layer but one gives the state of `narrow`, and half of its output.

    Args:
        kind: of which class.
    """
    config = narrow.config
    width, layers = config.hidden_size, config.num_hidden_layers
    changes = {"hidden_size": 2 * width, "num_hidden_layers": layers + 2, "projection_dim": POOLED}
    settings = config.to_dict() | changes | {"layer_norm_eps": config.layer_norm_eps / 2 * STATE**2}
    wide = kind(CLIPTextConfig(**settings))
    for name, parameter in wide.named_parameters():
        # Nothing is told beside the text, whatever the pooled features are.
        parameter.zero_() if "text_projection" not in name else parameter.normal_(std=0.02)
    here, there = narrow.base_model, wide.base_model
    centre = STATE * (torch.eye(width) - 1 / width)
    for name in ("token_embedding", "position_embedding"):
        getattr(there.embeddings, name).weight[:, :width] = getattr(here.embeddings, name).weight @ centre
    for layer, wider in zip(here.encoder.layers, there.encoder.layers, strict=False):
        widen_attention(layer.self_attn, wider.self_attn, centre)
        widen_norm(layer.layer_norm1, wider.layer_norm1)
        widen_norm(layer.layer_norm2, wider.layer_norm2)
        wider.mlp.fc1.weight[:, :width], wider.mlp.fc1.bias[:] = layer.mlp.fc1.weight, layer.mlp.fc1.bias
        wider.mlp.fc2.weight[:width], wider.mlp.fc2.bias[:width] = (
            centre @ layer.mlp.fc2.weight,
            centre @ layer.mlp.fc2.bias,
        )
    norm = there.encoder.layers[layers]
    widen_norm(here.final_layer_norm, norm.layer_norm2)
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    norm.mlp.fc1.weight[: 2 * width, :width] = both
    norm.mlp.fc2.weight[width:, : 2 * width] = both.T / 2
    there.final_layer_norm.weight.fill_(1)
    return wide


def widen_norm(norm: nn.LayerNorm, wider: nn.LayerNorm) -> None:
    """Let `wider` give what `norm` gives of the first half, if the second half is 0."""
    width = len(norm.weight)
    wider.weight[:width], wider.bias[:width] = norm.weight / 2**0.5, norm.bias


def widen_attention(attention: nn.Module, wider: nn.Module, centre: Tensor) -> None:
    """Let `wider`, with heads twice as wide, attend as `attention` does; `centre` makes a state of its output."""
    width = attention.embed_dim
    head = width // attention.num_heads
    # The place of each of a narrow head's values in the head twice as wide.
    places = torch.cat([torch.arange(head) + 2 * head * number for number in range(attention.num_heads)])
    for name in ("q_proj", "k_proj", "v_proj"):
        own, other = getattr(attention, name), getattr(wider, name)
        # Scores are divided by the root of the head's width.
        factor = 2**0.5 if name == "q_proj" else 1.0
        other.weight[places, :width], other.bias[places] = factor * own.weight, factor * own.bias
    rows = centre @ attention.out_proj.weight
    wider.out_proj.weight[:width, places] = rows
    wider.out_proj.bias[:width] = centre @ attention.out_proj.bias


@torch.no_grad()
def xl_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet, reading (state, half of the output) of both text encoders, and told more, which counts for nothing."""
    width = unet.config.cross_attention_dim
    settings = {
        "cross_attention_dim": 4 * width,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_WIDTH,
        "projection_class_embeddings_input_dim": POOLED + 6 * TIME_WIDTH,
    }
    twin = UNet2DConditionModel.from_config({**unet.config, **settings})
    weights = twin.state_dict()
    for name, value in unet.state_dict().items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            nothing = torch.zeros_like(value)
            value = torch.cat([nothing, value, nothing, value], dim=1)
        weights[name] = value
    for name in ("weight", "bias"):
        weights[f"add_embedding.linear_2.{name}"].zero_()
    twin.load_state_dict(weights)
    return twin


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the small model's twin in Stable Diffusion XL's layout.")
    parser.add_argument("folder", type=Path)
    print(build_twin(parser.parse_args().folder))
