"""What a run saves and shows: validation images, checkpoints, and the learned concept with its card."""

from __future__ import annotations

import argparse
import itertools
import logging
import shlex
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from custom_diffusion.command_line import DEFAULT_MODEL, one_or_several
from custom_diffusion.concept.cards import model_card
from custom_diffusion.concept.checkpoint_folders import checkpoint_step, list_checkpoints
from custom_diffusion.concept.compression import DTYPES
from custom_diffusion.concept.files import CARD_NAME, Concept, save_concept
from custom_diffusion.concept.gating import gates_beside_features
from custom_diffusion.files import write_bytes
from custom_diffusion.images import write_image
from custom_diffusion.machine import peak_memory, return_freed_memory, trim_heap
from custom_diffusion.models.samplers import build_sampler
from custom_diffusion.report.page import REPORT_NAME
from custom_diffusion.training.checkpoints import STATE_NAME, cannot_write, put_checkpoint
from custom_diffusion.training.history import keep_history, read_history
from custom_diffusion.training.publishing import log_images, push_to_hub, upload_command
from custom_diffusion.training.run import Run, load_vae, precision_name
from custom_diffusion.training.settings import write_settings
from custom_diffusion.training.signals import StopSignal, during
from custom_diffusion.training.validation import best_step, measure_validation, prepare_validation, same_random_state

logger = logging.getLogger("custom_diffusion")

# Flags that a model card shows.
SHOWN_ON_CARD = (
    "freeze_model", "resolution", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "scale_lr",
    "mixed_precision", "with_prior_preservation", "real_prior", "hflip", "noaug", "padding_mode", "cutmix_probability",
    "seed",
)  # fmt: skip
# And those that it shows where they are not left at their defaults.
SHOWN_WHERE_CHANGED = {
    "token_gate": False,
    "rank": None,
    "rank_alpha": None,
    "optimizer": "adamw",
    "snr_gamma": None,
    "aspect_buckets": False,
    "masked_loss": False,
    "quantize_base": None,
}


def begin(run: Run, validation_images: list[tuple[Path, str]]) -> None:
    """Start the history of the run, prepare its validation loss, and show what the model knew where that is wanted.

    Args:
        validation_images: with their prompts; none for no validation loss.
    """
    args, folder = run.args, Path(run.args.output_dir)
    run.history = read_history(folder, run.steps.start)
    run.history.facts = describe_run(run, validation_images)
    run.validation = prepare_validation(run, validation_images)
    if run.steps.start == 0:
        with during("the validation before the first step", run.way_on):
            if args.validation_at_start:
                validate(run, 0, "validation")
            else:
                measure_validation(run, 0)


def describe_run(run: Run, validation_images: Sequence[tuple[Path, str]]) -> dict[str, Any]:
    """What the report says of a run: its images, prompts and settings."""
    args = run.args
    tokens = run.module.modifier_tokens.tokens
    return {
        "base_model": args.pretrained_model_name_or_path,
        "tokens": list(tokens),
        "instance_images": [[str(path.resolve()), prompt] for path, prompt in run.dataset.instance_images],
        "validation_images": [[str(path.resolve()), prompt] for path, prompt in validation_images],
        "class_images": len(run.dataset.class_images),
        "total_steps": run.steps.stop,
        "settings": {name: getattr(args, name) for name in SHOWN_ON_CARD},
        "next": [infer_command(run)],
    }


def validate(run: Run, step: int, phase: str) -> list[Image.Image]:
    """Compute the validation loss, and draw images of the validation prompts; the report shows both at once.

    Args:
        phase: name of the images in the trackers, ``validation`` on the way and ``test`` at the end.

    Returns:
        The images, those of the first prompt first; none without a prompt or on processes other than the main one.
    """
    if not run.accelerator.is_main_process:
        return []
    measure_validation(run, step)
    images = show_progress(run, step, phase)
    if images or run.validation:
        keep_history(run.history, Path(run.args.output_dir))
    return images


