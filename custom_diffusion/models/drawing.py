"""Loading a base model to draw with, as infer.py and evaluate.py do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from custom_diffusion.errors import UserError, is_out_of_memory
from custom_diffusion.machine import computes_bf16
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.samplers import load_sampler
from custom_diffusion.text import first_line

Placeable = TypeVar("Placeable", DiffusionPipeline, nn.Module)

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# In channels of the UNet's widest block. Below it a pass has little arithmetic and many operations, which take longer
# in bf16 (benchmarks/README.md: a UNet of 32 channels 1.3 x as long; from 160 channels on it is faster).
WIDE_ENOUGH_FOR_BF16 = 128
# What diffusers' `encode_prompt` gives, in its order; models with one text encoder have the first two.
_ENCODED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def best_device() -> str:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usual_precision(device: str) -> str:
    """The precision of a device where nothing says otherwise: ``fp16`` on a GPU, else ``fp32``."""
    return "fp16" if device.startswith("cuda") else "fp32"


def fast_precision(base_model: BaseModel, device: str) -> str:
    """The precision in which a model draws fastest: ``fp16`` on a GPU, else ``bf16`` or ``fp32``.

    bf16 is for CPUs with instructions for it, and for UNets that are wide enough to gain by it.

    Args:
        device: that it will be put on, such as ``cuda``.

    Raises:
        UserError: where the UNet's configuration cannot be read.
    """
    if device != "cpu" or not computes_bf16():
        return usual_precision(device)
    return "bf16" if max(base_model.unet_configuration()["block_out_channels"]) >= WIDE_ENOUGH_FOR_BF16 else "fp32"


def load_to_draw(
    base_model: BaseModel, scheduler: str, dtype: str | None, device: str, safety_checker: bool = False
) -> DiffusionPipeline:
    """A base model's pipeline with another sampler, on the CPU still.

    Args:
        scheduler: as :func:`samplers.build_sampler` takes it.
        dtype: fp32, fp16 or bf16; if not given, fp16 for a GPU and fp32 for everything else.
        device: that it will be put on.
        safety_checker: load the model's, if it has one.

    Raises:
        UserError: where the model or its scheduler cannot be loaded.
    """
    kind = PRECISIONS[dtype or usual_precision(device)]
    # Without its own scheduler, whose class may need packages that nobody has.
    pipeline = base_model.pipeline(kind, safety_checker=safety_checker, scheduler=None)
    pipeline.scheduler = load_sampler(scheduler, base_model)
    return pipeline


def put_on(part: Placeable, device: str) -> Placeable:
    """A pipeline or a model on the device of ``--device``.

    Raises:
        UserError: where it cannot be used.
    """
    try:
        return part.to(device)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"--device {device!r} cannot be used: {first_line(error)}") from error


def encode_prompts(
    pipeline: Any, prompts: Sequence[str], negative_prompt: str | None = None, guided: bool = True
) -> dict[str, Tensor]:
    """What a pipeline's call wants to know of prompts in place of ``prompt`` and ``negative_prompt``.

    The bits of the features may depend on how many prompts are encoded together.

    Args:
        pipeline: on its device, with its concepts applied.
        negative_prompt: of all prompts; None for none.
        guided: whether the images are drawn with classifier-free guidance; otherwise the negative prompt has no use.

    Returns:
        Arguments of the call by name; the first dimension of each counts the prompts.
    """
    encoded = pipeline.encode_prompt(
        list(prompts),
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
    )
    named = zip(_ENCODED, encoded, strict=False)
    return {name: features for name, features in named if features is not None}
