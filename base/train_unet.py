"""The base model's UNet: velocity prediction on 8x8 latents, first in an easy world, then in a wider one.

Or first towards what a finished model's UNet predicts, whose text encoder may be another: an hour instead of several.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from base import world
from base.progress import Training, autocast, device
from base.train_text_encoder import TokenizedCaption, encoded, unknown_words
from base.train_vae import LATENT_CHANNELS, as_tensor

BATCH_SIZE = 64
# Share of captions left out, for guidance, and of those with unknown words before their nouns, which say nothing.
UNCONDITIONAL, UNKNOWN_WORDS = 0.1, 0.2
# Share of the steps with a teacher's predictions as the aim, which say more than noisy pictures do; then the pictures.
TAUGHT_SHARE = 0.75


def new_unet(width: int) -> UNet2DConditionModel:
    """7 M parameters, cross-attention at both levels (8x8 and 4x4), for text features of `width`."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=width,
        norm_num_groups=16,
    )


def new_scheduler(prediction_type: str = "v_prediction") -> DDIMScheduler:
    """Stable Diffusion's noise schedule; velocity is predicted if not asked otherwise (Salimans and Ho 2022)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


@torch.no_grad()
def encoded_pictures(
    vae: AutoencoderKL, examples: list[world.Example], on: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the posterior of every picture, fp16 (n, 24, 8, 8) each."""
    parts = []
    for start in tqdm(range(0, len(examples), 256), desc="Encoding pictures", mininterval=5):
        pictures = np.stack([example.picture for example in examples[start : start + 256]])
        with autocast(on):
            posterior = vae.encode(as_tensor(pictures, on)).latent_dist
        parts.append((posterior.mean.half(), posterior.std.half()))
    return torch.cat([mean for mean, _ in parts]), torch.cat([deviation for _, deviation in parts])


class Denoising(torch.nn.Module):
    """The UNet's loss as one forward."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor, velocity: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error of the prediction, of noisy latents (n, 24, 8, 8) and features (n, length, width)."""
        return functional.mse_loss(self.unet(noisy, timesteps, features).sample.float(), velocity)


@dataclass(frozen=True)
class Teacher:
    """A finished model's UNet and text encoder, on latents of the same VAE and ids of the same tokenizer."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel

    @classmethod
    def of(cls, model: Path, on: torch.device) -> Self:
        """What `model`, a folder in diffusers' layout, has learned, frozen."""
        unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
        unet.to(on, memory_format=torch.channels_last)
        return cls(unet.requires_grad_(False), text_encoder.to(on).requires_grad_(False))

    @torch.no_grad()
    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The velocity of noisy latents (n, 24, 8, 8), of captions' ids (n, length) without unknown words."""
        return self.unet(noisy, timesteps, self.text_encoder(ids).last_hidden_state).sample.float()

    @torch.no_grad()
    def weights_for(
        self, text_encoder: CLIPTextModel, captions: Sequence[TokenizedCaption], vocabulary: int
    ) -> dict[str, torch.Tensor]:
        """The UNet's weights, keys and values changed to read `text_encoder` instead of the teacher's.

        By least squares over `captions`, each position's features give those that the teacher's encoder has there;
        the last words of noun phrases and captions those of the ends, where CLIP's own way puts a caption's meaning.
        """
        on = self.unet.device
        rows = [caption.ids(vocabulary) for caption in captions]
        ids = torch.tensor([row[0] for row in rows], device=on)
        present, former = (model(ids).last_hidden_state for model in (text_encoder, self.text_encoder))
        nothing = torch.tensor([TokenizedCaption().ids(vocabulary)[0]], device=on)
        ends = ids == vocabulary - 1
        wanted = torch.where(ends[..., None], self.text_encoder(nothing).last_hidden_state, former)
        for number, (row, _, nouns) in enumerate(rows):
            end = row.index(vocabulary - 1)
            wanted[number, [*nouns, end - 1]] = former[number, end]
        present, wanted = present.flatten(0, 1).double(), wanted.flatten(0, 1).double()
        ridge = 1e-4 * len(present) * torch.eye(present.shape[1], device=on)
        change = torch.linalg.solve(present.T @ present + ridge, present.T @ wanted).T.float()
        weights = self.unet.state_dict()
        return {k: v @ change if "attn2.to_k" in k or "attn2.to_v" in k else v for k, v in weights.items()}


