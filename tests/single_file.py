"""A model of diffusers' layout as the single file that people download: CompVis' names of its weights."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(model: Path) -> dict[str, Tensor]:
    """The weights of a model's folder under the names that they have in a single file of Stable Diffusion 1.x."""
    text = load_file(model / "text_encoder" / "model.safetensors")
    weights = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text.items()}
    unet = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    layers = json.loads((model / "unet" / "config.json").read_text())["layers_per_block"]
    for name, tensor in unet.items():
        weights[f"model.diffusion_model.{_unet_name(name, layers, set(unet))}"] = tensor
    blocks = len(json.loads((model / "vae" / "config.json").read_text())["block_out_channels"])
    for name, tensor in load_file(model / "vae" / "diffusion_pytorch_model.safetensors").items():
        is_projection = ".attentions." in name and tensor.dim() == 2
        weights[f"first_stage_model.{_vae_name(name, blocks)}"] = tensor[:, :, None, None] if is_projection else tensor
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _unet_name(name: str, layers: int, names: set[str]) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    parts = name.split(".")
    if parts[0] == "mid_block":
        number, rest = int(parts[2]), ".".join(parts[3:])
        return f"middle_block.{2 * number}.{_resnet(rest)}" if parts[1] == "resnets" else f"middle_block.1.{rest}"
    side, first = ("input", 1) if parts[0] == "down_blocks" else ("output", 0)
    block, layer, rest = int(parts[1]), int(parts[3]), ".".join(parts[4:])
    number = first + block * (layers + 1) + layer
    if parts[2] == "resnets":
        return f"{side}_blocks.{number}.0.{_resnet(rest)}"
    if parts[2] == "attentions":
        return f"{side}_blocks.{number}.1.{rest}"
    last = first + block * (layers + 1) + layers
    if side == "input":
        return f"input_blocks.{last}.0.op.{kind}"
    attends = any(other.startswith(f"up_blocks.{block}.attentions") for other in names)
    return f"output_blocks.{last}.{2 if attends else 1}.conv.{kind}"


def _resnet(rest: str) -> str:
    layer, kind = rest.rsplit(".", 1)
    return f"{RESNET[layer]}.{kind}"


def _vae_name(name: str, blocks: int) -> str:
    parts = name.split(".")
    if len(parts) > 2 and parts[1] in ("down_blocks", "up_blocks"):
        down = parts[1] == "down_blocks"
        number = int(parts[2]) if down else blocks - 1 - int(parts[2])
        where = f"{parts[0]}.{'down' if down else 'up'}.{number}"
        rest = ".".join(parts[5:])
        sample = f"{'down' if down else 'up'}sample.conv.{parts[-1]}"
        name = f"{where}.block.{parts[4]}.{rest}" if parts[3] == "resnets" else f"{where}.{sample}"
    elif len(parts) > 2 and parts[1] == "mid_block":
        rest = ".".join(parts[4:])
        name = f"{parts[0]}.mid.block_{int(parts[3]) + 1}.{rest}"
        if parts[2] == "attentions":
            name = f"{parts[0]}.mid.attn_1.{VAE_ATTENTION[rest.rsplit('.', 1)[0]]}.{parts[-1]}"
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
