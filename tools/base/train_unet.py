"""The base model's UNet: velocity prediction on 8x8 latents, first in an easy world, then in a wider one."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from custom_diffusion.models.short_attention import ShortAttnProcessor
from tools.base import world
from tools.base.progress import MatrixOptimizer, Training, autocast, device
from tools.base.tokenizer import LETTERS, RARE_ENTRIES
from tools.base.train_text_encoder import OTHER_WORDS, TokenizedCaption, encoded, unknown_words
from tools.base.train_vae import LATENT_CHANNELS, as_tensor

BATCH_SIZE = 128
# The learning rate stays at its peak for this share of the steps: a run can be made longer before it falls.
HOLD = 0.7
# Share of captions left out, for guidance, and of those with unknown words before their nouns, which say nothing.
UNCONDITIONAL, UNKNOWN_WORDS = 0.1, 0.2
# How often a noun has before it the word for the very drawing. Stable Diffusion knows names for all sorts of looks, and
# a new word finds its place among them; these do the same here, also for two things beside each other.
DESIGN_WORDS = 0.5
# Of so many batches in the wider world, one is of two things in images twice as wide.
LANDSCAPE_EVERY = 2


def new_unet(width: int) -> UNet2DConditionModel:
    """11 M parameters, cross-attention at both levels (8x8 and 4x4), for text features of `width`."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(128, 192),
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
def encoded_images(
    vae: AutoencoderKL, examples: list[world.Example], on: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the posterior of every image, fp16 (n, 24, 8, 8 or 16) each."""
    parts = []
    for start in tqdm(range(0, len(examples), 256), desc="Encoding images", mininterval=5):
        images = np.stack([example.image for example in examples[start : start + 256]])
        with autocast(on):
            posterior = vae.encode(as_tensor(images, on)).latent_dist
        parts.append((posterior.mean.half(), posterior.std.half()))
    return torch.cat([mean for mean, _ in parts]), torch.cat([deviation for _, deviation in parts])


class Pool(NamedTuple):
    """Images of one size, encoded, with their captions and the words of the designs in them."""

    captions: list[TokenizedCaption]
    names: list[list[int]]
    means: torch.Tensor  # fp16 (n, 24, 8, 8 or 16), as are the deviations
    deviations: torch.Tensor

    @classmethod
    def of(
        cls, examples: list[world.Example], tokenizer: CLIPTokenizer, word_of: dict[str, int], vae: AutoencoderKL
    ) -> Self:
        """All of `examples`, encoded where the VAE is; `word_of` has the words of their designs."""
        captions = [TokenizedCaption.of(tokenizer, example) for example in examples]
        names = [[word_of[design] for design in example.designs] for example in examples]
        return cls(captions, names, *encoded_images(vae, examples, vae.device))

    @classmethod
    def load(cls, file: Path) -> Self:
        """What `save` wrote."""
        tensors = load_file(file)
        with safe_open(file, "pt") as saved:
            words = json.loads(saved.metadata()["words"])
        captions = [TokenizedCaption(tuple((n, tuple(ids)) for n, ids in pieces)) for pieces, _ in words]
        return cls(captions, [names for _, names in words], tensors["means"], tensors["deviations"])

    def save(self, file: Path) -> None:
        """Write all of it into one file of safetensors: a run that goes on does not make it again."""
        words = [[caption.pieces, names] for caption, names in zip(self.captions, self.names, strict=True)]
        half_written = file.with_suffix(".tmp")
        tensors = {"means": self.means.contiguous(), "deviations": self.deviations.contiguous()}
        save_file(tensors, half_written, {"words": json.dumps(words)})
        half_written.replace(file)

    @property
    def batch_size(self) -> int:
        """Images in a batch, which has as many latents whatever their shape."""
        return BATCH_SIZE * 8 // self.means.shape[-1]

    def draw_ids(
        self, chosen: np.ndarray, generator: np.random.Generator, vocabulary: int, on: torch.device
    ) -> torch.Tensor:
        """Ids (n, MAX_LENGTH) of the `chosen` captions as `caption_ids` gives them."""
        drawn = [
            caption_ids(self.captions[index], generator, vocabulary, row, self.names[index])
            for row, index in enumerate(chosen)
        ]
        return torch.tensor(drawn, device=on)

    def draw_latents(self, chosen: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents of the `chosen` images, drawn from their posteriors, and noise for them; fp32 (n, 24, 8, 8 or 16)."""
        rows = torch.from_numpy(chosen).to(self.means.device)
        shape = (2, len(rows), *self.means.shape[1:])
        noise, resample = torch.randn(shape, generator=generator).to(self.means.device)
        return self.means[rows].float() + self.deviations[rows].float() * resample, noise


class Denoising(torch.nn.Module):
    """The UNet's loss as one forward."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, features: torch.Tensor, velocity: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error of the prediction, of noisy latents (n, 24, h, w) and features (n, length, width)."""
        return functional.mse_loss(self.unet(noisy, timesteps, features).sample.float(), velocity)


def design_words(tokenizer: CLIPTokenizer, icons: dict[str, np.ndarray]) -> dict[str, int]:
    """For each of `icons` (`set/icon`) that training shows, an entry of the vocabulary that stands for it.

    These are pieces of words in which no caption is written, and from which no new word starts.
    """
    texts = [*world.words_of_the_world(), *OTHER_WORDS]
    taken = {id for text in texts for id in tokenizer(text).input_ids}
    taken |= set(tokenizer.convert_tokens_to_ids([*RARE_ENTRIES]))
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    spare = [id for entry, id in vocabulary if id >= LETTERS and not entry.endswith("</w>") and id not in taken]
    designs = sorted({name for noun in world.NOUNS for name in world.designs(icons, noun)})
    return dict(zip(designs, spare[-len(designs) :], strict=True))


def caption_ids(
    caption: TokenizedCaption, generator: np.random.Generator, vocabulary: int, row: int, names: Sequence[int] = ()
) -> list[int]:
    """MAX_LENGTH ids: sometimes of no caption at all, sometimes with the two unknown words of batch row `row`.

    Else often with the words `names` of the designs that its noun phrases show.
    """
    dice = generator.random()
    if dice < UNCONDITIONAL:
        caption = TokenizedCaption()
    there = generator.random(2) < (0.7 if dice > 1 - UNKNOWN_WORDS else 0.0)
    words = [vocabulary + 2 * row + n if here else None for n, here in enumerate(there)]
    if names and dice <= 1 - UNKNOWN_WORDS:
        words = [name if generator.random() < DESIGN_WORDS else None for name in names]
    return caption.ids(vocabulary, words)[0]


def examples_of(phase: str, icons: dict[str, np.ndarray], pool: int, shift: int) -> list[list[world.Example]]:
    """Of the `phase` "easy" or "wide": examples in squares and, for the wider world, in landscapes too.

    Args:
        pool: how many there are, about.
        shift: added to the seeds.
    """
    # The easy world has fewer images that differ.
    if phase == "easy":
        return [world.examples(icons, pool // 3, 0.0, 5 + shift)]
    return [
        world.examples(icons, 2 * pool // 3, 0.6, 6 + shift),
        world.examples(icons, pool // 4, 0.6, 7 + shift, landscape=True),
    ]


def pools_of(
    folder: Path,
    phase: str,
    examples: Callable[[], list[list[world.Example]]],
    encode: Callable[[list[world.Example]], Pool],
) -> list[Pool]:
    """The pools of a `phase`, read from `folder` where an earlier run has left them there, else made and left there."""
    complete = folder / f"{phase}.complete"
    if complete.exists():
        return [Pool.load(file) for file in sorted(folder.glob(f"{phase}-*.safetensors"))]
    pools = [encode(made) for made in examples()]
    for number, pool in enumerate(pools):
        pool.save(folder / f"{phase}-{number}.safetensors")
    complete.touch()
    return pools


def first_unet(text_encoder: CLIPTextModel, start: Path | None) -> UNet2DConditionModel:
    """A new UNet where the text encoder is, with random weights or those of the folder `start`."""
    if start is not None:
        unet = UNet2DConditionModel.from_pretrained(start, torch_dtype=torch.float32)
    else:
        unet = new_unet(text_encoder.config.hidden_size)
    unet.set_attn_processor(ShortAttnProcessor())
    return unet.to(text_encoder.device, memory_format=torch.channels_last)


def train(
    icons: dict[str, np.ndarray],
    vae_folder: Path,
    text_folder: Path,
    folder: Path,
    steps: int,
    easy_share: float = 0.1,
    pool: int = 60_000,
    start: Path | None = None,
    seed: int = 0,
) -> None:
    """Train for `steps` batches; `folder/trained` gets the average of the weights, `folder/scheduler` the schedule.

    For the first `easy_share` of the steps, images come from the easy world; then from the wider one. A run that goes
    on from the UNet in the folder `start` has the wider one from the beginning, and a lower learning rate. Each `seed`
    has images, captions and noise of its own.
    """
    on = device()
    # No two seeds share a draw: steps are far fewer.
    shift = 1_000_000 * seed
    torch.manual_seed(shift)
    vae = AutoencoderKL.from_pretrained(vae_folder / "first").to(on, memory_format=torch.channels_last)
    tokenizer = CLIPTokenizer.from_pretrained(text_folder / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(text_folder / "trained").to(on).requires_grad_(False)
    unet, scheduler = first_unet(text_encoder, start), new_scheduler()
    encode = partial(Pool.of, tokenizer=tokenizer, word_of=design_words(tokenizer, icons), vae=vae)
    objective = Denoising(unet)
    optimizer = MatrixOptimizer(unet, weight_decay=0.01, apart=("conv_in.", "conv_out.", "time_embedding."))
    training = Training(folder, objective, optimizer, steps, average=0.999, hold=HOLD)
    phase = None
    for step in training:
        if phase != (now := "wide" if start or step >= easy_share * steps else "easy"):
            phase = now
            pools = pools_of(folder, phase, partial(examples_of, phase, icons, pool, shift), encode)
        shown = pools[-1 if step % LANDSCAPE_EVERY == 0 else 0]
        generator = np.random.default_rng((7 + shift, step))
        chosen = generator.integers(0, len(shown.captions), shown.batch_size)
        ids = shown.draw_ids(chosen, generator, len(tokenizer), on)
        draw = torch.Generator().manual_seed(step + shift)
        unknown = unknown_words(text_encoder.get_input_embeddings().weight, 2 * len(chosen), draw)
        latents, noise = shown.draw_latents(chosen, draw)
        # Evenly over the schedule in every batch: by chance, the loss depends on little else.
        spread = (torch.randperm(len(chosen), generator=draw) + torch.rand(len(chosen), generator=draw)) / len(chosen)
        timesteps = (spread * scheduler.config.num_train_timesteps).long().to(on)
        noisy = scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(on):
            features = encoded(text_encoder, ids, unknown).last_hidden_state
            velocity = scheduler.get_velocity(latents, noise, timesteps)
        with autocast(on):
            loss = objective(noisy, timesteps, features, velocity)
        training.update(loss, peak=1e-3 if start else 3e-3, losses={"loss": loss})
    objective.load_state_dict(training.average)
    unet.eval().save_pretrained(folder / "trained")
    scheduler.save_pretrained(folder / "scheduler")
