"""The validation loss: images that are not trained on, always with the same noise at the same timesteps."""

from __future__ import annotations

import argparse
import copy
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from custom_diffusion.data.batches import collate_fn
from custom_diffusion.data.buckets import shapes_of
from custom_diffusion.data.caching import encode_views
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.data.dataset import CustomDiffusionDataset
from custom_diffusion.data.images import find_instance_images
from custom_diffusion.data.stream import SampleStream
from custom_diffusion.errors import UserError
from custom_diffusion.machine import return_freed_memory
from custom_diffusion.training.run import Run, load_vae

logger = logging.getLogger("custom_diffusion")

TIMESTEPS = 4  # each image is seen at as many, in the middle of equal parts of the noise schedule
MOST_CLASS_IMAGES = 4  # a handful, unless there are more validation images

Images = list[tuple[Path, str]]


def split_images(args: argparse.Namespace, concepts: Sequence[ConceptEntry], images: Images) -> tuple[Images, Images]:
    """The images to train on and those to validate with.

    Args:
        args: with ``validation_split``, the last so many images of each concept by name are held out.
        concepts: of those with a ``validation_data_dir``, its images with the captions beside them, or else the
            instance prompt.
        images: the instance images with their prompts.

    Raises:
        UserError: where nothing is left to train on, there is no image to validate with, or two things say which.
    """
    others = [replace(one, instance_folder=Path(folder)) for one in concepts if (folder := one.validation_data_dir)]
    if others and args.validation_split is not None:
        raise UserError(
            f"--validation_split and the validation_data_dir in {args.concepts_list} both say what to validate with: "
            "give one of them"
        )
    if others:
        return images, find_instance_images(others, args.masked_loss)
    if args.validation_split is None:
        return images, []
    held_out: set[Path] = set()
    # Several concepts may share a folder, whose images then occur with a prompt of each.
    for place in dict.fromkeys(concept.instance_folder for concept in concepts):
        own = list(dict.fromkeys(path for path, _ in images if path.parent == place))
        if len(own) <= args.validation_split:
            raise UserError(
                f"--validation_split {args.validation_split} would leave none of the {len(own)} images in "
                f"{str(place)!r} to train on: hold fewer out, or give --validation_data_dir"
            )
        held_out.update(own[-args.validation_split :])
    return [pair for pair in images if pair[0] not in held_out], [pair for pair in images if pair[0] in held_out]


def same_random_state(accelerator: Accelerator) -> AbstractContextManager[None]:
    """Leave the random numbers as they were: a run with validation has to save the states of one without."""
    device = accelerator.device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def prepare_validation(run: Run, images: Images) -> list[dict[str, Any]]:
    """Encode what the validation loss is computed on; the batches are small and stay on the CPU.

    Every image is shown whole at :data:`TIMESTEPS` timesteps, each time with noise of its own and, with prior
    preservation, beside a class image, so that a validation costs 4 forward passes for each, or 8.
    """
    if not images:
        return []
    dataset, latents = validation_dataset(run.dataset, images), run.latents
    positions = range(TIMESTEPS * len(images))
    with same_random_state(run.accelerator):
        vae = latents.vae or load_vae(run.configuration, run.accelerator, local_files_only=True)
        dataset.posteriors = encode_views(dataset.renderer, dataset.drawn(positions)[0], vae, run.accelerator)
    del vae
    return_freed_memory()
    count = run.configuration.noise_scheduler.config.num_train_timesteps
    collate = partial(
        collate_fn,
        with_prior_preservation=bool(dataset.class_images),
        latent_channels=run.configuration.latent_channels,
        num_train_timesteps=count,
    )
    seen: Counter[tuple[Path, str]] = Counter()
    batches = []
    for position in positions:
        sample = dataset.draw(position)
        shown = (sample.instance[0].path, sample.instance_prompt)
        batch = collate([dataset[position]])
        batch["timesteps"].fill_(count * (2 * (seen[shown] % TIMESTEPS) + 1) // (2 * TIMESTEPS))
        seen[shown] += 1
        batches.append(batch)
    return batches


def validation_dataset(dataset: CustomDiffusionDataset, images: Images) -> CustomDiffusionDataset:
    """The training's data set with other images, shown whole and upright."""
    # As many that every validation image is shown equally often.
    wanted = len(images) * max(1, MOST_CLASS_IMAGES // len(images))
    class_images = list(dataset.class_images)[:: max(1, len(dataset.class_images) // wanted)][:wanted]
    class_images = class_images[: len(class_images) // len(images) * len(images)] or class_images
    other = copy.copy(dataset)
    other.instance_images, other.class_images, other.posteriors, other.conditioning = images, class_images, {}, {}
    other.object_masks = {}
    stream = dataset.stream
    other.stream = SampleStream(
        images,
        class_images,
        size=stream.size,
        center_crop=True,
        hflip=False,
        aug=False,
        seed=stream.seed,
        variants=None,
        cutmix_probability=0.0,
        samples_per_step=1,
        shapes=shapes_of([*images, *class_images], dataset.buckets),
    )
    return other


@torch.no_grad()
def measure_validation(run: Run, step: int) -> None:
    """Compute the validation losses on the main process, log them, and keep them in the history.

    They are those of :func:`objective.custom_diffusion_loss` and can be compared with the training's. No random
    state is touched.
    """
    if not run.validation or not run.accelerator.is_main_process:
        return
    module, device = run.module, run.accelerator.device
    module.eval()
    module.text_encoders.to(device)
    # Not the compiled UNet: another shape of batch would be compiled again, for minutes.
    as_trained, module.unet_forward = module.unet_forward, module.unet.forward
    losses = []
    for kept in run.validation:
        batch = send_to_device(dict(kept), device)
        losses.append(torch.stack(module(run.latents.draw(batch), **batch)))
    module.unet_forward = as_trained
    module.train()
    if "instance" in run.dataset.conditioning:
        module.text_encoders.to("cpu")
    _, instance, prior = torch.stack(losses).mean(dim=0).tolist()
    logs = {"validation_loss": instance}
    if run.args.with_prior_preservation:
        logs["validation_prior_loss"] = prior
    run.accelerator.log(logs, step=step)
    run.history.validations.append({"step": step, **logs})


def best_step(run: Run, checkpoints: Sequence[int]) -> str | None:
    """A sentence about the step with the lowest validation loss and its checkpoint; None without validation.

    Args:
        checkpoints: the steps that there are checkpoints of.
    """
    best = run.history.best()
    if best is None:
        return None
    step = int(best["step"])
    text = f"The validation loss was lowest at step {step}: {best['validation_loss']:.4f}"
    if step in checkpoints:
        return f"{text}, kept in {Path(run.args.output_dir, f'checkpoint-{step}')}"
    if step == run.steps.stop:
        return f"{text}, the last, which is the result"
    near = min(checkpoints, key=lambda one: abs(one - step), default=None)
    name = None if near is None else str(Path(run.args.output_dir, f"checkpoint-{near}"))
    kept = "there is no checkpoint" if name is None else f"the nearest checkpoint is {name}"
    return f"{text}; {kept}: validate and save at the same steps (--validation_steps, --checkpointing_steps)"
