"""Class images that the base model generates itself, for prior preservation without real ones."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.errors import UserError
from custom_diffusion.files import remove_half_written
from custom_diffusion.images import readable_images, write_image
from custom_diffusion.machine import return_freed_memory
from custom_diffusion.models.base_model import BaseModel

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PromptDataset(Dataset):
    """The prompts of class images that are to be generated.

    Args:
        prompt: the class prompt, the same for every image.
        num_samples: how many images are wanted.
        taken: numbers that are in use already; new images get the lowest free ones.
    """

    def __init__(self, prompt: str, num_samples: int, taken: Sequence[int] = ()) -> None:
        self.prompt = prompt
        self.numbers = [number for number in range(num_samples + len(taken)) if number not in set(taken)][:num_samples]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.prompt, "index": self.numbers[index]}


def derived_seed(*parts: Any) -> int:
    """A seed below 2^63 that differs wherever one of the parts does."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def find_missing(
    concepts: Sequence[ConceptEntry], accelerator: Accelerator, num_images: int
) -> list[tuple[Path, PromptDataset]]:
    """The folders that hold too few images, which are made where there are none, with the prompts that they lack.

    Raises:
        UserError: for a folder of real class images.
    """
    missing = []
    for concept in concepts:
        folder = concept.class_folder
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            remove_half_written(folder)
        accelerator.wait_for_everyone()
        if (folder / "images.txt").exists():
            raise UserError(
                f"{str(folder)!r} holds real class images, as retrieve.py brings them: add --real_prior, "
                "or give another --class_data_dir for generated ones"
            )
        present, _ = readable_images([path for path in folder.iterdir() if path.is_file()])
        numbers = [int(path.name.split("-")[0]) for path in present if path.name.split("-")[0].isdecimal()]
        # Every process has to count before one of them writes.
        accelerator.wait_for_everyone()
        if len(present) < num_images:
            missing.append((folder, PromptDataset(concept.class_prompt, num_images - len(present), numbers)))
    return missing


def generate_class_images(
    base_model: BaseModel,
    concepts: Sequence[ConceptEntry],
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> None:
    """Generate the class images that are missing; what is there already stays and counts.

    Image k of a prompt has a noise of its own, made from seed, prompt and k: no two are alike, on however many
    processes, and an interrupted generation goes on with the images it would have made.

    Args:
        base_model: what generates them.
        concepts: each with ``class_data_dir`` and ``class_prompt``.
        accelerator: its processes share the work.
        args: the run's ``num_class_images``, which each concept needs; ``sample_batch_size``, generated at once, per
            process; ``seed``; ``prior_generation_precision``, one of :data:`PRECISIONS`, or else fp16 on a GPU and
            fp32 on a CPU.

    Raises:
        UserError: for a folder of real class images, and a base model that cannot be loaded.
    """
    missing = find_missing(concepts, accelerator, args.num_class_images)
    if not missing:
        return

    default = torch.float16 if accelerator.device.type == "cuda" else torch.float32
    pipeline = base_model.pipeline(
        PRECISIONS.get(args.prior_generation_precision, default), safety_checker=None, requires_safety_checker=False
    ).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    for folder, prompts in missing:
        share = Subset(prompts, range(accelerator.process_index, len(prompts), accelerator.num_processes))
        bar = partial(tqdm, desc=f"Class images of {prompts.prompt!r}", unit="image")
        with bar(total=len(prompts), disable=not accelerator.is_local_main_process) as progress:
            for batch in DataLoader(share, batch_size=args.sample_batch_size):
                generate_batch(pipeline, batch, folder, args.seed)
                made = len(batch["index"]) * accelerator.num_processes
                progress.update(min(made, len(prompts) - progress.n))
    del pipeline
    return_freed_memory()
    accelerator.wait_for_everyone()


def generate_batch(pipeline: DiffusionPipeline, batch: dict[str, Any], folder: Path, seed: int) -> None:
    """Generate and write the images of one batch of a :class:`PromptDataset`, each from its own noise."""
    numbers = batch["index"].tolist()
    seeds = [derived_seed(seed, prompt, number) for prompt, number in zip(batch["prompt"], numbers, strict=True)]
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    images = pipeline(batch["prompt"], generator=generators).images
    for number, image in zip(numbers, images, strict=True):
        digest = hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest()
        write_image(folder / f"{number}-{digest}.jpg", image, "JPEG", quality=95)
