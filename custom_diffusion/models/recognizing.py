"""What is at the path of a base model, where it is no folder in diffusers' layout, or lacks something."""

from __future__ import annotations

import json
import re
import shlex
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

SINGLE_FILES = (".safetensors", ".ckpt")
LFS_POINTER = b"version https://git-lfs"

# Parts of the names of weights, the first that fits, and what a file with them is.
CONTENTS = (
    ("custom_diffusion", "a learned concept"),
    (r"lora_|\.lora|lora\.", "a LoRA"),
    (r"^(emb_params|string_to_param|clip_[lg]|<.*>)$", "a textual inversion"),
    (r"control_model|controlnet_cond_embedding|zero_convs", "a ControlNet"),
    (r"double_blocks|single_transformer_blocks", "a Flux model"),
    (r"joint_blocks|joint_transformer_blocks", "a Stable Diffusion 3 model"),
)
FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
OPEN_CLIP = "cond_stage_model.model."
# What Stability's code calls the text encoders of XL, of which the refiner has only one.
XL_TEXT, XL_SECOND = "conditioner.embedders.", "conditioner.embedders.1."
# What a UNet's further input channels are for.
PURPOSES = {
    5: "draws from a depth map",
    7: "enlarges images",
    8: "edits images, as InstructPix2Pix does",
    9: "fills in parts of images (inpainting)",
}
TEXT_ALONE = "take the model that it was made from, which draws from text alone"
DISTILLED = "it is distilled to a few steps: take the model that it was distilled from"


# --- single files --------------------------------------------------------------------------------


def describe_file(path: Path) -> str:
    """What a file is, judged by the names and shapes of its weights; none of them is read."""
    if path.suffix.lower() not in SINGLE_FILES:
        return f"{str(path)!r} is a file: give the folder of a model, in diffusers' layout"
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return f"{str(path)!r} is only a pointer to the real file: fetch that with `git lfs pull`"
    shapes = _shapes(path)
    if shapes is None:
        return f"{str(path)!r} is damaged, was not downloaded whole, or holds more than tensors"
    kind = next((kind for pattern, kind in CONTENTS if any(re.search(pattern, name) for name in shapes)), None)
    if kind is not None:
        return f"{str(path)!r} is {kind}, not a base model of Stable Diffusion"

    def has(part: str) -> bool:
        return any(name.startswith(part) for name in shapes)

    if has(XL_TEXT) and not has(XL_SECOND):
        return f"{str(path)!r} is a checkpoint of Stable Diffusion XL's refiner: take the base model that it is for"
    if not (has("first_stage_model.") and (has("cond_stage_model.") or has(XL_TEXT)) and FIRST_CONVOLUTION in shapes):
        return f"{str(path)!r} is not a whole model: it lacks the UNet, the VAE or the text encoder"
    channels = shapes[FIRST_CONVOLUTION][1]
    if channels != 4:
        return f"{str(path)!r} is a checkpoint that {PURPOSES.get(channels, 'needs more than text')}: {TEXT_ALONE}"
    version = "XL" if has(XL_TEXT) else "2.x" if has(OPEN_CLIP) else "1.x"
    pipeline = f"StableDiffusion{'XL' if version == 'XL' else ''}Pipeline"
    return (
        f"{str(path)!r} is a single-file checkpoint of Stable Diffusion {version}; make a folder of it, and give that: "
        f"{conversion(path, pipeline)} (it fetches the configuration from the Hub; offline, add "
        f'config="any folder of Stable Diffusion {version}" behind the name of the file)'
    )


def conversion(path: Path, pipeline: str) -> str:
    """The command that makes a folder in diffusers' layout of a single-file checkpoint.

    Args:
        pipeline: the name of diffusers' class for it.
    """
    folder = path.with_suffix("") if not path.with_suffix("").exists() else path.with_name(f"{path.stem}-diffusers")
    code = (
        f"from diffusers import {pipeline}; "
        f"{pipeline}.from_single_file({json.dumps(str(path))}).save_pretrained({json.dumps(str(folder))})"
    )
    return f"python -c {shlex.quote(code)}"


