"""Batches: which samples a process takes, and how they become tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

# Keys of a sample, without the kind of image before them, to keys of a batch.
_NAMES = {
    "images": "pixel_values",
    "posterior": "posterior",
    "prompt_ids": "input_ids",
    "conditioning": "conditioning",
    "time_ids": "time_ids",
}


def position_batches(first: int, count: int, batch_size: int, process: int, num_processes: int) -> list[list[int]]:
    """Which items of the stream this process takes: batches ``first`` to ``first + count - 1`` of its own.

    All processes together walk through the stream without gap or overlap, so two with a batch of one see what one
    with a batch of two sees.
    """
    starts = ((batch * num_processes + process) * batch_size for batch in range(first, first + count))
    return [list(range(start, start + batch_size)) for start in starts]


def collate_fn(
    examples: Sequence[dict[str, Any]], with_prior_preservation: bool, latent_channels: int, num_train_timesteps: int
) -> dict[str, Any]:
    """Batch samples, instance images first and class images behind them, with what diffusion draws for each.

    Noise and timesteps are drawn here, on the CPU and from each sample's own seed: they are then the same on every
    device, for any split of the batch over processes, and after every restart, and cost the training loop nothing.

    Returns:
        ``pixel_values`` (N, 3, size, size) or, of samples that are encoded already, ``posterior``
        (N, 2, latent_channels, mask_size, mask_size); ``mask`` (N, 1, mask_size, mask_size), 1 where there is image;
        ``object_mask``, alike, from 0 outside of the object to 1 inside, where the samples have it; ``noise`` and
        ``posterior_noise`` (N, latent_channels, mask_size, mask_size), ``timesteps`` (N,), where N is the number of
        examples, doubled with prior preservation. ``input_ids`` per text encoder, (M, length), of the first M
        captions, and ``conditioning``, tensors of N - M each, of the others; either is absent where it would be empty.
        ``time_ids`` (N, 6), where the samples have them.
    """
    kinds = ["instance", "class"] if with_prior_preservation else ["instance"]
    generators = [torch.Generator().manual_seed(example["noise_seed"]) for example in examples]
    batch: defaultdict[str, list[Any]] = defaultdict(list)
    for kind in kinds:
        for example, generator in zip(examples, generators, strict=True):
            for key, name in _NAMES.items():
                if f"{kind}_{key}" in example:
                    batch[name].append(example[f"{kind}_{key}"])
            if f"{kind}_object_mask" in example:
                batch["object_mask"].append(example[f"{kind}_object_mask"].unsqueeze(0))
            mask = example[f"{kind}_mask"]
            batch["mask"].append(mask.unsqueeze(0))
            shape = (latent_channels, *mask.shape)
            batch["noise"].append(torch.randn(shape, generator=generator))
            batch["posterior_noise"].append(torch.randn(shape, generator=generator))
            batch["timesteps"].append(torch.randint(num_train_timesteps, (), generator=generator))
    return {name: _stack(values) for name, values in batch.items()}


def _stack(values: Sequence[Any]) -> Any:
    """Tensors on a new first dimension; of dictionaries of tensors, every entry."""
    if isinstance(values[0], dict):
        return {name: torch.stack([value[name] for value in values]) for name in values[0]}
    return torch.stack(list(values))
