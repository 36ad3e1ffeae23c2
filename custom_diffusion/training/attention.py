"""Cross-attention whose key and value projections (or all of them) are trained, whole or as a change of low rank."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from torch import Tensor, nn

from custom_diffusion.concept.formats import key_of_parameter
from custom_diffusion.concept.low_rank import LowRank
from custom_diffusion.errors import UserError
from custom_diffusion.machine import release_pages
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.short_attention import ShortAttnProcessor, attend


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
        query = self.project(attn, "to_q", hidden_states)
        # The start-of-text token says nothing about the concept, and takes most of the attention: no gradient
        # from it (the authors' code).
        key = _detach_first(self.project(attn, "to_k", encoder_hidden_states))
        value = _detach_first(self.project(attn, "to_v", encoder_hidden_states))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if self.use_xformers:
            from xformers.ops import memory_efficient_attention

            attended = memory_efficient_attention(query, key, value, scale=attn.scale)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            attended = attend(query, key, value, attn.scale).transpose(1, 2)
        return self.project(attn, "to_out", attended.reshape(batch_size, -1, inner_dim))

    def project(self, attn: Attention, name: str, x: Tensor) -> Tensor:
        """Apply a projection, trained or not, in the type of x: (batch, length, in) to (batch, length, out)."""
        return _project(_part(self, name, "_custom_diffusion") or _part(attn, name), x)

    def learned(self, name: str) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
        """Attention and differences of a :class:`Concept`; the very tensors.

        Args:
            name: of this processor in the UNet.
        """
        return {f"{name}.{key}": value for key, value in self.state_dict().items()}, {}


class LowRankAttnProcessor(CustomDiffusionAttnProcessor):
    """Cross-attention whose projections stay frozen, each with a trainable change of low rank beside it.

    The factors are float32, as the copies above are. The biases of output projections stay as they are, so that all
    that is learned is a LoRA.

    Args:
        attention: the layer.
        train_q_out: change query and output projections too (``--freeze_model crossattn``).
        use_xformers: xFormers' kernel rather than torch's.
        rank, alpha: of the changes.
        generator: gives the values that the changes start from.
    """

    def __init__(
        self,
        attention: Attention,
        train_q_out: bool,
        use_xformers: bool,
        rank: int,
        alpha: float,
        generator: torch.Generator,
    ) -> None:
        nn.Module.__init__(self)
        self.train_q_out = train_q_out
        self.use_xformers = use_xformers
        self.alpha = alpha
        self.to_k_low_rank = LowRankChange(attention.to_k, rank, alpha, generator)
        self.to_v_low_rank = LowRankChange(attention.to_v, rank, alpha, generator)
        if train_q_out:
            self.to_q_low_rank = LowRankChange(attention.to_q, rank, alpha, generator)
            self.to_out_low_rank = nn.ModuleList([LowRankChange(attention.to_out[0], rank, alpha, generator)])

    def project(self, attn: Attention, name: str, x: Tensor) -> Tensor:
        """See :class:`CustomDiffusionAttnProcessor`."""
        change, projected = _part(self, name, "_low_rank"), _project(_part(attn, name), x)
        return projected if change is None else projected + change(x)

    def learned(self, name: str) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
        """See :class:`CustomDiffusionAttnProcessor`."""
        layer, differences = name.removesuffix(".processor"), {}
        for projection in ("to_k", "to_v", "to_q", "to_out"):
            change = _part(self, projection, "_low_rank")
            if change is not None:
                place = "0.weight" if projection == "to_out" else "weight"
                key = key_of_parameter(f"{layer}.{projection}.{place}")
                differences[key] = LowRank(change.up.weight.detach(), change.down.weight.detach(), self.alpha)
        return {}, differences


class GatedAttnProcessor(CustomDiffusionAttnProcessor):
    """Cross-attention with frozen projections, and for each concept a trainable change of its keys and values.

    Each change acts at the positions of its concept's words alone (:mod:`concept.gating`). Which these are stands in
    channels behind the text features, one for each concept: 1 where it acts, and 0 elsewhere. So it takes the way of
    the features through caches, batches, processes and checkpointing.

    Args:
        attention: the layer.
        concepts: how many there are.
        use_xformers: xFormers' kernel rather than torch's.
        rank, alpha: of the changes; whole matrices without a rank.
        generator: gives the values that changes of low rank start from.
    """

    def __init__(
        self,
        attention: Attention,
        concepts: int,
        use_xformers: bool,
        rank: int | None,
        alpha: float | None,
        generator: torch.Generator,
    ) -> None:
        nn.Module.__init__(self)
        self.train_q_out = False
        self.use_xformers = use_xformers
        self.alpha = float(rank or 0) if alpha is None else alpha
        for name in ("to_k", "to_v"):
            linear = getattr(attention, name)
            changes = [
                _zero_change(linear) if rank is None else LowRankChange(linear, rank, self.alpha, generator)
                for _ in range(concepts)
            ]
            self.add_module(f"{name}_gated", nn.ModuleList(changes))

    def project(self, attn: Attention, name: str, x: Tensor) -> Tensor:
        """See :class:`CustomDiffusionAttnProcessor`; keys and values are of text features with a gate behind them."""
        linear = _part(attn, name)
        if name not in ("to_k", "to_v"):
            return _project(linear, x)
        features, gate = x.split([linear.in_features, x.shape[-1] - linear.in_features], dim=-1)
        projected = _project(linear, features)
        for number, change in enumerate(getattr(self, f"{name}_gated")):
            learned = change(features) if isinstance(change, LowRankChange) else _project(change, features)
            projected = projected + gate[..., number : number + 1] * learned
        return projected

    def gated(self, name: str, number: int) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
        """Changes and factors of :class:`concept.gating.GatedWeights` for one concept; the very tensors.

        Args:
            name: of this processor in the UNet.
            number: of the concept.
        """
        changes, factors, layer = {}, {}, name.removesuffix(".processor")
        for projection in ("to_k", "to_v"):
            key = key_of_parameter(f"{layer}.{projection}.weight")
            change = getattr(self, f"{projection}_gated")[number]
            if isinstance(change, LowRankChange):
                factors[key] = LowRank(change.up.weight.detach(), change.down.weight.detach(), self.alpha)
            else:
                changes[key] = change.weight.detach()
        return changes, factors

    def learned(self, name: str) -> tuple[dict[str, Tensor], dict[str, LowRank]]:
        """Nothing that acts everywhere; see :meth:`gated`."""
        return {}, {}


class LowRankChange(nn.Module):
    """``alpha / rank * up @ down``, added to what a frozen projection gives (LoRA, Hu et al. 2021, section 4.1).

    ``up`` is zero at the start, so that the first step sees the base model.

    Args:
        linear: the projection.
        rank: columns of ``up``.
        alpha: see above.
        generator: gives the values of ``down``, spread as those of a new linear layer.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        device = linear.weight.device
        self.scale = alpha / rank
        self.down = nn.Linear(linear.in_features, rank, bias=False, device=device)
        self.up = nn.Linear(rank, linear.out_features, bias=False, device=device)
        # On the CPU, where the generator is: the same values on every device.
        start = nn.init.kaiming_uniform_(torch.empty(rank, linear.in_features), a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.down.weight.copy_(start)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the type of x."""
        return _project(self.up, _project(self.down, x)) * self.scale


def _part(owner: nn.Module, name: str, ending: str = "") -> Any:
    """A projection, or what is beside it; None where there is none. That of an output stands in a list."""
    part: Any = getattr(owner, name + ending, None)
    return part[0] if name == "to_out" and part is not None else part


def _trainable_copy(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device=linear.weight.device)
    copy.load_state_dict(linear.state_dict())
    return copy.requires_grad_(True)


def _zero_change(linear: nn.Linear) -> nn.Linear:
    change = nn.Linear(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
    nn.init.zeros_(change.weight)
    return change


def _project(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply a projection in the type of its input, whatever type its weights are kept in."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


def _detach_first(x: Tensor) -> Tensor:
    """(batch, length, channels) without gradient through the first position."""
    return torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1)


def check_rank(rank: int | None, base_model: BaseModel) -> None:
    """Make sure that a rank is below that of the projections, before any weights are read.

    Raises:
        UserError: where it is not.
    """
    if rank is None:
        return
    config = base_model.unet_configuration()
    width = config.get("cross_attention_dim")
    least = min(*config["block_out_channels"], *([width] if isinstance(width, int) else []))
    if rank >= least:
        raise UserError(
            f"--rank {rank} is no less than the {least} that the smallest projections of {base_model.name!r} may have: "
            "give a smaller one, or leave it out to train whole projections"
        )


def train_attention(unet: UNet2DConditionModel, args: argparse.Namespace, gated: int = 0) -> None:
    """Make the cross-attention trainable as the command line says.

    Args:
        gated: how many concepts get weights that act at their own words alone; 0 for weights that act everywhere.
    """
    use_xformers = args.enable_xformers_memory_efficient_attention
    train_q_out = args.freeze_model == "crossattn"
    swap_attention_processors(unet, train_q_out, use_xformers, args.rank, args.rank_alpha, args.seed, gated)


def swap_attention_processors(
    unet: UNet2DConditionModel,
    train_q_out: bool,
    use_xformers: bool = False,
    rank: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
    gated: int = 0,
) -> None:
    """Give every cross-attention layer (``attn2``) of the UNet trainable projections; self-attention stays frozen.

    Args:
        train_q_out: queries and outputs too, beside keys and values.
        use_xformers: xFormers' kernel rather than torch's.
        rank: train a change of this rank beside each projection, rather than a copy of it.
        alpha: what the change is multiplied by, times the rank; if not given, the rank.
        seed: of the values that the changes start from.
        gated: train a change of keys and values for each of so many concepts, see :class:`GatedAttnProcessor`.
    """
    processors = dict(unet.attn_processors)
    generator = torch.Generator().manual_seed(seed)
    for name in processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor") and gated:
            processors[name] = GatedAttnProcessor(attention, gated, use_xformers, rank, alpha, generator)
        elif name.endswith("attn2.processor") and rank is not None:
            alpha = float(rank) if alpha is None else alpha
            options = (train_q_out, use_xformers, rank, alpha, generator)
            processors[name] = LowRankAttnProcessor(attention, *options)
        elif name.endswith("attn2.processor"):
            processors[name] = CustomDiffusionAttnProcessor(attention, train_q_out, use_xformers)
            _drop_originals(attention, train_q_out)
        else:
            processors[name] = XFormersAttnProcessor() if use_xformers else ShortAttnProcessor()
    unet.set_attn_processor(processors)


def _drop_originals(attention: Attention, train_q_out: bool) -> None:
    """Take out the projections that have copies, which do their work: they would only take memory."""
    originals = [attention.to_k, attention.to_v]
    attention.to_k = attention.to_v = None
    if train_q_out:
        originals += [attention.to_q, attention.to_out[0]]
        attention.to_q, attention.to_out[0] = None, nn.Identity()
    for linear in originals:
        release_pages(linear.weight)