@torch.no_grad()
def show_progress(run: Run, step: int, phase: str) -> list[Image.Image]:
    """Images of the validation prompts from the models in memory, written to the output folder and the trackers.

    Args:
        phase: name of the images in the trackers, ``validation`` on the way and ``test`` at the end.

    Returns:
        The images; none without a prompt or on processes other than the main one.
    """
    args, accelerator = run.args, run.accelerator
    prompts = one_or_several(args.validation_prompt)
    if not prompts or args.num_validation_images == 0:
        return []
    with same_random_state(accelerator):
        images = draw_images(run, step)
    folder = Path(args.output_dir, "validation")
    folder.mkdir(exist_ok=True)
    names = [f"step_{step:06d}_{number}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        write_image(folder / name, image, "PNG")
    each = args.num_validation_images
    for row, prompt in enumerate(prompts):
        own = slice(row * each, (row + 1) * each)
        files = [f"{folder.name}/{name}" for name in names[own]]
        run.history.images.append({"step": step, "prompt": prompt, "files": files})
        for tracker in accelerator.trackers:
            log_images(tracker, images[own], prompt, phase if row == 0 else f"{phase}_{row + 1}", step)
    return images


def draw_images(run: Run, step: int) -> list[Image.Image]:
    """Images of the validation prompts from the models in memory, those of the first prompt first."""
    args, accelerator, module = run.args, run.accelerator, run.module
    module.eval()
    # Where the images are encoded ahead, the VAE is in memory only here. The Hub is not asked again.
    vae = run.latents.vae or load_vae(run.configuration, accelerator, local_files_only=True)
    module.text_encoders.to(accelerator.device)
    scheduler = build_sampler("dpmsolver++", module.noise_scheduler.config)
    pipeline = run.configuration.family.pipeline(
        vae, module.unet, scheduler, module.text_encoders, run.tokenizers, run.configuration.index
    )
    pipeline.set_progress_bar_config(desc=f"Images at step {step}", leave=False)
    images = []
    jobs = itertools.product(one_or_several(args.validation_prompt), range(args.num_validation_images))
    for prompt, number in jobs:
        # One at a time: validation should not need more memory than training.
        generator = torch.Generator().manual_seed(args.seed + number)
        with gated_prompts(run):
            latents = pipeline(
                prompt,
                num_inference_steps=25,
                height=args.resolution,
                width=args.resolution,
                generator=generator,
                output_type="latent",
            ).images
        # Not by the pipeline, which would ask a VAE that is kept in fp32 for latents in another type.
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        images += pipeline.image_processor.postprocess(decoded)
    module.train()
    del pipeline, vae
    if "instance" in run.dataset.conditioning:
        module.text_encoders.to("cpu")
    return_freed_memory()
    return images


def gated_prompts(run: Run) -> AbstractContextManager[None]:
    """Within, a pipeline of the models in memory finds at which words of its prompts the concepts act."""
    module = run.module
    if module.gate is None:
        return nullcontext()
    first = run.configuration.family.text_encoders[0].name
    return gates_beside_features(module.unet, module.text_encoders[first], module.gate)


def render_card(
    run: Run, concept: Concept, steps: int, images: Sequence[str] = (), ending: str = "safetensors"
) -> bytes:
    """The model card of a checkpoint or of the finished concept; ``ending`` is that of the files beside it."""
    args = run.args
    settings = {"steps": steps} | {name: getattr(args, name) for name in SHOWN_ON_CARD}
    settings |= {
        name: getattr(args, name) for name, default in SHOWN_WHERE_CHANGED.items() if getattr(args, name) != default
    }
    prompts = [entry.instance_prompt for entry in run.concepts]
    sample_prompt = next(iter(one_or_several(args.validation_prompt)), None)
    # A card has one prompt for its images: the first.
    shown = images[: args.num_validation_images]
    return model_card(concept, prompts, settings, sample_prompt, shown, ending=ending).encode()


def save_checkpoint(run: Run, step: int) -> None:
    """Write ``checkpoint-<step>``: the concept so far, and in ``training_state`` all that resuming needs.

    It gets its name only when it is complete, and older ones beyond the limit go only after that.

    Raises:
        UserError: where it cannot be written; earlier checkpoints are intact.
    """
    accelerator, output_dir = run.accelerator, Path(run.args.output_dir)
    path, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    try:
        trim_heap()  # room for the copies that are written
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            concept = run.learned()
            save_concept(concept, temporary, bin_too=False)
            write_card(temporary, render_card(run, concept, step))
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary / STATE_NAME))
        if accelerator.is_main_process:
            write_settings(run.settings, temporary / STATE_NAME)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a file cannot be written
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(path, error, output_dir) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        put_checkpoint(temporary, path, run.args.checkpoints_total_limit)
        keep_history(run.history, output_dir, with_report=False)  # so that a resumed run has the losses before it
    logger.info(f"saved {path}")


@dataclass(frozen=True)
class Result:
    """What a run leaves: the concept, its files, and which of them are sample images."""

    concept: Concept
    files: list[str]
    images: list[str]


def save_result(run: Run) -> Result:
    """Write weights, tokens, sample images and model card into the output folder.

    Raises:
        UserError: where the weights cannot be written.
        Interrupted: where a signal comes.
    """
    args, folder = run.args, Path(run.args.output_dir)
    # Checkpoints stay in full precision: a resumed run starts from their weights.
    concept = run.learned().to(DTYPES[args.save_precision])
    # Weights first: whatever happens to the images, what was learned is safe, and the card says what it belongs to.
    with during("the saving of the result", run.way_on):
        try:
            files = save_concept(concept, folder, safetensors_too=not args.no_safe_serialization)
        except (OSError, RuntimeError) as error:
            raise cannot_write(folder, error, folder) from error
        if args.no_safe_serialization:
            # An earlier run's safetensors would be preferred to what this one has just written.
            for name in files:
                (folder / name).with_suffix(".safetensors").unlink(missing_ok=True)
        write_card(folder, render_card(run, concept, run.steps.stop, ending=result_ending(args)))
    images = []
    with during("the final images", lambda: f"the result is complete without them. {what_next(run)}"):
        for number, image in enumerate(validate(run, run.steps.stop, "test")):
            images.append(f"image_{number}.png")
            write_image(folder / images[-1], image, "PNG")
        write_card(folder, render_card(run, concept, run.steps.stop, images, result_ending(args)))
    return Result(concept, [*files, *images, CARD_NAME], images)


