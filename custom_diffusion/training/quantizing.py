"""The frozen UNet in 8 or 4 bits (``--quantize_base``), by the backends that diffusers has for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel

from custom_diffusion.models.base_model import BaseModel

# The cross-attention, whose projections are trained or changed. Convolutions are left as they are by both backends.
KEPT = "attn2"


def quantization(kind: str, dtype: torch.dtype) -> Any:
    """What diffusers' ``from_pretrained`` takes as ``quantization_config``.

    Args:
        kind: ``8bit``, whole numbers with a scale for each output (torchao); or ``4bit``, NF4 of Dettmers et al. 2023,
            section 3 (bitsandbytes).
        dtype: to compute in.
    """
    if kind == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[KEPT])
    return diffusers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[KEPT],
    )


def load_unet(base_model: BaseModel, kind: str | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet, frozen, with its cross-attention in full precision.

    Args:
        kind: see :func:`quantization`; None for the whole UNet in full precision.
        dtype: that the frozen part will compute in.

    Raises:
        UserError: where it cannot be loaded.
    """
    if kind is None:
        return base_model.unet()
    with _only_errors():
        unet = base_model.unet(dtype, quantization_config=quantization(kind, dtype))
    if dtype != torch.float32:
        # What is trained starts from the weights themselves, not from rounded ones.
        names = [name for name, _ in unet.named_parameters() if f".{KEPT}." in name]
        for name, weight in base_model.unet_parameters(names).items():
            parameter = unet.get_parameter(name)
            parameter.data = weight.to(parameter.device)
    return unet


@contextmanager
def _only_errors() -> Iterator[None]:
    """Within, diffusers does not warn that it tries 8 bits in bf16 alone; a test tries them in fp32."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
