"""Loading a base model to draw with, as infer.py and evaluate.py do."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline

from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.samplers import load_sampler
from custom_diffusion.text import first_line

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_device() -> str:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


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
    kind = _TYPES[dtype or ("fp16" if device.startswith("cuda") else "fp32")]
    # Without its own scheduler, whose class may need packages that nobody has.
    pipeline = base_model.pipeline(kind, safety_checker=safety_checker, scheduler=None)
    pipeline.scheduler = load_sampler(scheduler, base_model)
    return pipeline


def put_on(pipeline: DiffusionPipeline, device: str) -> DiffusionPipeline:
    """The pipeline on the device of ``--device``.

    Raises:
        UserError: where it cannot be used.
    """
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device!r} cannot be used: {first_line(error)}") from error
