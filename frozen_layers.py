"""Frozen layers that keep nothing for gradients which nobody asks for.

torch keeps the input of every convolution for the gradient of its weights, frozen or not, and of a gated activation
all factors, one of which is quickly computed again. That is a quarter of what a step on Stable Diffusion's UNet keeps
(benchmarks/README.md). The gradients are the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn


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
        return nn.grad.conv2d_input(ctx.shape, weight, gradient, *ctx.geometry), *(None,) * 6


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
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(x, self.weight, self.bias, *geometry)


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
