"""The base model's VAE: 64 px to 8x8 latents with 24 channels, trained on every drawing of the emoji sets."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from tools.base import world
from tools.base.progress import Training, autocast, device

LATENT_CHANNELS = 24
# An image is 4096 errors to learn from: many small steps come further than few large ones in the same time.
BATCH_SIZE = 8
# Where the weight of the KL term costs a few hundredths of a decibel, and the decoder bears a little noise.
KL_WEIGHT = 1e-7


def new_vae() -> AutoencoderKL:
    """2.7 M parameters. Few channels where the image is large: there, time goes into memory and not arithmetic."""
    channels = (32, 32, 64, 128)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=world.RESOLUTION,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def as_tensor(images: np.ndarray, on: torch.device) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in -1 to 1, channels last."""
    pixels = torch.from_numpy(images).to(on).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


class Reconstruction(torch.nn.Module):
    """The VAE's loss as one forward."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the mean squared error, of pixels (n, 3, 64, 64) and noise (n, 24, 8, 8).

        The error counts again in 8x8 averages: small colour casts, which the eye sees first, are small in any pixel.
        """
        mean, log_variance = self.vae.quant_conv(self.vae.encoder(pixels)).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + noise * torch.exp(0.5 * log_variance)
        decoded = self.vae.decoder(self.vae.post_quant_conv(latents)).float()
        squared = functional.mse_loss(decoded, pixels)
        absolute = functional.l1_loss(decoded, pixels)
        colour = functional.mse_loss(functional.avg_pool2d(decoded, 8), functional.avg_pool2d(pixels, 8))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
        return squared + 0.1 * absolute + colour + KL_WEIGHT * divergence, squared


def training_images(icons: dict[str, np.ndarray], count: int, seed: int) -> np.ndarray:
    """uint8 (count, 64, 64, 3): half any drawing, half what the UNet will be shown."""
    shown = np.stack([example.image for example in world.examples(icons, count // 2, wide=0.6, seed=seed)])
    return np.concatenate([world.any_drawing(icons, count - len(shown), seed=seed), shown])


def train(icons: dict[str, np.ndarray], folder: Path, steps: int, pool: int = 60_000) -> None:
    """Train for `steps` batches; `folder/first` gets the VAE, its latents normalised per channel."""
    on = device()
    torch.manual_seed(0)
    vae = new_vae().to(on, memory_format=torch.channels_last)
    objective = Reconstruction(vae)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    training = Training(folder, objective, optimizer, steps)
    images = training_images(icons, pool, seed=1)
    for step in training:
        generator = np.random.default_rng((2, step))
        pixels = as_tensor(images[np.sort(generator.integers(0, len(images), BATCH_SIZE))], on)
        noise = torch.randn(
            (BATCH_SIZE, LATENT_CHANNELS, 8, 8), generator=torch.Generator().manual_seed(step)
        ).to(on)  # fmt: skip
        with autocast(on):
            loss, squared = objective(pixels, noise)
        training.update(loss, peak=1.2e-3, losses={"loss": loss, "squared_error": squared})
    normalise(vae, images[:: max(1, len(images) // 2048)])
    vae.eval().save_pretrained(folder / "first")


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Fold mean and deviation of each latent channel into the convolutions around the latents.

    Afterwards every channel has mean 0, and all together have mean square 1, which is what the UNet's noise has. Among
    them the deviation goes with the square root of signal over noise in the posterior, so that all are equally noisy:
    the more the decoder heeds a channel, the less noise it lets into it, so an error of one size now shows as much in
    any channel. With all channels alike, most of the UNet's loss was in those that show least; as it is, shapes come
    before details, as they do in pixels. A channel that is mere noise becomes a constant zero.
    """
    on = next(vae.parameters()).device
    posteriors = [vae.encode(as_tensor(part, on)).latent_dist for part in np.array_split(images, 32)]
    means = torch.cat([posterior.mean for posterior in posteriors])
    signal = means.var(dim=(0, 2, 3))
    noise = torch.cat([posterior.var for posterior in posteriors]).mean(dim=(0, 2, 3))
    mean, silent = means.mean(dim=(0, 2, 3)), noise > signal
    wanted = torch.where(silent, 0.0, (signal / noise).sqrt())
    wanted /= wanted.square().mean().sqrt()
    # Silent channels are zeroed below; until then their factor has to have an inverse and a logarithm.
    factor, count = (wanted / (signal + noise).sqrt()).clamp(min=1e-3), LATENT_CHANNELS
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:count] *= factor[:, None, None, None]
    bias[:count] = (bias[:count] - mean) * factor
    bias[count:] += 2 * factor.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight /= factor[None, :, None, None]
    weight[:count][silent], bias[:count][silent] = 0.0, 0.0
    weight[count:][silent], bias[count:][silent] = 0.0, -12.0
    vae.post_quant_conv.weight[:, silent] = 0.0