def caption_ids(
    caption: TokenizedCaption, generator: np.random.Generator, vocabulary: int, row: int
) -> tuple[list[int], list[int]]:
    """MAX_LENGTH ids: sometimes of no caption at all, sometimes with the two unknown words of batch row `row`.

    And the same without unknown words.
    """
    dice = generator.random()
    if dice < UNCONDITIONAL:
        caption = TokenizedCaption()
    there = generator.random(2) < (0.7 if dice > 1 - UNKNOWN_WORDS else 0.0)
    words = [vocabulary + 2 * row + n if here else None for n, here in enumerate(there)]
    return caption.ids(vocabulary, words)[0], caption.ids(vocabulary)[0]


def train(
    icons: dict[str, np.ndarray],
    vae_folder: Path,
    text_folder: Path,
    folder: Path,
    steps: int,
    easy_share: float = 0.25,
    pool: int = 60_000,
    teacher: Teacher | None = None,
) -> None:
    """Train for `steps` batches; `folder/trained` gets the average of the weights, `folder/scheduler` the schedule.

    For the first `easy_share` of the steps, pictures come from the easy world; then mostly from the wider one. With a
    `teacher` they always do, and for `TAUGHT_SHARE` of the steps the aim is its prediction.
    """
    on = device()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(vae_folder / "first").to(on, memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(text_folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(text_folder / "trained").to(on).requires_grad_(False)
    scheduler = new_scheduler()
    unet = new_unet(text_encoder.config.hidden_size).to(on, memory_format=torch.channels_last)
    if teacher is not None:
        some = [TokenizedCaption.of(tokenizer, example) for example in world.examples(icons, min(pool, 3000), 0.6, 6)]
        unet.load_state_dict(teacher.weights_for(text_encoder, some, len(tokenizer)))
    objective = Denoising(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    training = Training(folder, objective, optimizer, steps, average=0.999)
    phase = None
    for step in training:
        if phase != (now := "easy" if teacher is None and step < easy_share * steps else "wide"):
            phase = now
            # The easy world has fewer pictures that differ.
            count, wide, seed = (pool // 3, 0.0, 5) if phase == "easy" else (2 * pool // 3, 0.6, 6)
            examples = world.examples(icons, count, wide, seed)
            captions = [TokenizedCaption.of(tokenizer, example) for example in examples]
            means, deviations = encoded_pictures(vae, examples, on)
        generator = np.random.default_rng((7, step))
        chosen = generator.integers(0, len(examples), BATCH_SIZE)
        drawn = [caption_ids(captions[index], generator, len(tokenizer), row) for row, index in enumerate(chosen)]
        ids, plain_ids = (torch.tensor(column, device=on) for column in zip(*drawn, strict=True))
        draw = torch.Generator().manual_seed(step)
        unknown = unknown_words(text_encoder.get_input_embeddings().weight, 2 * BATCH_SIZE, draw)
        noise, resample = torch.randn((2, BATCH_SIZE, LATENT_CHANNELS, 8, 8), generator=draw).to(on)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (BATCH_SIZE,), generator=draw).to(on)
        rows = torch.from_numpy(chosen).to(on)
        latents = means[rows].float() + deviations[rows].float() * resample
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(on):
            features = encoded(text_encoder, ids, unknown).last_hidden_state
            if teacher is not None and step < TAUGHT_SHARE * steps:
                velocity = teacher.predict(noisy, timesteps, plain_ids)
            else:
                velocity = scheduler.get_velocity(latents, noise, timesteps)
        with autocast(on):
            loss = objective(noisy, timesteps, features, velocity)
        training.update(loss, peak=1e-3, losses={"loss": loss})
    objective.load_state_dict(training.average)
    unet.eval().save_pretrained(folder / "trained")
    scheduler.save_pretrained(folder / "scheduler")
