"""The training objective: text encoder, UNet and the loss on their prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from transformers import PreTrainedModel

from custom_diffusion.concept.files import Concept
from custom_diffusion.concept.gating import GatedWeights, TokenGate
from custom_diffusion.concept.low_rank import LowRank
from custom_diffusion.errors import UserError
from custom_diffusion.machine import release_pages
from custom_diffusion.models.families import Conditioning, Family
from custom_diffusion.training.attention import CustomDiffusionAttnProcessor, GatedAttnProcessor
from custom_diffusion.training.frozen_layers import keep_less, recompute_wide_layers
from custom_diffusion.training.tokens import ModifierTokenEmbedding, ModifierTokens


def custom_diffusion_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    prior_loss_weight: float | None,
    image_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked loss on instance images plus weighted prior loss on class images.

    Args:
        prediction, target: (N, C, H, W), in any floating type. With prior preservation the second half are class
            images.
        mask: (N, 1, H, W), how much each latent of an instance image counts, from 0 to 1. Each image's loss is the
            weighted sum over its latents divided by the sum of the mask, its area, as in the authors' code: the mask
            has one channel, so an instance image counts C times as much as the mean over its latents. An image of which
            nothing counts has the loss 0.
        prior_loss_weight: None without prior preservation.
        image_weights: (N,), what the loss of each image is multiplied by; None for 1.

    Returns:
        The loss to minimise, the instance loss and the prior loss (0 without prior), float32 scalars.
    """
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if image_weights is not None:
        error = error * image_weights.view(-1, 1, 1, 1)
    if prior_loss_weight is None:
        instance_error, prior_loss = error, error.new_zeros(())
    else:
        instance_error, prior_error = error.chunk(2)
        mask = mask.chunk(2)[0]
        prior_loss = prior_error.mean()
    area = mask.sum([1, 2, 3])
    area = area.masked_fill(area == 0, 1)
    instance_loss = ((instance_error * mask).sum([1, 2, 3]) / area).mean()
    return instance_loss + (prior_loss_weight or 0.0) * prior_loss, instance_loss, prior_loss


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """The weights of Min-SNR (Hang et al. 2023, section 3.4): ``min(SNR, gamma)`` for the loss on clean images.

    A loss on noise already weighs that by the SNR, and a loss on velocity by SNR + 1, so it is divided by these. SNR is
    alpha^2 / sigma^2.

    Args:
        noise_scheduler: how latents are noised, and whether noise or velocity is predicted.
        timesteps: (N,).
        gamma: above 0; the paper recommends 5.

    Returns:
        (N,), float32, from 0 to 1; 0 only at zero SNR where velocity is predicted.
    """
    snr = compute_snr(noise_scheduler, timesteps)
    if noise_scheduler.config.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    # The same as min(SNR, gamma) / SNR, which is not defined where the SNR is 0.
    return (gamma / snr).clamp(max=1)