def _shapes(path: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a file's weights by name; None where they cannot be read."""
    try:
        if path.suffix.lower() == ".safetensors":
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > path.stat().st_size:
                    return None
                header = json.loads(file.read(length))
            return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        content = torch.load(path, map_location="meta", weights_only=True)
        content = content.get("state_dict", content)
        return {name: tuple(value.shape) for name, value in content.items() if isinstance(value, torch.Tensor)}
    except Exception:  # of pickle, zip, struct, json and torch: whatever it is, the file cannot be used
        return None


# --- folders -------------------------------------------------------------------------------------


def describe_folder(folder: Path) -> str:
    """What a folder without ``model_index.json`` is; "" where nothing is recognized."""
    names = sorted(path.name for path in folder.iterdir())
    name = repr(str(folder))
    nested = sorted(folder.glob("*/model_index.json")) or sorted(folder.glob("snapshots/*/model_index.json"))
    if nested:
        return f"{name} has no model_index.json; its folder {str(nested[0].parent)!r} is a model"
    if any("custom_diffusion_weights" in one for one in names):
        return f"{name} is a learned concept (infer.py --model_dir): give the model that it was trained on"
    if any(one.startswith(("pytorch_lora_weights.", "adapter_config.")) for one in names):
        return f"{name} is a LoRA: give the model that it was made for"
    if any(one.startswith("learned_embeds") for one in names):
        return f"{name} is a textual inversion: give the model that it was made for"
    config = read_json(folder / "config.json")
    kind = config.get("_class_name") or config.get("model_type")
    if kind is not None:
        whole = ""
        if (folder.parent / "model_index.json").is_file():
            whole = f": it belongs to the model {str(folder.parent)!r}"
        return f"{name} is a {kind}, not a whole model{whole}"
    if "modular_model_index.json" in names:
        return f"{name} is a modular pipeline: give a model that has a model_index.json"
    files = [folder / one for one in names if Path(one).suffix.lower() in SINGLE_FILES]
    return describe_file(files[0]) if files else ""


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file's object; nothing where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def missing_weights(folder: Path, parts: Iterable[str], variant: str | None) -> str:
    """Which part of a model's folder lacks its weights, and what is there instead; "" where all are there.

    Args:
        parts: folders in it, such as ``unet``.
        variant: of the files, such as fp16.
    """
    for part in parts:
        files = [path for path in (folder / part).iterdir() if path.suffix in (".safetensors", ".bin")]
        variants = {path: _variant(path.name) for path in files}
        fitting = [path for path, its in variants.items() if its == variant]
        others = sorted({its for its in variants.values() if its is not None})
        if not fitting:
            wanted = f"no weights of the variant {variant!r}" if variant else "no weights"
            there = "those that are there are of "
            if variant and None in variants.values():
                advice = f"; {there}no variant: leave --variant out"
            else:
                advice = f"; {there}--variant={others[0]}" if others else ""
            return f"{str(folder / part)!r} has {wanted} (.safetensors or .bin){advice}"
        for path in fitting:
            problem = _damage(path)
            if problem:
                return f"{str(path)!r} {problem}"
    return ""


def _variant(name: str) -> str | None:
    """The variant that a file of weights is of: fp16 of ``model.fp16.safetensors``, also of a shard of it."""
    middle = name.split(".")[1:-1]
    words = [word for word in middle if not re.fullmatch(r"\d+-of-\d+", word)]
    stem = re.sub(r"-\d+-of-\d+$", "", words[0]) if words else ""
    return stem or None


def _damage(path: Path) -> str:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "is only a pointer to the real file: fetch that with `git lfs pull`"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return "is damaged, or was not downloaded whole: fetch it again"
    return ""


# --- parts ---------------------------------------------------------------------------------------


def vae_problem(vae: Mapping[str, Any]) -> str:
    """Why a VAE does not encode images, judged by its configuration; "" where it does."""
    if vae.get("in_channels", 3) != 3:
        return f"its VAE takes {vae['in_channels']} channels in place of red, green and blue"
    return ""


def text_encoder_problem(text_encoder: Mapping[str, Any], name: str) -> str:
    """Why a text encoder is not CLIP's, judged by its configuration; "" where it is.

    Args:
        name: what to call it.
    """
    kind = text_encoder.get("model_type", "clip_text_model")
    return "" if kind in ("clip_text_model", "clip") else f"its {name} is a {kind} model in place of CLIP's"


def unet_problem(unet: Mapping[str, Any], latent_channels: int, addition_embed_type: str | None = None) -> str:
    """Why a UNet does not draw from text alone, judged by its configuration; "" where it does.

    Args:
        addition_embed_type: what its family's UNets have in their configuration under this name.
    """
    channels = unet.get("in_channels", 4)
    if channels != latent_channels:
        purpose = PURPOSES.get(channels, "needs more than text")
        return f"its UNet takes {channels} channels in place of {latent_channels} and {purpose}: {TEXT_ALONE}"
    if unet.get("out_channels", 4) != latent_channels:
        return f"its UNet predicts {unet['out_channels']} channels in place of {latent_channels}"
    if unet.get("time_cond_proj_dim") is not None:
        return DISTILLED
    expected = {"addition_embed_type": addition_embed_type}
    for name in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"):
        if unet.get(name) != expected.get(name):
            return f"its UNet needs more than text ({name}={unet.get(name)!r}): {TEXT_ALONE}"
    if unet.get("attention_type", "default") != "default":
        return f"its UNet needs more than text (attention_type={unet['attention_type']!r}): {TEXT_ALONE}"
    return ""
