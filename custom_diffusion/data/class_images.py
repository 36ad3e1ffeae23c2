"""Class images that the base model generates itself, for prior preservation without real ones."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from diffusers import DiffusionPipeline
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from custom_diffusion.data.class_image_folders import ClassImageFolder, distinct_folders, warn_of_twins
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.data.images import LeftOut, find_images
from custom_diffusion.files import is_same_folder, remove_half_written
from custom_diffusion.images import write_image
from custom_diffusion.machine import free_memory, return_freed_memory
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.drawing import PRECISIONS, encode_prompts, fast_precision, usual_precision
from custom_diffusion.models.samplers import load_sampler

logger = logging.getLogger("custom_diffusion")

# Evaluations of the UNet by which an image is drawn, by --class_image_scheduler: diffusers' own number, and that of
# which DPM-Solver++ makes as good an image (Lu et al. 2022: 20 to 25).
STEPS = {"dpmsolver++": 25, "default": 50}
MOST_AT_ONCE = 32  # from here on larger batches are hardly faster
# Of the largest activation of a VAE's decoder, which takes the most memory of all that draws an image: those that are
# alive at once in a residual block.
COPIES = 4


class PromptDataset(Dataset):
    """The prompts of class images that are to be generated.

    Args:
        prompt: the class prompt, the same for every image.
        num_samples: how many images are wanted.
        taken: numbers that are in use already; new images get the lowest free ones.
    """

    def __init__(self, prompt: str, num_samples: int, taken: Collection[int] = ()) -> None:
        self.prompt = prompt
        used = set(taken)
        self.numbers = [number for number in range(num_samples + len(used)) if number not in used][:num_samples]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.prompt, "index": self.numbers[index]}


def derived_seed(*parts: Any) -> int:
    """A seed below 2^63 that differs wherever one of the parts does."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def find_missing(
    folders: Sequence[ClassImageFolder], accelerator: Accelerator, num_images: int
) -> list[tuple[ClassImageFolder, PromptDataset]]:
    """The folders that hold too few images, which are made where there are none, with the prompts that they lack."""
    missing = []
    for folder in folders:
        if accelerator.is_main_process:
            folder.path.mkdir(parents=True, exist_ok=True)
            remove_half_written(folder.path)
        accelerator.wait_for_everyone()
        present = find_images(folder.path, LeftOut())
        taken = {int(path.name.split("-")[0]) for path in present if path.name.split("-")[0].isdecimal()}
        # Every process has to count before one of them writes.
        accelerator.wait_for_everyone()
        if len(present) < num_images:
            missing.append((folder, PromptDataset(folder.class_prompt, num_images - len(present), taken)))
    return missing


def generate_class_images(
    base_model: BaseModel,
    concepts: Sequence[ConceptEntry],
    accelerator: Accelerator,
    args: argparse.Namespace,
) -> None:
    """Generate the class images that are missing; what is there already stays and counts.

    Image k of a folder has a noise of its own, made from seed, class prompt, k and the folder's number among those
    of this prompt: no two are alike, on however many processes, and an interrupted generation makes the images that
    it would have made. The folder keeps a record of the class prompt and the base model.

    Args:
        base_model: what generates them.
        concepts: each with ``class_data_dir`` and ``class_prompt``.
        accelerator: its processes share the work.
        args: the run's ``num_class_images``, which each folder needs; ``sample_batch_size``, generated at once, per
            process, or None for :func:`images_at_once`; ``seed``; ``prior_generation_precision``, one of
            :data:`PRECISIONS`, ``no`` for fp16 on a GPU and fp32 on a CPU, or None for the fastest;
            ``class_image_scheduler``, one of :data:`STEPS`, and ``class_image_steps``, if not its.

    Raises:
        UserError: for a base model that cannot be loaded, or not be sampled so.
    """
    folders = distinct_folders(concept.class_folder for concept in concepts)
    missing = find_missing(folders, accelerator, args.num_class_images)
    if accelerator.is_main_process:
        _keep_records(folders, [folder for folder, _ in missing], base_model.name)
    if not missing:
        return

    pipeline = _load_pipeline(base_model, accelerator, args)
    at_once = args.sample_batch_size
    if at_once is None:
        at_once = images_at_once(base_model, pipeline.dtype, free_memory(accelerator.device, accelerator.num_processes))
    for folder, prompts in missing:
        at_once = _fill(folder, prompts, pipeline, accelerator, args, at_once)
    del pipeline
    return_freed_memory()
    accelerator.wait_for_everyone()


