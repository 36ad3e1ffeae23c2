"""What is computed once rather than at every step: the posteriors of images, and the text features of captions.

What a run will draw is known before it starts (see :meth:`stream.SampleStream.draw`), so nothing is encoded
that no step will see, and nothing twice: encoding ahead never costs more than encoding at every step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from custom_diffusion.data.dataset import CustomDiffusionDataset
from custom_diffusion.data.latent_files import posterior_names, read_posterior, remove_stale, write_posterior
from custom_diffusion.data.views import Renderer, View
from custom_diffusion.files import remove_half_written
from custom_diffusion.models.families import Conditioning

logger = logging.getLogger("custom_diffusion")

PIXELS_AT_ONCE = 8 * 512**2  # encoded together on a GPU
CAPTIONS_AT_ONCE = 32  # the same


@torch.no_grad()
def encode_posterior(vae: AutoencoderKL, pixel_values: Tensor, width: int | None = None) -> Tensor:
    """What the VAE makes of images, before anything is drawn from it.

    On a CPU one image follows the other: sums then have the same order in every batch, so that an image's values
    are the same to the bit whenever it is encoded, and it is no slower (benchmarks/README.md).

    Args:
        pixel_values: (N, 3, H, W) in [-1, 1], on the VAE's device.
        width: of one image, where several may be beside each other: none of them is then seen in the posterior of
            another.

    Returns:
        Mean and standard deviation of the posterior, (N, 2, C, h, w) in the VAE's type.
    """
    images = torch.cat(pixel_values.split(width or pixel_values.shape[3], dim=3))
    batches = images.split(1) if images.device.type == "cpu" else [images]
    posteriors = [vae.encode(batch.to(vae.dtype)).latent_dist for batch in batches]
    encoded = torch.cat([torch.stack([posterior.mean, posterior.std], dim=1) for posterior in posteriors])
    return torch.cat(encoded.split(len(pixel_values)), dim=-1)


def sample_latents(posterior: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Draw from posteriors (N, 2, C, h, w) with the given noise (N, C, h, w): scaled latents (N, C, h, w), float32."""
    mean, std = posterior.float().unbind(1)
    return (mean + std * noise) * scaling_factor


def encode_images(
    dataset: CustomDiffusionDataset,
    positions: range,
    vae: AutoencoderKL,
    accelerator: Accelerator,
    folder: Path | None = None,
    num_workers: int = 0,
) -> None:
    """Encode what these items of the stream show, and leave posteriors and masks of objects with the dataset.

    Args:
        vae, accelerator, folder, num_workers: see :func:`encode_views`.
    """
    started = time.perf_counter()
    views, _ = dataset.drawn(positions)
    dataset.posteriors = encode_views(dataset.renderer, views, vae, accelerator, folder, num_workers)
    if dataset.with_object_masks:
        # In the order of the images, so that each mask is decoded once.
        masked = sorted((view for view in views if view.scale is not None), key=lambda view: view.path)
        dataset.object_masks = {view: dataset.renderer.object_mask(view) for view in masked}
    drawn = len(positions) * (2 if dataset.class_images else 1)
    logger.info(
        f"{len(views)} encoded images for the {drawn} that the steps will draw, in "
        f"{time.perf_counter() - started:.1f} s"
    )


class _Rendered(Dataset):
    """The pixels of views, for data workers."""

    def __init__(self, renderer: Renderer, views: Sequence[View]) -> None:
        self.renderer = renderer
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> Tensor:
        return self.renderer.render(self.views[index])