def result_ending(args: argparse.Namespace) -> str:
    """The ending of the result's files that its card names."""
    return "bin" if args.no_safe_serialization else "safetensors"


def write_card(folder: Path, card: bytes) -> None:
    """Write a model card into a concept's folder."""
    write_bytes(folder / CARD_NAME, card)


def what_next(run: Run) -> str:
    """The commands with which one sees the result, and uploads it where that was asked for."""
    args = run.args
    upload = f"; upload it with: {upload_command(args.hub_model_id, args.output_dir)}" if args.push_to_hub else ""
    return f"See your concept with: {infer_command(run)}{upload}"


def infer_command(run: Run) -> str:
    """The command that shows what was learned."""
    args = run.args
    prompt = next(iter(one_or_several(args.validation_prompt)), run.concepts[0].instance_prompt)
    command = ["python", "infer.py", "--prompt", prompt]
    if args.output_dir != DEFAULT_MODEL:
        command += ["--model_dir", args.output_dir]
    return shlex.join(command)


def publish(run: Run, result: Result) -> str:
    """Upload exactly the files of the result; gives the address.

    Raises:
        UserError: where the upload fails; the message says how to try again.
    """
    args, folder = run.args, Path(run.args.output_dir)
    contents: dict[str, Path | bytes] = {name: folder / name for name in result.files}
    concept = result.concept.without_local_paths()
    if concept is not result.concept:
        # The Hub refuses a card whose base model is no model of its own, and a local path is nobody's business.
        what = "base model" if concept.base_model is None else "tokenizer"
        logger.warning(f"the {what} is a local folder: the card on the Hub will not name it")
        contents[CARD_NAME] = render_card(run, concept, run.steps.stop, result.images, result_ending(args))
    advice = partial(upload_command, args.hub_model_id, args.output_dir)
    with during("the upload", lambda: f"the files are safe in {args.output_dir!r}, upload them with: {advice()}"):
        return push_to_hub(args.hub_model_id, contents, args.output_dir, args.hub_token)


def print_summary(run: Run, seconds_per_step: float, names: Sequence[str], address: str | None) -> None:
    """What a user wants to know at the end, and what to type next."""
    args = run.args
    precision = precision_name(args.mixed_precision)
    print(f"\n{run.steps.stop} steps in {precision}, {seconds_per_step:.2f} s each, at most {peak_memory()}.")
    print(f"In {args.output_dir}: {', '.join(names)}" + (f", and on {address}" if address else ""))
    best = best_step(run, [checkpoint_step(path) for path in list_checkpoints(Path(args.output_dir))])
    if best is not None:
        print(f"{best}.")
    print(f"Look at the run: {Path(args.output_dir, REPORT_NAME)}")
    print(f"See your concept:\n  {infer_command(run)}")


def end_history(run: Run, seconds_per_step: float) -> None:
    """Complete the report: time, memory, which step was best, and what to type next."""
    args, folder = run.args, Path(run.args.output_dir)
    best = best_step(run, [checkpoint_step(path) for path in list_checkpoints(folder)])
    run.history.facts |= {
        "seconds_per_step": seconds_per_step,
        "memory": peak_memory(),
        "precision": precision_name(args.mixed_precision),
        "best": best,
        "next": [infer_command(run), evaluate_command(run)],
    }
    keep_history(run.history, folder)


def evaluate_command(run: Run) -> str:
    """The command that measures what was learned."""
    command = ["python", "evaluate.py", "--model_dir", run.args.output_dir, "--instance_data_dir"]
    return shlex.join([*command, *(str(concept.instance_folder) for concept in run.concepts)])


def finish(run: Run, seconds_per_step: float) -> None:
    """Save what was learned, publish it where that is asked for, and say where everything is.

    Raises:
        UserError: where something cannot be written or uploaded.
        Interrupted: where a signal comes, with what was going on and the way on.
    """
    accelerator = run.accelerator
    safe = f"the result is complete in {run.args.output_dir!r}"
    with StopSignal(accelerator, at_once=True):
        with during("the wait for the other processes", run.way_on):
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            result = save_result(run)
            end_history(run, seconds_per_step)
            address = publish(run, result) if run.args.push_to_hub else None
            print_summary(run, seconds_per_step, result.files, address)
        with during("the end of the run", lambda: safe):
            accelerator.wait_for_everyone()
            # Freed in this order, two processes end cleanly even on a busy machine.
            accelerator.end_training()
            del run.model, run.optimizer, run.lr_scheduler
            accelerator.free_memory()
