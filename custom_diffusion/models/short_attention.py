"""Attention for training on a CPU in bf16, where torch's fused attention is slow backwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

# With more, the weights take too much memory; and of 1024 queries and as many keys, fused attention is about as fast.
MOST_QUERIES, MOST_KEYS = 1024, 640


def is_short(queries: Tensor, keys: Tensor) -> bool:
    """Whether `attend` does better than fused attention, of (..., positions, width) each."""
    few = queries.shape[-2] <= MOST_QUERIES and keys.shape[-2] <= MOST_KEYS
    # Within autocast, matrices are multiplied in its type.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else queries.dtype
    return few and queries.device.type == "cpu" and dtype == torch.bfloat16


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Scaled dot-product attention of (batch, heads, positions, width) each.

    Of few positions in bf16 on a CPU, two matrix products take a half to a ninth of the time of torch's fused
    attention, forwards and backwards (benchmarks/README.md).
    """
    if is_short(query, key):
        return attend_by_products(query, key, value, scale)
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same as two matrix products with a softmax between them."""
    batch_and_heads = query.shape[:2]
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    weights = torch.bmm(query * scale, key.transpose(1, 2)).softmax(dim=-1, dtype=value.dtype)
    return torch.bmm(weights, value).unflatten(0, batch_and_heads)


class ShortAttnProcessor(AttnProcessor2_0):
    """`attend` where it is faster, in the attention layers of transformer blocks; else diffusers' own processor."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: object,
        **more: object,
    ) -> Tensor:
        """(batch, positions, channels), attending to themselves or to features (batch, length, width)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        plain = hidden_states.dim() == 3 and attention_mask is None and not attn.residual_connection
        plain &= not any((attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k))
        if not plain or attn.rescale_output_factor != 1 or not is_short(hidden_states, context):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **more)
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        attended = attend(query, key, value, attn.scale).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](attended))
