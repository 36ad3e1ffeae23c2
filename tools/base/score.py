"""How good the base model is, against fixed bars: `python -m tools.base.score`.

Every figure is printed beside its bar, and beside what real images get where the bar depends on them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from custom_diffusion.evaluation.scores import kid
from tools.base import world
from tools.base.emoji import load_icons
from tools.base.features import ENCODER, image_features, load_encoder
from tools.base.train_vae import as_tensor

KID_SUBSET = 300

# What infer.py takes by default, as the paper does: noise in every step gives cleaner images. For what is looked at;
# all figures are of deterministic DDIM, with half of the steps.
SAMPLED_AS_INFER = {"steps": 100, "eta": 1.0}


def held_out_images(icons: dict[str, np.ndarray], each: int, seed: int) -> np.ndarray:
    """uint8 (n, 64, 64, 3): every held-out design `each` times, on plain backgrounds."""
    generator = np.random.default_rng(seed)
    names = [name for name in world.HELD_OUT if name in icons]
    return np.stack([
        world.simple_example(icons, "thing", name, generator).image for name in names for _ in range(each)
    ])  # fmt: skip


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """uint8 images after the VAE's encoder and decoder, at the posterior's mean."""
    device = next(vae.parameters()).device
    parts = []
    for start in range(0, len(images), 64):
        pixels = as_tensor(images[start : start + 64], device).to(vae.dtype)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        parts.append(((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def peak_signal_to_noise(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """PSNR in dB of every pair of uint8 images (n, h, w, 3)."""
    squared = ((images.astype(np.float64) - others.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(squared, 1e-9))


def generated(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seed: int,
    steps: int = 50,
    guidance: float = 4.0,
    width: int = world.RESOLUTION,
    eta: float = 0.0,
) -> np.ndarray:
    """uint8 (n, 64, width, 3): an image per prompt; image i depends on `seed + i` alone."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in tqdm(range(0, len(prompts), 32), desc="Generating", mininterval=5):
        part = prompts[start : start + 32]
        generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(part))]
        images.append(
            pipeline(
                part,
                height=world.RESOLUTION,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                eta=eta,
                generator=generators,
                output_type="np",
            ).images
        )
    return (np.concatenate(images) * 255).round().astype(np.uint8)


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """One picture of uint8 images (n, h, w, 3), `columns` to a row, with white lines of two pixels between them."""
    height, width = (side + 2 for side in images.shape[1:3])
    whole = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        whole.paste(Image.fromarray(image), (index % columns * width + 1, index // columns * height + 1))
    return whole


def nearest_noun(features: torch.Tensor, references: torch.Tensor) -> np.ndarray:
    """Index of the noun whose mean reference features (nouns, each, 1280) are nearest to each row of `features`."""
    centres = torch.nn.functional.normalize(references.mean(dim=1), dim=1)
    return (features @ centres.T).argmax(dim=1).numpy()


def background_of(image: np.ndarray) -> str:
    """The colour of `world.BACKGROUNDS` nearest to the middle colour of the four corners of `image`."""
    corners = np.concatenate([image[:4, :4], image[:4, -4:], image[-4:, :4], image[-4:, -4:]]).reshape(-1, 3)
    colour = np.median(corners.astype(float), axis=0)
    return min(world.BACKGROUNDS, key=lambda name: float(np.abs(colour - world.BACKGROUNDS[name]).sum()))


def scores(model: Path, icons: dict[str, np.ndarray], each: int, seed: int) -> dict[str, float | dict[str, float]]:
    """The base model's figures, over `each` images per noun and per colour."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder()
    nouns = list(world.NOUNS)
    unseen = held_out_images(icons, each=8, seed=seed)
    signal = peak_signal_to_noise(unseen, reconstructed(pipeline.vae, unseen))

    def real(noun: str, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        names = world.designs(icons, noun)
        made = [world.simple_example(icons, noun, str(generator.choice(names)), generator) for _ in range(each)]
        return reconstructed(pipeline.vae, np.stack([example.image for example in made]))

    known, others = (np.concatenate([real(noun, seed + shift) for noun in nouns]) for shift in (1, 2))
    references = image_features(encoder, known).unflatten(0, (len(nouns), each))
    answers = np.repeat(np.arange(len(nouns)), each)
    real_share = float((nearest_noun(image_features(encoder, others), references) == answers).mean())
    images = generated(pipeline, [f"photo of a {nouns[index]}" for index in answers], seed)
    right = nearest_noun(image_features(encoder, images), references) == answers
    of_known, *compared = (image_features(encoder, shown, unit=False) for shown in (known, images, others))
    distances = [kid(features, of_known, subset_size=min(len(of_known), KID_SUBSET)).mean for features in compared]
    generator = np.random.default_rng(seed)
    colours = [name for name in world.BACKGROUNDS for _ in range(each)]
    prompts = [f"photo of a {generator.choice(nouns)} on {world.article(colour)} background" for colour in colours]
    followed = [background_of(image) for image in generated(pipeline, prompts, seed + 10_000)]
    by_noun = {noun: float(right[answers == index].mean()) for index, noun in enumerate(nouns)}
    return {
        "VAE on held-out images, PSNR in dB": float(signal.mean()),
        "nouns, real images through the VAE": real_share,
        "nouns, generated": float(right.mean()),
        "nouns, generated over real": float(right.mean()) / max(real_share, 1e-9),
        "background colour followed": float(np.mean([a == b for a, b in zip(colours, followed, strict=True)])),
        "KID x 1000, generated against real images through the VAE": distances[0],
        "KID x 1000, other real images against these": distances[1],
        "hardest nouns": dict(sorted(by_noun.items(), key=lambda item: item[1])[:8]),
    }


def main() -> None:
    """Print the figures of the model in `--model`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("base"), help="Folder of the model.")
    parser.add_argument("--work", type=Path, default=Path("base-build"), help="Where the emoji are kept.")
    parser.add_argument("--each", type=int, default=16, help="Images per noun and per colour.")
    parser.add_argument("--seed", type=int, default=1000, help="Other than those used while the model was chosen.")
    arguments = parser.parse_args()
    icons = load_icons(arguments.work, only=world.icon_names())
    figures = scores(arguments.model, icons, arguments.each, arguments.seed)
    print(f"scored by {ENCODER}")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
