"""Samplers that depend on how a base model was trained, and not on which sampler it was saved with.

A saved scheduler holds two kinds of settings: how the model was trained (betas, what it predicts), and how one class of
sampler walks. A sampler of another class that is made from all of them takes over the second kind, or where they are
missing its own class's defaults, such as a DDIM that clips latents to -1 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.text import first_line

_CLASSES: dict[str, type[Any]] = {
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}

# How a model was trained; what a file leaves out is as in Stable Diffusion.
_TRAINING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}

# How Stable Diffusion is sampled.
_SAMPLING = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
}


def build_sampler(name: str, saved: Mapping[str, Any], flag: str = "--scheduler") -> Any:
    """A sampler for a base model.

    Args:
        name: ``ddim``, ``dpmsolver++``, ``euler``, ``euler_a`` or ``unipc``.
        saved: the configuration of the base model's scheduler, of any class.
        flag: that asks for it, for messages.

    Raises:
        UserError: for a model that was trained in a way that the sampler does not know.
    """
    training = {key: saved.get(key, default) for key, default in _TRAINING.items()}
    # A model that was trained on pure noise too has to begin there: with the last timestep, which "leading" leaves out.
    spacing = "trailing" if training["rescale_betas_zero_snr"] else "leading"
    try:
        return _CLASSES[name].from_config(training | _SAMPLING | {"timestep_spacing": spacing})
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"the base model cannot be sampled with {flag} {name}: {first_line(error)}") from error


def load_sampler(name: str, base_model: BaseModel, flag: str = "--scheduler") -> Any:
    """The sampler ``name`` for a base model, whatever scheduler that was saved with; ``flag`` asks for it.

    Raises:
        UserError: where the scheduler's configuration cannot be read, or as :func:`build_sampler` does.
    """
    return build_sampler(name, base_model.load(DDIMScheduler.load_config, "scheduler"), flag)
