"""All that decides what a run learns: described, kept beside what it has learned, and compared with another run's."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from custom_diffusion.concept.gating import TokenGate
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.errors import UserError
from custom_diffusion.files import write_bytes
from custom_diffusion.text import some

SETTINGS_NAME = "training_settings.json"

# What runs did that were made before there were these flags: they can still be resumed.
BEFORE_THE_FLAG = {
    "padding_mode": "constant", "cutmix_probability": 0.0, "snr_gamma": None, "optimizer": "adamw", "rank": None,
    "rank_alpha": None, "aspect_buckets": False, "token_gate": False, "masked_loss": False, "unmasked_weight": 0.1,
    "quantize_base": None,
}  # fmt: skip

# What earlier runs have not written down; nothing is known of it then.
NOT_ALWAYS_KNOWN = {"mixed_precision", "instance_contents", "class_images", "starting_values", "base_values", "masks"}

# What is known of each instance image, and how a difference is said.
OF_INSTANCE_IMAGES = {
    "instance_contents": "instance images with other contents", "masks": "other masks of the instance images",
}  # fmt: skip

# What says how far a run goes, and how it counts.
NOT_COMPARED = {"total_steps", "schedule_counts"}

# Flags that may change when a run is resumed: they do not touch what is learned, or say how long to train.
FREE_ON_RESUME = {
    "output_dir", "logging_dir", "report_to", "push_to_hub", "hub_token", "hub_model_id", "no_safe_serialization",
    "validation_prompt", "validation_steps", "num_validation_images", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "overwrite", "max_train_steps", "num_train_epochs", "dataloader_num_workers",
    "sample_batch_size", "prior_generation_precision", "class_image_scheduler", "class_image_steps", "local_rank",
    "set_grads_to_none", "concepts_list", "save_precision", "cutmix_data_dir",
    "instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir", "config", "keep_latents",
    "validation_data_dir", "validation_split", "validation_at_start",
}  # fmt: skip


def describe_settings(
    args: argparse.Namespace,
    instance_images: Sequence[tuple[Path, str]],
    class_images: Sequence[tuple[Path, str]],
    others: Sequence[tuple[Path, str]],
    concepts: Sequence[ConceptEntry],
    num_processes: int,
    gate: TokenGate | None = None,
    masks: Mapping[Path, Path] | None = None,
) -> dict[str, Any]:
    """All that decides what a run learns, as far as it is known before anything is made.

    Args:
        instance_images: the instance images with their prompts.
        class_images: alike, as far as they are there already.
        others: alike, the images of ``--cutmix_data_dir``.
        concepts: with prior preservation, each with ``class_prompt``.
        gate: at which words each concept acts.
        masks: of the instance images, as :func:`masks.find_masks` gives them; None where they are not used.
    """
    settings = {name: value for name, value in vars(args).items() if name not in FREE_ON_RESUME}
    settings["samples_per_step"] = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    del settings["train_batch_size"], settings["gradient_accumulation_steps"]
    settings["instance_pictures"] = [[path.name, prompt] for path, prompt in instance_images]
    settings["instance_contents"] = [digest_of_file(path) for path, _ in instance_images]
    if masks is not None:
        files = [masks.get(path) for path, _ in instance_images]
        settings["masks"] = [None if path is None else [path.name, digest_of_file(path)] for path in files]
    if gate is not None:
        settings["token_gate"] = [[list(one.tokens), list(one.classes)] for one in gate.concepts]
    if args.with_prior_preservation:
        settings["class_prompts"] = [concept.class_prompt for concept in concepts]
    if args.cutmix_data_dir is not None:
        settings["cutmix_images"] = describe_images(others)
    if class_images:
        settings["class_images"] = describe_images(class_images)
    # Earlier runs counted the steps of all processes, each of them.
    settings["schedule_counts"] = "optimizer steps"
    return settings


def describe_images(images: Sequence[tuple[Path, str]]) -> list[list[str]]:
    """Name, caption and a digest of the file, of each image."""
    return [[path.name, caption, digest_of_file(path)] for path, caption in images]


def digest_of_file(path: Path) -> str:
    """16 digits that another content would change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def digest_of_tensors(tensors: Iterable[Tensor]) -> str:
    """16 digits that other values would change."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def differences(settings: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """In what these settings differ from others: a phrase for each difference."""
    found = []
    before = BEFORE_THE_FLAG | ({"optimizer": "adamw8bit"} if others.get("use_8bit_adam") else {})
    others = {name: before[name] for name in before if name in settings} | others
    for name in sorted((settings.keys() | others.keys()) - NOT_COMPARED):
        mine: Any = settings.get(name)
        other: Any = others.get(name)
        if mine == other or (name in NOT_ALWAYS_KNOWN and None in (mine, other)):
            continue
        if name in OF_INSTANCE_IMAGES:
            names = [image[0] for image in settings["instance_pictures"]]
            # With other names or prompts, those are the difference.
            if settings["instance_pictures"] == others.get("instance_pictures"):
                found.append(f"{OF_INSTANCE_IMAGES[name]}: {_unequal(names, mine, other)}")
        elif name == "class_images" and len(mine) == len(other):
            names = [image[0] for image in mine]
            found.append(f"class images with other names, captions or contents: {_unequal(names, mine, other)}")
        elif name == "cutmix_images":
            found.append("other images or captions in --cutmix_data_dir")
        elif name == "class_images":
            found.append(f"{len(other)} class images -> {len(mine)}")
        elif name == "instance_pictures" and isinstance(other, list):
            found.append(f"instance images and prompts: {_exchanged(mine, other)}")
        elif name in ("starting_values", "base_values"):
            found.append("another base model of the same name, whose weights are different")
        else:
            found.append(f"{name} {_short(other)} -> {_short(mine)}")
    return found


def _exchanged(mine: Sequence[Any], others: Sequence[Any]) -> str:
    """Which images, with their prompts, there are no longer, and which there are now."""
    gone, come = [one for one in others if one not in mine], [one for one in mine if one not in others]
    texts = [f"{sign} {_short(one)}" for sign, some in (("no longer", gone), ("now", come)) for one in some[:2]]
    more = len(gone) + len(come) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more else "") if texts else "another order or number"


def _unequal(names: Sequence[str], mine: Sequence[Any], others: Sequence[Any]) -> str:
    unequal = [name for name, one, other in zip(names, mine, others, strict=True) if one != other]
    return some(unequal, 5)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_settings(path: Path, advice: str = "") -> dict[str, Any]:
    """What :func:`write_settings` has left; nothing where there is no file.

    Raises:
        UserError: for a file that is damaged, with the advice.
    """
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{str(path)!r} is damaged: {advice}")
    return settings


def check_settings(settings: dict[str, Any], path: Path, advice: str) -> None:
    """Compare with the settings that another run has left in a file, if it has.

    Raises:
        UserError: where they differ, with every difference.
    """
    others = read_settings(path, advice)
    different = differences(settings, others) if others else []
    if different:
        raise UserError(f"{str(path.parent)!r} is of a run with other settings ({'; '.join(different)}): {advice}")


def write_settings(settings: dict[str, Any], folder: Path) -> None:
    """Leave the settings where a later run looks for them."""
    content = json.dumps(settings, indent=2).encode()
    write_bytes(folder / SETTINGS_NAME, content)