def _load_pipeline(base_model: BaseModel, accelerator: Accelerator, args: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline that draws the images, on the device."""
    device, name = accelerator.device.type, args.prior_generation_precision
    if name is None:
        name = fast_precision(base_model, device)
        if name == "bf16":
            logger.info(
                "class images are generated in bf16, which is faster on this CPU; "
                "--prior_generation_precision=fp32 generates them in full precision"
            )
    elif name == "no":
        name = usual_precision(device)
    pipeline = base_model.pipeline(PRECISIONS[name], safety_checker=False).to(accelerator.device)
    if args.class_image_scheduler != "default":
        pipeline.scheduler = load_sampler(args.class_image_scheduler, base_model, "--class_image_scheduler")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_at_once(base_model: BaseModel, dtype: torch.dtype, free: int) -> int:
    """How many class images to generate at once where ``--sample_batch_size`` is not given, from 1 to 32.

    As many as half of the free memory holds, at :data:`COPIES` of the VAE's largest activation for each.

    Args:
        dtype: that they are generated in.
        free: bytes of memory that are free once the model is loaded.
    """
    vae, unet = base_model.vae_configuration(), base_model.unet_configuration()
    channels = vae["block_out_channels"]
    latent_size = unet["sample_size"]
    rows, columns = latent_size if isinstance(latent_size, list | tuple) else (latent_size, latent_size)
    pixels = rows * columns * 4 ** (len(channels) - 1)
    values = COPIES * channels[min(1, len(channels) - 1)] * pixels
    each = values * base_model.family().vae_dtype(vae, dtype).itemsize
    return max(1, min(MOST_AT_ONCE, free // 2 // each))


def _keep_records(folders: Sequence[ClassImageFolder], missing: Sequence[ClassImageFolder], base_model: str) -> None:
    """Record what the folders that are filled now show, or were before there were records; warn of another model's."""
    warn_of_twins(folders)
    for folder in folders:
        recorded = folder.recorded()
        other = recorded.get("base_model", base_model)
        if other != base_model and not is_same_folder(other, base_model):
            logger.warning(
                f"{str(folder.path)!r} holds class images generated by {other!r}, and training on them would preserve "
                f"what that model knows: give another --class_data_dir for {base_model!r}"
            )
        holds_some = bool(folder.generated())
        if not recorded and (folder in missing or holds_some):
            # Nobody knows what generated those that are there.
            folder.record(None if holds_some else base_model)


def _fill(
    folder: ClassImageFolder,
    prompts: PromptDataset,
    pipeline: DiffusionPipeline,
    accelerator: Accelerator,
    args: argparse.Namespace,
    at_once: int,
) -> int:
    """Generate this process's share of the images that a folder lacks; gives how many at once the memory holds.

    Where it turns out to be too small, the batches are halved, unless ``--sample_batch_size`` asks for them.
    """
    steps = args.class_image_steps or STEPS[args.class_image_scheduler]
    # As often as the pipeline would have it in one batch: the bits of the features depend on that.
    encode = functools.cache(lambda count: encode_prompts(pipeline, [prompts.prompt] * count))
    share = range(accelerator.process_index, len(prompts), accelerator.num_processes)
    left = [prompts[index] for index in share]
    bar = partial(tqdm, desc=f"Class images of {prompts.prompt!r}", unit="image")
    with bar(total=len(prompts), disable=not accelerator.is_local_main_process) as progress:
        while left:
            batch = left[:at_once]
            try:
                draw = partial(pipeline, **encode(len(batch)), num_inference_steps=steps)
                generate_batch(draw, batch, folder, args.seed)
            except Exception as error:
                if args.sample_batch_size is not None or at_once == 1 or not should_reduce_batch_size(error):
                    raise
                batch = []
            if not batch:  # outside of the handler, which keeps what the failed batch has taken
                at_once //= 2
                logger.info(f"the memory is too small: from now on {at_once} class images at once")
                return_freed_memory()
            left = left[len(batch) :]
            progress.update(min(len(batch) * accelerator.num_processes, len(prompts) - progress.n))
    return at_once


def generate_batch(
    draw: Callable[..., Any], batch: Sequence[dict[str, Any]], folder: ClassImageFolder, seed: int
) -> None:
    """Generate and write the images of these samples of a :class:`PromptDataset`, each from its own noise.

    Args:
        draw: a pipeline that knows all but the generators.
    """
    series = [folder.series] if folder.series else []  # the first has the noise that it had before there were others
    seeds = [derived_seed(seed, sample["prompt"], sample["index"], *series) for sample in batch]
    images = draw(generator=[torch.Generator().manual_seed(one) for one in seeds]).images
    for sample, image in zip(batch, images, strict=True):
        digest = hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest()
        write_image(folder.path / f"{sample['index']}-{digest}.jpg", image, "JPEG", quality=95)