def encode_views(
    renderer: Renderer,
    views: Sequence[View],
    vae: AutoencoderKL,
    accelerator: Accelerator,
    folder: Path | None = None,
    num_workers: int = 0,
) -> dict[View, Tensor]:
    """Encode every view once; several processes share the work, and each ends with all of them.

    Args:
        renderer: makes the pixels of the views.
        vae: on the accelerator's device, in the type to encode in.
        folder: where posteriors are kept as they are made, and found again by a later run. A damaged file is made
            again, and one of another image, view, VAE or type has another name.
        num_workers: processes that load the images.

    Returns:
        View to posterior (2, C, h, w), on the CPU.
    """
    # Those of one shape follow each other, and so can be encoded together.
    views = sorted(views, key=lambda view: (renderer.canvas(view), view.path))
    paths = {} if folder is None else _kept_paths(folder, renderer, views, vae, accelerator)
    found = {view: read_posterior(path) for view, path in paths.items()}
    posteriors = {view: posterior for view, posterior in found.items() if posterior is not None}
    mine = [number for number, view in enumerate(views) if view not in posteriors]
    # What one process lacks, all make: they need not see the same disk.
    lacking = [views[number] for number in sorted(set(gather_object(mine)))]
    if not lacking:
        return posteriors

    share = lacking[accelerator.process_index :: accelerator.num_processes]
    at_once = 1 if accelerator.device.type == "cpu" else max(1, PIXELS_AT_ONCE // renderer.size**2)
    batches = _batches_of_one_shape(renderer, share, at_once)
    loader = DataLoader(_Rendered(renderer, share), batch_sampler=batches, num_workers=num_workers)
    encoded: list[Tensor] = []
    bar = partial(tqdm, desc="Encoding images", unit="image", disable=not accelerator.is_local_main_process)
    with bar(total=len(lacking)) as progress:
        for pixel_values in loader:
            for posterior in encode_posterior(vae, pixel_values.to(accelerator.device)).cpu():
                if paths:
                    write_posterior(paths[share[len(encoded)]], posterior)
                encoded.append(posterior)
            progress.update(min(len(pixel_values) * accelerator.num_processes, len(lacking) - progress.n))
    shapes = [(2, vae.config["latent_channels"], *renderer.latent_shape(view)) for view in lacking]
    everyone = _exchange(encoded, shapes, vae, accelerator)
    return posteriors | dict(zip(lacking, everyone, strict=True))


def _kept_paths(
    folder: Path, renderer: Renderer, views: Sequence[View], vae: AutoencoderKL, accelerator: Accelerator
) -> dict[View, Path]:
    """The file of each view in the folder, which is made and cleaned up."""
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        remove_half_written(folder)
        removed = remove_stale(folder)
        if removed:
            logger.info(f"{removed} encoded images of other versions are removed from {str(folder)!r}")
    accelerator.wait_for_everyone()
    return {view: folder / name for view, name in posterior_names(renderer, views, vae).items()}


def _batches_of_one_shape(renderer: Renderer, views: Sequence[View], at_once: int) -> list[list[int]]:
    """The numbers of the views, in their order, in batches of at most so many."""
    batches: list[list[int]] = []
    for _, group in groupby(range(len(views)), key=lambda number: renderer.canvas(views[number])):
        numbers = list(group)
        batches += [numbers[first : first + at_once] for first in range(0, len(numbers), at_once)]
    return batches


def _exchange(
    encoded: list[Tensor], shapes: Sequence[Sequence[int]], vae: AutoencoderKL, accelerator: Accelerator
) -> list[Tensor]:
    """What all processes have encoded, in the order in which it was dealt out to them; ``shapes`` are of all."""
    if accelerator.num_processes == 1:
        return encoded
    each, most = -(-len(shapes) // accelerator.num_processes), max(map(math.prod, shapes))
    mine = torch.zeros(each, most, dtype=vae.dtype)
    for number, posterior in enumerate(encoded):
        mine[number, : posterior.numel()] = posterior.flatten()
    # As bytes: not every backend knows every type.
    everyone = accelerator.gather(mine.view(torch.uint8).to(accelerator.device)).cpu().view(vae.dtype)
    rows = everyone.view(accelerator.num_processes, each, most).transpose(0, 1).flatten(0, 1)
    # Cloned: a part of a row would keep the whole table in memory, and be pickled with it.
    return [row[: math.prod(shape)].view(*shape).clone() for row, shape in zip(rows, shapes, strict=False)]


def encode_texts(
    dataset: CustomDiffusionDataset,
    positions: range,
    encode_prompts: Callable[[dict[str, Tensor]], Conditioning],
    modifier_ids: Mapping[str, Sequence[int]],
    device: torch.device,
) -> None:
    """Encode the captions among these items that hold nothing to learn, and leave the conditioning with the dataset.

    Args:
        encode_prompts: see :func:`encode_captions`.
        modifier_ids: per text encoder those of the modifier tokens, behind the whole vocabulary.
    """

    def learns(caption: str) -> bool:
        ids = dataset.tokenize(caption)
        return any(bool(ids[name].max() >= min(new)) for name, new in modifier_ids.items() if new)

    _, prompts = dataset.drawn(positions)
    for kind, captions in prompts.items():
        # All of a kind or none, so that a batch always has the same shape.
        if captions and not any(map(learns, captions)):
            dataset.conditioning[kind] = encode_captions(encode_prompts, dataset, captions, device)


@torch.no_grad()
def encode_captions(
    encode_prompts: Callable[[dict[str, Tensor]], Conditioning],
    dataset: CustomDiffusionDataset,
    captions: Sequence[str],
    device: torch.device,
) -> dict[str, Conditioning]:
    """The conditioning of captions that have nothing to learn.

    Args:
        encode_prompts: ids per text encoder, (N, length) on ``device``, to the conditioning of N captions.
        dataset: tokenises the captions.
        captions: all different.

    Returns:
        Caption to its conditioning, tensors without the dimension of the captions, on the CPU.
    """
    # One at a time on a CPU, as images are.
    at_once = 1 if device.type == "cpu" else CAPTIONS_AT_ONCE
    encoded: dict[str, Conditioning] = {}
    for first in range(0, len(captions), at_once):
        batch = captions[first : first + at_once]
        ids = [dataset.tokenize(caption) for caption in batch]
        input_ids = {name: torch.stack([one[name] for one in ids]).to(device) for name in ids[0]}
        conditioning = {name: tensor.cpu() for name, tensor in encode_prompts(input_ids).items()}
        for number, caption in enumerate(batch):
            encoded[caption] = {name: tensor[number] for name, tensor in conditioning.items()}
    return encoded