class CustomDiffusion(nn.Module):
    """Text encoder and UNet with what is trained in them; its forward pass is the training objective.

    It is one module so that DistributedDataParallel, gradient accumulation and compilation see all of it: the
    example wraps only a holder of the processors, and its processes drift apart.

    Args:
        family: how captions are encoded, and how the UNet is asked.
        text_encoders: by name, in full precision; frozen but for the rows of the modifier tokens
            (:func:`tokens.train_new_words`).
        unet: in full precision; frozen but for its attention processors
            (:func:`attention.swap_attention_processors`).
        noise_scheduler: how latents are noised, and whether noise or velocity is predicted.
        modifier_tokens: see :func:`tokens.add_modifier_tokens`.
        prior_loss_weight: None without prior preservation.
        snr_gamma: of :func:`min_snr_weights`; None to weigh all timesteps alike.
        gate: at which words each concept acts; None where all that is learned acts everywhere.
        unmasked_weight: how much what is outside of the object's mask counts, from 0 to 1.
    """

    def __init__(
        self,
        family: Family,
        text_encoders: Mapping[str, PreTrainedModel],
        unet: UNet2DConditionModel,
        noise_scheduler: DDPMScheduler,
        modifier_tokens: ModifierTokens,
        prior_loss_weight: float | None = None,
        snr_gamma: float | None = None,
        gate: TokenGate | None = None,
        unmasked_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.family = family
        self.noise_scheduler = noise_scheduler
        self.modifier_tokens = modifier_tokens
        self.prior_loss_weight = prior_loss_weight
        self.snr_gamma = snr_gamma
        self.gate = gate
        self.unmasked_weight = unmasked_weight
        self.text_encoders = nn.ModuleDict(dict(text_encoders))
        self.unet = unet
        keep_less(unet)
        self.unet_forward: Callable[..., Any] = unet.forward

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that is trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def cast_frozen(self, dtype: torch.dtype, channels_last: bool = False) -> None:
        """Hold all that is not trained in ``dtype``; what is trained stays float32.

        Args:
            channels_last: lay the weights of convolutions out as tensor cores want them.
        """
        for parameter in self.parameters():
            # Quantised weights (--quantize_base) are no floating numbers, or are in this type already.
            if not parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != dtype:
                original = parameter.data
                layout = torch.channels_last if channels_last and original.ndim == 4 else torch.preserve_format
                parameter.data = original.to(dtype, memory_format=layout)
                release_pages(original)

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass rather than keep them."""
        self.unet.enable_gradient_checkpointing()
        self._recompute_text()

    def recompute_cheaply(self, latent_size: int) -> None:
        """Compute again, of activations that take much memory, those that take little time."""
        if recompute_wide_layers(self.unet, latent_size):
            self._recompute_text()

    def _recompute_text(self) -> None:
        if self.modifier_tokens.tokens:
            for text_encoder in self.text_encoders.values():
                # transformers renames it; the older versions that we support know only the older name.
                name = "activation_checkpointing_enable"
                getattr(text_encoder, name if hasattr(text_encoder, name) else "gradient_checkpointing_enable")()

    def compile_unet(self, **options: Any) -> None:
        """Let ``torch.compile`` (``options``) do the UNet's part; images are made with the UNet as it is."""
        self.unet_forward = torch.compile(self.unet.forward, **options)

    def encode_prompts(self, input_ids: dict[str, Tensor]) -> Conditioning:
        """Token ids per text encoder, (N, length), to the conditioning of N captions.

        Behind the features stands the gate, where there is one: (N, length, text width + concepts).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.modifier_tokens.tokens)):
            conditioning = self.family.encode(self.text_encoders, input_ids)
        if self.gate is not None:
            features = conditioning["features"]
            mask = self.gate.mask(input_ids[self.family.text_encoders[0].name]).to(features)
            conditioning["features"] = torch.cat([features, mask], dim=-1)
        return conditioning

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        mask: Tensor,
        object_mask: Tensor | None = None,
        input_ids: dict[str, Tensor] | None = None,
        conditioning: Conditioning | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of :func:`custom_diffusion_loss` for one batch.

        Args:
            latents, noise: (N, C, H, W), float32; latents already scaled by the VAE's factor.
            timesteps: (N,).
            mask: (N, 1, H, W), 1 where there is image and 0 around it.
            object_mask: (N, 1, H, W), from 0 outside of the object to 1 inside; None where all of it counts alike.
            input_ids: per text encoder, (M, length), the captions of the first M; None where M is 0.
            conditioning: what is known of the N - M others; None where there are none.
            time_ids: (N, 6), see :meth:`Family.predict`; None for a family that is not told.
        """
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        told = [] if input_ids is None else [self.encode_prompts(input_ids)]
        told += [] if conditioning is None else [conditioning]
        together = {name: torch.cat([one[name] for one in told]) for name in told[0]}
        noisy_latents = noisy_latents.to(self.unet.dtype)
        prediction = self.family.predict(self.unet_forward, noisy_latents, timesteps, together, time_ids)
        gamma = self.snr_gamma
        weights = None if gamma is None else min_snr_weights(self.noise_scheduler, timesteps, gamma)
        if object_mask is not None:
            # Written so that 1 inside stays 1 to the bit.
            mask = mask * (1 - (1 - self.unmasked_weight) * (1 - object_mask))
        return custom_diffusion_loss(prediction, target, mask, self.prior_loss_weight, weights)

    def learned(self, base_model: str) -> Concept:
        """What was learned so far, as :mod:`concept` stores it."""
        attention: dict[str, Tensor] = {}
        differences: dict[str, LowRank] = {}
        for name, processor in self.unet.attn_processors.items():
            if isinstance(processor, CustomDiffusionAttnProcessor):
                own_attention, own_differences = processor.learned(name)
                attention |= own_attention
                differences |= own_differences
        tokens: dict[str, dict[str, Tensor]] = {token: {} for token in self.modifier_tokens.tokens}
        if tokens:
            for name, text_encoder in self.text_encoders.items():
                embedding = next(part for part in text_encoder.modules() if isinstance(part, ModifierTokenEmbedding))
                for token, row in zip(tokens, embedding.rows.weight.detach(), strict=True):
                    tokens[token][name] = row
        return Concept(attention, tokens, base_model, differences=differences, gates=self._gated())

    def _gated(self) -> tuple[GatedWeights, ...]:
        """What was learned for each concept's own words."""
        gates = []
        for number, words in enumerate(self.gate.concepts if self.gate is not None else ()):
            gates.append(GatedWeights(words))
            for name, processor in self.unet.attn_processors.items():
                if isinstance(processor, GatedAttnProcessor):
                    changes, factors = processor.gated(name, number)
                    gates[-1].changes.update(changes)
                    gates[-1].factors.update(factors)
        return tuple(gates)

    @torch.no_grad()
    def restore(self, concept: Concept) -> None:
        """Go on from what :meth:`learned` gave.

        Raises:
            UserError: where the concept does not have the same tokens and projections.
        """
        mine = self.learned(base_model="")
        current, stored = mine.tensors(), concept.tensors()
        for name, value in current.items():
            if name not in stored or stored[name].shape != value.shape:
                raise UserError(
                    f"{concept.source!r} does not fit this run ({name!r}): resume with the same base model, "
                    "--modifier_token, --freeze_model and --rank"
                )
            value.copy_(stored[name])
        for key, difference in mine.differences.items():
            alpha = concept.differences[key].alpha
            if alpha != difference.alpha:
                raise UserError(f"{concept.source!r} does not fit this run: resume with --rank_alpha={alpha:g}")
