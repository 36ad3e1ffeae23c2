"""Frozen layers that keep nothing for gradients which nobody asks for, and copy no weights.

torch keeps the input of every convolution for the gradient of its weights, frozen or not, and of a gated activation
all factors, one of which is quickly computed again. That is a quarter of what a step on Stable Diffusion's UNet keeps
(benchmarks/README.md), and the gradients are the same to the last bit. Where images have become few pixels, oneDNN
copies a convolution's weights into another layout at every call, which takes longer than to multiply with them.

What else is kept goes with the number of pixels, so that the layers at the widest levels keep most of it. Of these some
are worth computing twice: activations behind normalisations, which take no time, and transformer blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn.grad import conv2d_input


class _Convolution(torch.autograd.Function):
    """A convolution whose weights get no gradient: backwards it needs the weights, and of its input only the shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry = x.shape, geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight, gradient, *ctx.geometry), *(None,) * 6


class _Gate(torch.autograd.Function):
    """The first half of the last dimension times the GELU of the second (GEGLU of Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        values, gate = x.chunk(2, dim=-1)
        return values * F.gelu(gate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        values, gate = x.chunk(2, dim=-1)
        return torch.cat([gradient * F.gelu(gate), torch.ops.aten.gelu_backward(gradient * values, gate)], dim=-1)


class FrozenConv2d(nn.Conv2d):
    """A convolution that does not keep its input, (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Conv2d`."""
        if self._is_small(x):
            return self._product(x)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(x, self.weight, self.bias, *geometry)

    def _is_small(self, x: Tensor) -> bool:
        """Whether the images' patches are a small matrix beside the weights; measured on CPUs alone."""
        pixels = x.numel() // x.shape[1]
        plain = self.groups == 1 and not isinstance(self.padding, str)
        measured = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
        return measured and plain and 4 * pixels <= self.out_channels

    def _product(self, x: Tensor) -> Tensor:
        """The convolution as a product of the weights with the patches; autograd keeps neither input nor patches."""
        # In fp32 there and back: overlapping patches' gradients are added up, which bf16 would round at each.
        assert not isinstance(self.padding, str)
        patches = F.unfold(x.float(), self.kernel_size, self.dilation, self.padding, self.stride).to(x.dtype)
        weight, patches = self.weight.flatten(1), patches.transpose(0, 1).flatten(1)
        products = weight @ patches if self.bias is None else torch.addmm(self.bias[:, None], weight, patches)
        height = (x.shape[2] + 2 * self.padding[0] - self.dilation[0] * (self.kernel_size[0] - 1) - 1) // self.stride[0]
        return products.unflatten(1, (len(x), height + 1, -1)).transpose(0, 1).contiguous()


class FrozenGEGLU(GEGLU):
    """A gate that keeps only what its projection gives, (..., 2 * width)."""

    def forward(self, x: Tensor) -> Tensor:
        """As `GEGLU`."""
        return _Gate.apply(self.proj(x))


def keep_less(model: nn.Module) -> None:
    """Make the convolutions and gates of `model`, which must be frozen, keep less for the backward pass."""
    for layer in model.modules():
        # By its class and not by a new module: names, weights and hooks stay as they are.
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
            layer.__class__ = FrozenConv2d
        elif type(layer) is GEGLU:
            layer.__class__ = FrozenGEGLU


class FrozenGroupNorm(nn.GroupNorm):
    """A normalisation whose result knows how to be computed again from what the normalisation keeps anyway."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.GroupNorm`."""
        normalized: Any = super().forward(x)
        normalized.recompute = partial(super().forward, x)
        return normalized


@torch.no_grad()
def _without_gradients(compute: Callable[[], Tensor]) -> Tensor:
    return compute()


class FrozenSiLU(nn.SiLU):
    """An activation that does not keep what a `FrozenGroupNorm` gives it."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.SiLU`."""
        recompute = getattr(x, "recompute", None)
        if recompute is None:
            return super().forward(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda _: recompute, _without_gradients):
            return super().forward(x)


def recompute_wide_layers(unet: UNet2DConditionModel, latent_size: int, least: int = 2**17) -> bool:
    """Compute again backwards what is kept of many pixels, where that costs little: activations, transformer blocks.

    A transformer block keeps some twenty times its input, and those of every level do about the same arithmetic. In
    Stable Diffusion's shape at 256 px the blocks of the first two levels keep most of all there is
    (benchmarks/README.md).

    Args:
        latent_size: side of the latents of the training images.
        least: how many values of one image, pixels times channels, are many.

    Returns:
        whether there is any transformer block of so many.
    """
    levels = range(len(unet.down_blocks))
    transformers = []
    for level, block in zip([*levels, *reversed(levels)], [*unet.down_blocks, *unet.up_blocks], strict=True):
        pixels = (latent_size >> level) ** 2
        for resnet in block.resnets:
            for norm in (resnet.norm1, resnet.norm2):
                if type(norm) is nn.GroupNorm and pixels * norm.num_channels >= least:
                    norm.__class__ = FrozenGroupNorm
            if type(resnet.nonlinearity) is nn.SiLU:
                resnet.nonlinearity.__class__ = FrozenSiLU
        transformers += [layer for layer in getattr(block, "attentions", ()) if pixels * layer.inner_dim >= least]
    # The backward pass begins with the last one: to compute it twice would save nothing.
    for transformer in transformers[:-1]:
        transformer.enable_gradient_checkpointing()
    return bool(transformers)
