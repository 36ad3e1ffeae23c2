"""Cross-attention whose key and value projections (or all of them) are trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from torch import Tensor, nn

from custom_diffusion.machine import release_pages


class CustomDiffusionAttnProcessor(nn.Module):
    """Cross-attention with trainable copies of its projections.

    The copies are float32 whatever the type of the frozen model: at a learning rate of 1e-5 the updates would round
    away in 16 bits. Parameter names are those of diffusers' Custom Diffusion processors, and so are the saved keys.

    Args:
        attention: the layer, in full precision; keys and values are copied from it.
        train_q_out: copy query and output projections too (``--freeze_model crossattn``).
        use_xformers: xFormers' kernel rather than torch's.
    """

    def __init__(self, attention: Attention, train_q_out: bool, use_xformers: bool = False) -> None:
        super().__init__()
        self.train_q_out = train_q_out
        self.use_xformers = use_xformers
        self.to_k_custom_diffusion = _trainable_copy(attention.to_k)
        self.to_v_custom_diffusion = _trainable_copy(attention.to_v)
        if train_q_out:
            self.to_q_custom_diffusion = _trainable_copy(attention.to_q)
            self.to_out_custom_diffusion = nn.ModuleList([_trainable_copy(attention.to_out[0])])

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(batch, pixels, hidden size), attending to text features (batch, length, text width)."""
        batch_size, _, inner_dim = hidden_states.shape
        if attention_mask is not None:
            raise NotImplementedError("Custom Diffusion trains without an attention mask")
        query_projection = self.to_q_custom_diffusion if self.train_q_out else attn.to_q
        out_projection: Any = self.to_out_custom_diffusion[0] if self.train_q_out else attn.to_out[0]
        query = _project(query_projection, hidden_states)
        # The start-of-text token says nothing about the concept, and takes most of the attention: no gradient
        # from it (the authors' code).
        key = _detach_first(_project(self.to_k_custom_diffusion, encoder_hidden_states))
        value = _detach_first(_project(self.to_v_custom_diffusion, encoder_hidden_states))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if self.use_xformers:
            from xformers.ops import memory_efficient_attention

            attended = memory_efficient_attention(query, key, value, scale=attn.scale)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            attended = F.scaled_dot_product_attention(query, key, value, scale=attn.scale).transpose(1, 2)
        return _project(out_projection, attended.reshape(batch_size, -1, inner_dim))


def _trainable_copy(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device=linear.weight.device)
    copy.load_state_dict(linear.state_dict())
    return copy.requires_grad_(True)


def _project(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply a projection in the type of its input, whatever type its weights are kept in."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


def _detach_first(x: Tensor) -> Tensor:
    """(batch, length, channels) without gradient through the first position."""
    return torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1)


def swap_attention_processors(unet: UNet2DConditionModel, train_q_out: bool, use_xformers: bool = False) -> None:
    """Give every cross-attention layer (``attn2``) of the UNet trainable projections; self-attention stays as it is."""
    processors = dict(unet.attn_processors)
    for name in processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            processors[name] = CustomDiffusionAttnProcessor(attention, train_q_out, use_xformers)
            # The copies do their work: the originals would only take memory.
            originals = [attention.to_k, attention.to_v]
            attention.to_k = attention.to_v = None
            if train_q_out:
                originals += [attention.to_q, attention.to_out[0]]
                attention.to_q, attention.to_out[0] = None, nn.Identity()
            for linear in originals:
                release_pages(linear.weight)
        elif use_xformers:
            processors[name] = XFormersAttnProcessor()
    unet.set_attn_processor(processors)
