"""Do class images by DPM-Solver++ in 25 steps, and in bf16, serve as well as by the base model's scheduler in 50?

    python -m benchmarks.class_images

generates class images of cats and plants with `base/` each way, with two seeds each, and measures their distance from
real drawings of the class: KID, times 1000, by MobileNetV2 features. The spread of the two seeds is the measure of what
difference counts.
"""

from __future__ import annotations

import argparse
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from custom_diffusion.command_line import HelpFormatter
from custom_diffusion.data.class_images import STEPS, generate_class_images
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.models.base_model import BaseModel
from tools.base.features import ENCODER, image_features, load_encoder
from train_custom_diffusion import parse_args

ROOT = Path(__file__).resolve().parent.parent
DRAWINGS = ROOT / "examples" / "drawings.tar.gz"
CLASSES = ("cat", "plant")
SEEDS = (11, 12)
WAYS = (("dpmsolver++", "fp32"), ("default", "fp32"), ("dpmsolver++", "bf16"))  # sampler and precision


def real_images(noun: str) -> np.ndarray:
    """uint8 (n, 64, 64, 3): the drawings of the class that show it alone."""
    images = []
    with tarfile.open(DRAWINGS) as archive:
        for name in archive.getnames():
            if not name.endswith(".txt"):
                continue
            caption = archive.extractfile(name).read().decode()
            if noun in caption.split() and "next to" not in caption:
                data = archive.extractfile(name.removesuffix(".txt") + ".jpg").read()
                images.append(np.asarray(Image.open(BytesIO(data)).convert("RGB").resize((64, 64))))
    return np.stack(images)


def made_images(noun: str, scheduler: str, precision: str, seed: int, count: int) -> np.ndarray:
    """uint8 (count, 64, 64, 3): class images, as training generates them."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            f"--pretrained_model_name_or_path={ROOT / 'base'}", "--instance_data_dir=.", "--instance_prompt=cat",
            f"--num_class_images={count}", "--sample_batch_size=25", f"--seed={seed}",
            f"--class_image_scheduler={scheduler}", f"--prior_generation_precision={precision}",
        ]  # fmt: skip
        entry = ConceptEntry("cat", ".", noun, folder)
        generate_class_images(BaseModel(str(ROOT / "base")), [entry], Accelerator(cpu=True), parse_args(argv))
        return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.jpg"))])


def kid(one: Tensor, other: Tensor) -> float:
    """The unbiased squared MMD of the kernel (x y / d + 1)^3 (Binkowski et al. 2018), times 1000.

    Args:
        one, other: features, (n, d) and (m, d); scaled to a mean square of 1, as the kernel expects.
    """
    one, other = (features.double() * features.shape[1] ** 0.5 for features in (one, other))

    def mean(a: Tensor, b: Tensor, paired: bool) -> float:
        kernel = (a @ b.T / a.shape[1] + 1) ** 3
        count = kernel.numel() - (len(a) if paired else 0)
        return ((kernel.sum() - (kernel.trace() if paired else 0)) / count).item()

    return 1000 * (mean(one, one, True) + mean(other, other, True) - 2 * mean(one, other, False))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="Images of each class, seed and kind.")
    count = parser.parse_args().count
    torch.manual_seed(0)
    encoder = load_encoder()
    print(f"KID x 1000 of {count} images from real drawings, by {ENCODER}\n")
    print(
        "| drawn by | steps | precision | "
        + " | ".join(f"{noun}, seed {seed}" for noun in CLASSES for seed in SEEDS)
        + " |"
    )
    print("|---" * (3 + len(CLASSES) * len(SEEDS)) + "|")
    real = {noun: image_features(encoder, real_images(noun)) for noun in CLASSES}
    for scheduler, precision in WAYS:
        row = [
            f"{kid(image_features(encoder, made_images(noun, scheduler, precision, seed, count)), real[noun]):.1f}"
            for noun in CLASSES
            for seed in SEEDS
        ]
        print(f"| {scheduler} | {STEPS[scheduler]} | {precision} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
