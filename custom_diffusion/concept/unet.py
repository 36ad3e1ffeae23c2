"""One projection inside a UNet, whatever LoRAs, fusing and offloading have made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from custom_diffusion.concept import formats
from custom_diffusion.errors import UserError

# Beside a projection's weight or bias, as a buffer: so it moves and changes its type with it, and no state_dict has it.
_ORIGINAL = "{}_without_concept"


def unwrapped(unet: Any) -> Any:
    """The UNet itself, where ``torch.compile`` has wrapped it."""
    return getattr(unet, "_orig_mod", unet)


def lora_is_fused(module: nn.Module) -> bool:
    """Whether a LoRA is added into the weights of what this module wraps (PEFT's layers have ``merged``)."""
    return hasattr(module, "base_layer") and bool(getattr(module, "merged", False))


@dataclass(frozen=True)
class Projection:
    """A weight or bias of a cross-attention layer.

    Attributes:
        attention: the layer.
        wrapper: its projection; a LoRA that was loaded wraps it.
        linear: the projection itself.
        name: ``weight`` or ``bias``.
    """

    attention: nn.Module
    wrapper: nn.Module
    linear: nn.Module
    name: str

    @property
    def parameter(self) -> Tensor:
        """The weight or bias, (out, in) or (out,)."""
        parameter = getattr(self.linear, self.name)
        assert isinstance(parameter, Tensor)
        return parameter

    def check_free(self, may_be_fused: bool = False) -> None:
        """Make sure that what is written here is what the UNet computes with, and can be taken back.

        Args:
            may_be_fused: whether a LoRA may be fused into it, as where nothing is written.

        Raises:
            UserError: where it is not.
        """
        self._check_in_memory(may_be_fused)
        if hasattr(getattr(self.attention, "processor", None), "to_k_custom_diffusion"):
            raise UserError(
                "this pipeline's UNet has the attention processors of load_attn_procs, which put aside its own "
                "weights: load the base model again, and give the concept to apply_concepts alone"
            )
        if not self.parameter.is_floating_point():
            raise UserError(
                f"this pipeline's UNet is quantized (to {self.parameter.dtype}), and a concept needs its weights: "
                "load it without quantization"
            )

    def check_restorable(self) -> None:
        """Make sure that the original can be restored now.

        Raises:
            UserError: where it cannot.
        """
        self._check_in_memory()
        if not hasattr(self.linear, _ORIGINAL.format(self.name)):
            raise UserError("the UNet's projections are not the ones the concept was put into: it is already out")

    def _check_in_memory(self, may_be_fused: bool = False) -> None:
        if self.parameter.is_meta:
            raise UserError(
                "the UNet's weights are offloaded, not in memory: apply and remove concepts before "
                "enable_sequential_cpu_offload(), or after remove_all_hooks()"
            )
        if lora_is_fused(self.wrapper) and not may_be_fused:
            raise UserError(
                "a LoRA is fused into the projections that the concept changes: unfuse_lora() first; "
                "it can be fused again afterwards"
            )

    @torch.no_grad()
    def learn(self, learned: Tensor, scale: float, is_difference: bool) -> None:
        """Go from the original towards what was learned.

        Args:
            learned: of the parameter's shape; with ``is_difference``, less the original.
            scale: 0 keeps the original, 1 takes what was learned, between and beyond blends linearly.
        """
        parameter = self.parameter
        self.linear.register_buffer(_ORIGINAL.format(self.name), parameter.detach().clone(), persistent=False)
        original, learned = parameter.float(), learned.to(parameter.device, torch.float32)
        if is_difference:
            learned = original + learned
        parameter.copy_(torch.lerp(original, learned, scale))
        self._fuse_again()

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the original, where it was left."""
        name = _ORIGINAL.format(self.name)
        if not hasattr(self.linear, name):
            return
        self.parameter.copy_(getattr(self.linear, name))
        delattr(self.linear, name)
        self._fuse_again()

    def _fuse_again(self) -> None:
        """Bring up to date the copy that ``fuse_qkv_projections`` has made of keys and values side by side."""
        fused = getattr(self.attention, "to_kv", None)
        if fused is not None:
            parts = [getattr(self.attention, part) for part in ("to_k", "to_v")]
            for name, parameter in fused.named_parameters():
                parameter.copy_(torch.cat([getattr(getattr(part, "base_layer", part), name) for part in parts]))


def find_projection(unet: nn.Module, key: str) -> Projection:
    """The projection that a key of :attr:`Concept.attention` stands for.

    Raises:
        AttributeError: where the UNet has none.
    """
    path, name = formats.parameter_name(key).rsplit(".", 1)
    wrapper = unet.get_submodule(path)
    # A LoRA that was loaded before wraps the projection; the concept belongs into what it wraps.
    linear = getattr(wrapper, "base_layer", wrapper)
    if getattr(linear, name, None) is None:
        raise AttributeError(f"{path} has no {name}")
    return Projection(unet.get_submodule(path.split(".attn2.")[0] + ".attn2"), wrapper, linear, name)
