"""The base model's decoder once more: it learns to draw from what the UNet leaves, not only from clean latents.

Most of what told generated images from drawings was in their details: where the UNet had denoised real latents from
the first tenth of the noise schedule only, the decoder already drew smears. A decoder that has seen such latents draws
clean areas and edges from them. Noise-augmented decoding does the same for other latents (Zheng et al. 2025, "Diffusion
Transformers with Representation Autoencoders"). The encoder and the latents stay as they are, and with them all that
the UNet has learned.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from custom_diffusion.models.short_attention import ShortAttnProcessor
from tools.base import world
from tools.base.progress import Training, autocast, device
from tools.base.train_vae import BATCH_SIZE, as_tensor

# Images that are denoised together, all from the same timestep.
DENOISED_TOGETHER = 128
# The highest timestep that noise is added for. Above it, the UNet changes what the image shows, not only how. For a
# drawing without a caption, which the UNet may not know, that begins earlier.
HIGHEST_WITH_CAPTION, HIGHEST_WITHOUT = 400, 200
# Numbers of sampling steps and guidance scales, of which each batch has one.
SAMPLING_STEPS, GUIDANCE_SCALES = (25, 50), (1.0, 1.0, 3.0, 6.0)


class Denoiser(NamedTuple):
    """All of the model that has been trained before its decoder."""

    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler

    def features(self, captions: list[str]) -> torch.Tensor:
        """Text features (n, length, width) of `captions`."""
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.unet.device)).last_hidden_state

    @torch.no_grad()
    def noised_and_denoised(
        self, images: np.ndarray, captions: list[str], highest: int, generator: np.random.Generator
    ) -> torch.Tensor:
        """Latents fp16 (n, 24, 8, 8) of uint8 `images` (n, 64, 64, 3), as sampling leaves them.

        The encoder's latents get the noise of a timestep up to `highest`, and the sampler's steps from there on.
        """
        on = self.unet.device
        guidance = float(generator.choice(GUIDANCE_SCALES)) if any(captions) else 1.0
        self.scheduler.set_timesteps(int(generator.choice(SAMPLING_STEPS)))
        first = int(generator.integers(0, highest + 1))
        timesteps = [timestep for timestep in self.scheduler.timesteps.tolist() if timestep <= first]
        noise_generator = torch.Generator().manual_seed(int(generator.integers(2**31)))
        with autocast(on):
            latents = self.vae.encode(as_tensor(images, on)).latent_dist.mean.float()
            features = self.features(captions)
            if guidance != 1:
                features = torch.cat([self.features([""] * len(captions)), features])
            if timesteps:
                noise = torch.randn(latents.shape, generator=noise_generator).to(on)
                latents = self.scheduler.add_noise(latents, noise, torch.full((len(latents),), timesteps[0], device=on))
            for timestep in timesteps:
                inputs = latents if guidance == 1 else torch.cat([latents, latents])
                inputs = inputs.contiguous(memory_format=torch.channels_last)
                velocity = self.unet(inputs, timestep, features).sample.float()
                if guidance != 1:
                    without, with_caption = velocity.chunk(2)
                    velocity = without + guidance * (with_caption - without)
                latents = self.scheduler.step(velocity, timestep, latents).prev_sample
        return latents.half()


def load_denoiser(work: Path, on: torch.device) -> Denoiser:
    """The parts that the folder `work` holds, ready to compute on the device `on`."""
    unet = UNet2DConditionModel.from_pretrained(work / "unet" / "trained", torch_dtype=torch.float32)
    unet.set_attn_processor(ShortAttnProcessor())
    vae = AutoencoderKL.from_pretrained(work / "vae" / "first", torch_dtype=torch.float32)
    text_encoder = CLIPTextModel.from_pretrained(work / "text" / "trained", torch_dtype=torch.float32)
    return Denoiser(
        vae.to(on, memory_format=torch.channels_last).requires_grad_(False),
        CLIPTokenizer.from_pretrained(work / "text" / "tokenizer"),
        text_encoder.to(on).requires_grad_(False),
        unet.to(on, memory_format=torch.channels_last).requires_grad_(False),
        DDIMScheduler.from_pretrained(work / "unet" / "scheduler"),
    )


def pairs(denoiser: Denoiser, icons: dict[str, np.ndarray], count: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Latents fp16 (count, 24, 8, 8) as the UNet leaves them, and the uint8 images (count, 64, 64, 3) behind them.

    Half are any drawings, denoised without a caption, and half what the UNet was shown, with its captions.
    """
    generator = np.random.default_rng(seed)
    shown = world.examples(icons, count // 2, wide=0.6, seed=seed)
    others = world.any_drawing(icons, count - len(shown), seed=seed)
    images = np.concatenate([others, np.stack([example.image for example in shown])])
    captions = [""] * len(others) + [example.caption for example in shown]
    starts = [*range(0, len(others), DENOISED_TOGETHER), *range(len(others), count, DENOISED_TOGETHER)]
    latents = []
    for start, end in tqdm([*zip(starts, [*starts[1:], count], strict=True)], desc="Denoising", mininterval=5):
        highest = HIGHEST_WITH_CAPTION if captions[start] else HIGHEST_WITHOUT
        latents.append(denoiser.noised_and_denoised(images[start:end], captions[start:end], highest, generator))
    return torch.cat(latents), images


def train(icons: dict[str, np.ndarray], work: Path, steps: int, pool: int) -> None:
    """Train the decoder of `work/vae/first` alone for `steps` batches, from `pool` images; `vae/trained` gets the VAE.

    `work/unet` and `work/text` hold the UNet and the text encoder, which are trained by then.
    """
    on = device()
    torch.manual_seed(1)
    denoiser = load_denoiser(work, on)
    decoder = torch.nn.Sequential(denoiser.vae.post_quant_conv, denoiser.vae.decoder)
    latents, images = pairs(denoiser, icons, pool, seed=8)
    decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    training = Training(work / "vae" / "decoder", decoder, optimizer, steps, average=0.999)
    for step in training:
        rows = np.sort(np.random.default_rng((9, step)).integers(0, len(images), BATCH_SIZE))
        pixels = as_tensor(images[rows], on)
        with autocast(on):
            decoded = decoder(latents[torch.from_numpy(rows).to(on)].float()).float()
        squared = functional.mse_loss(decoded, pixels)
        loss = squared + 0.1 * functional.l1_loss(decoded, pixels)
        training.update(loss, peak=1e-3, losses={"squared_error": squared})
    decoder.load_state_dict(training.average)
    denoiser.vae.eval().save_pretrained(work / "vae" / "trained")
