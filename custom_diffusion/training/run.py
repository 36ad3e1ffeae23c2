"""A training run: what it is made of, and what it saves."""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, ProjectConfiguration, set_seed
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTextModel, CLIPTokenizer

from custom_diffusion.command_line import CONFIG_NAME, save_config
from custom_diffusion.concept.cards import model_card
from custom_diffusion.concept.files import CARD_NAME, Concept, load_concept, save_concept
from custom_diffusion.data.caching import encode_images, encode_texts
from custom_diffusion.data.class_images import generate_class_images
from custom_diffusion.data.concept_list import ConceptEntry, read_concepts
from custom_diffusion.data.dataset import CustomDiffusionDataset, collate_fn, position_batches
from custom_diffusion.data.images import find_class_images, find_instance_images
from custom_diffusion.errors import UserError
from custom_diffusion.files import is_hub_id, output_folder, write_whole
from custom_diffusion.images import write_image
from custom_diffusion.machine import computes_bf16, peak_memory, return_freed_memory, trim_heap
from custom_diffusion.models.base_model import BaseModel, check_base_model, load_pretrained, load_tokenizer
from custom_diffusion.training.checkpoints import (
    cannot_write,
    checkpoint_step,
    claim_output_dir,
    describe_settings,
    find_checkpoint,
    last_checkpoint,
    list_checkpoints,
    put_checkpoint,
    remove_leftovers,
    write_settings,
)
from custom_diffusion.training.objective import CustomDiffusion
from custom_diffusion.training.publishing import create_hub_repository, log_images, push_to_hub, tracker_address
from custom_diffusion.training.signals import leave_signals_to_the_run
from custom_diffusion.training.tokens import ModifierTokens, add_modifier_tokens, parse_modifier_tokens
from train_custom_diffusion import build_parser

logger = logging.getLogger("custom_diffusion")


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """An accelerator that logs to ``--report_to`` and leaves the choice of types to the model.

    Raises:
        UserError: where accelerate's own configuration asks for what this machine cannot do.
    """
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
            kwargs_handlers=[
                # The frozen weights are in the compute type already: autocast would only cast again at every step.
                AutocastKwargs(enabled=False),
            ],
        )
    except ValueError as error:
        raise UserError(f"accelerate's configuration does not fit this machine: {error}") from error
    # Checkpoints hold what is trained, and the training script writes that; the frozen gigabytes stay where they are.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    return accelerator


STEPS_BETWEEN_READS = 10  # of losses on a GPU: reading one waits until the GPU has done all that it was given


LATENTS_NAME = "latents"  # folder of --keep_latents in --output_dir


# Flags that a model card shows.
SHOWN_ON_CARD = (
    "freeze_model", "resolution", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "scale_lr",
    "with_prior_preservation", "real_prior", "hflip", "noaug", "padding_mode", "cutmix_probability", "seed",
)  # fmt: skip


MOST_SKIPPED_STEPS = 50  # fp16's loss scale halves at each; 2^50 is far below anything that helps


def build_dataset(args: argparse.Namespace, inputs: Inputs, accelerator: Accelerator) -> CustomDiffusionDataset:
    """The training samples; class images that are missing are generated first."""
    class_images = inputs.class_images
    if args.with_prior_preservation and not args.real_prior:
        generate_class_images(
            inputs.base,
            inputs.concepts,
            accelerator,
            args.num_class_images,
            args.sample_batch_size,
            args.seed,
            args.prior_generation_precision,
        )
        class_images = find_class_images(inputs.concepts, args.num_class_images, real_prior=False)
    return CustomDiffusionDataset(
        inputs.instance_images,
        class_images,
        inputs.tokenizer,
        size=args.resolution,
        mask_size=inputs.latent_size,
        center_crop=args.center_crop,
        hflip=args.hflip,
        aug=not args.noaug,
        seed=args.seed,
        variants=None if args.no_latent_cache else args.latent_variants,
        cutmix_probability=args.cutmix_probability,
        samples_per_step=args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps,
        padding_mode=args.padding_mode,
    )


@dataclass(frozen=True)
class Inputs:
    """What the user gave, read and checked; no weights among it."""

    base: BaseModel
    concepts: list[ConceptEntry]
    instance_images: list[tuple[Path, str]]
    class_images: list[tuple[Path, str]]
    checkpoint: Path | None
    noise_scheduler: DDPMScheduler
    latent_channels: int
    latent_size: int
    tokenizer: CLIPTokenizer
    modifier_tokens: ModifierTokens


def check_inputs(args: argparse.Namespace) -> Inputs:
    """Read and check all that is small: a mistake should show before anything slow is loaded or written."""
    concepts = read_concepts(args)
    tokens, initializers = parse_modifier_tokens(args, concepts)
    instance_images = find_instance_images(concepts, tokens)
    class_images = find_class_images(concepts, args.num_class_images, real_prior=True) if args.real_prior else []
    checkpoint = find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
    base = BaseModel(args.pretrained_model_name_or_path, args.revision, args.variant)
    noise_scheduler, latent_channels, latent_size = check_base_model(base, args.resolution)
    tokenizer = load_tokenizer(base, args.tokenizer_name)
    modifier_tokens = add_modifier_tokens(tokenizer, tokens, initializers)
    if args.cutmix_probability:
        check_cutmix(instance_images, tokenizer, args.concepts_list)
    return Inputs(
        base,
        concepts,
        instance_images,
        class_images,
        checkpoint,
        noise_scheduler,
        latent_channels,
        latent_size,
        tokenizer,
        modifier_tokens,
    )


def check_cutmix(instance_images: Sequence[tuple[Path, str]], tokenizer: CLIPTokenizer, concepts_list: str) -> None:
    """Make sure that there are two concepts to show beside each other, and that their prompts fit into one.

    Raises:
        UserError: where all images are in one folder, or the words of the second concept could be cut off, which
            would teach it to those of the first.
    """
    longest: dict[Path, tuple[int, str]] = {}
    for path, prompt in instance_images:
        length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        longest[path.parent] = max(longest.get(path.parent, (0, "")), (length, prompt))
    if len(longest) < 2:
        raise UserError(
            f"--cutmix_probability shows one concept beside another, and {concepts_list!r} has images in one "
            "folder only: leave it out, or give each concept an instance_data_dir of its own"
        )
    (one, left), (other, right) = sorted(longest.values())[-2:]
    # With "next to" between them, and the start and end tokens.
    if one + other + 4 > tokenizer.model_max_length:
        raise UserError(
            f"--cutmix_probability joins two prompts, and {left!r} and {right!r} together are too long for the "
            f"{tokenizer.model_max_length} tokens of the text encoder: shorten them, or leave the flag out"
        )


@dataclass
class Run:
    """What the loop works with.

    Attributes:
        vae: None where the images are encoded already.
        scaling_factor: of the VAE's latents.
        model: the prepared module, maybe wrapped for several processes.
    """

    args: argparse.Namespace
    inputs: Inputs
    settings: dict[str, Any]
    accelerator: Accelerator
    vae: AutoencoderKL | None
    scaling_factor: float
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    dataset: CustomDiffusionDataset
    total_steps: int

    @property
    def module(self) -> CustomDiffusion:
        """The module itself, without wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def learned(self) -> Concept:
        """What was learned so far."""
        return self.module.learned(self.args.pretrained_model_name_or_path)


def build_optimizer(
    args: argparse.Namespace, parameters: list[nn.Parameter], accelerator: Accelerator
) -> torch.optim.Optimizer:
    """AdamW over what is trained, with the learning rate scaled as ``--scale_lr`` says."""
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
        learning_rate *= 2.0 if args.with_prior_preservation else 1.0
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    else:
        # Under fp16 the fused kernel would skip steps by itself, and accelerate could not tell.
        fused = accelerator.device.type in ("cpu", "cuda") and accelerator.mixed_precision != "fp16"
        optimizer_class = partial(torch.optim.AdamW, fused=fused)
    return optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def quiet_libraries(accelerator: Accelerator) -> None:
    """Leave the screen to our own messages and to warnings, and let only the main process speak."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks`")  # diffusers still passes it to the Hub
    for library in (transformers, diffusers):
        if accelerator.is_local_main_process:
            library.utils.logging.set_verbosity_warning()
        else:
            library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def open_output_dir(
    args: argparse.Namespace, settings: dict[str, Any], checkpoint: Path | None, accelerator: Accelerator
) -> None:
    """Make the output folder this run's, and start all that records it: configuration, trackers and the Hub.

    Raises:
        UserError: where the folder cannot be written to or holds another run, or the Hub refuses.
    """
    output_folder(args.output_dir)
    if not accelerator.is_main_process:
        return
    claim_output_dir(Path(args.output_dir), settings, checkpoint, args.overwrite)
    save_config(args, Path(args.output_dir, CONFIG_NAME))
    accelerator.init_trackers("custom-diffusion", config={k: v for k, v in vars(args).items() if k != "hub_token"})
    for tracker in accelerator.trackers:
        logger.info(f"follow this run: {tracker_address(tracker)}")
    if args.push_to_hub:
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        args.hub_model_id = create_hub_repository(name, args.hub_token)


def compute_type(accelerator: Accelerator) -> torch.dtype:
    """The type of all that is frozen."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def load_vae(base: BaseModel, accelerator: Accelerator, **options: Any) -> AutoencoderKL:
    """The frozen VAE, on the device; ``options`` go to ``from_pretrained``."""
    dtype = compute_type(accelerator)
    vae = load_pretrained(base, AutoencoderKL.from_pretrained, "vae", variant=base.variant, dtype=dtype, **options)
    return vae.requires_grad_(False).to(accelerator.device)


def load_model(args: argparse.Namespace, inputs: Inputs, accelerator: Accelerator) -> CustomDiffusion:
    """The trainable module; all that is frozen in it is in the compute type."""
    load = partial(load_pretrained, inputs.base, variant=inputs.base.variant, dtype=torch.float32)
    # The projections to train are copied from these full-precision weights, before the rest is cast.
    model = CustomDiffusion(
        load(CLIPTextModel.from_pretrained, "text_encoder"),
        load(UNet2DConditionModel.from_pretrained, "unet"),
        inputs.noise_scheduler,
        inputs.modifier_tokens,
        train_q_out=args.freeze_model == "crossattn",
        use_xformers=args.enable_xformers_memory_efficient_attention,
        prior_loss_weight=args.prior_loss_weight if args.with_prior_preservation else None,
    )
    # On CPUs it makes no difference (benchmarks/README.md).
    model.cast_frozen(compute_type(accelerator), channels_last=accelerator.device.type == "cuda")
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # Compiled, torch itself chooses what to compute again.
    elif accelerator.device.type == "cpu" and not args.torch_compile:
        model.recompute_cheaply(inputs.latent_size)
    if args.torch_compile:
        model.compile_unet()
    return model


def prepare_run(args: argparse.Namespace) -> Run:
    """Everything up to the first step."""
    accelerator = build_accelerator(args)
    quiet_libraries(accelerator)
    if accelerator.is_main_process:
        remove_leftovers(Path(args.output_dir))
    accelerator.wait_for_everyone()
    inputs = check_inputs(args)
    # device_specific: a process's own random state is its own, though samples and noise do not depend on it.
    set_seed(args.seed, device_specific=True)
    settings = describe_settings(args, inputs.instance_images, inputs.concepts, accelerator.num_processes)
    open_output_dir(args, settings, inputs.checkpoint, accelerator)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if compute_type(accelerator) == torch.bfloat16 and accelerator.device.type == "cpu" and not computes_bf16():
        logger.warning(
            "this CPU has no instructions for bf16: --mixed_precision=bf16 takes less memory, but its steps are slower"
        )
    dataset = build_dataset(args, inputs, accelerator)
    batches_per_epoch = math.ceil(len(dataset) / (args.train_batch_size * accelerator.num_processes))
    steps_per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    total_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch

    first_step = 0 if inputs.checkpoint is None else checkpoint_step(inputs.checkpoint)
    positions = range(first_step * dataset.samples_per_step, total_steps * dataset.samples_per_step)
    # Before the rest is loaded: the VAE has the memory to itself, and large batches are fast.
    vae = load_vae(inputs.base, accelerator)
    scaling_factor = vae.config.scaling_factor
    if not args.no_latent_cache:
        folder = Path(args.output_dir, LATENTS_NAME) if args.keep_latents else None
        encode_images(dataset, positions, vae, accelerator, folder, args.dataloader_num_workers)
        vae = None
        return_freed_memory()
    model = load_model(args, inputs, accelerator)
    optimizer = build_optimizer(args, list(model.trained().values()), accelerator)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        # accelerate steps the schedule once per process.
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
    module = accelerator.unwrap_model(model)
    encode_texts(dataset, positions, module.encode_prompts, inputs.modifier_tokens.ids, accelerator.device)
    if "instance" in dataset.text_features:
        # No step needs it any more.
        module.text_encoder.to("cpu")
    return Run(
        args, inputs, settings, accelerator, vae, scaling_factor, model, optimizer, lr_scheduler, dataset, total_steps
    )


def resume(run: Run) -> int:
    """Go on from the checkpoint of ``--resume_from_checkpoint``; gives the number of steps already done."""
    path = run.inputs.checkpoint
    if path is None:
        present = list_checkpoints(Path(run.args.output_dir))
        if present and run.args.resume_from_checkpoint is None:
            logger.warning(
                f"{run.args.output_dir!r} holds checkpoints of an earlier run, up to {present[-1].name}; "
                "this run starts afresh and replaces those of the same steps; "
                "--resume_from_checkpoint=latest would go on"
            )
        return 0
    run.module.restore(load_concept(path))
    run.accelerator.load_state(str(path / "training_state"))
    logger.info(f"resuming from {path}")
    return checkpoint_step(path)


def training_batches(run: Run, first_step: int) -> Iterator[dict[str, Tensor]]:
    """The batches of this process from ``first_step`` to the end of the run, on its device."""
    args, accelerator = run.args, run.accelerator
    accumulation = args.gradient_accumulation_steps
    positions = position_batches(
        first=first_step * accumulation,
        count=max(0, run.total_steps - first_step) * accumulation,
        batch_size=args.train_batch_size,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    on_gpu = accelerator.device.type == "cuda"
    loader = DataLoader(
        run.dataset,
        batch_sampler=positions,
        collate_fn=partial(
            collate_fn,
            with_prior_preservation=args.with_prior_preservation,
            latent_channels=run.inputs.latent_channels,
            num_train_timesteps=run.inputs.noise_scheduler.config.num_train_timesteps,
        ),
        num_workers=args.dataloader_num_workers,
        worker_init_fn=leave_signals_to_the_run,
        pin_memory=on_gpu,
    )
    for batch in loader:
        yield {name: value.to(accelerator.device, non_blocking=on_gpu) for name, value in batch.items()}


@dataclass(frozen=True)
class StepRecord:
    """A step whose losses have not been read yet.

    Attributes:
        losses: loss, instance loss and prior loss, (3,), on the device.
        skipped_steps: how many steps in a row fp16's loss scaling has skipped, up to this one.
    """

    step: int
    losses: Tensor
    learning_rate: float
    skipped_steps: int


def report_steps(run: Run, records: Sequence[StepRecord]) -> dict[str, str]:
    """Read the losses of these steps, check and log them; gives what to show of the last.

    Raises:
        UserError: as :func:`check_loss` does.
    """
    shown = {}
    for record, losses in zip(records, torch.stack([record.losses for record in records]).tolist(), strict=True):
        check_loss(run, losses[0], record.step, record.skipped_steps)
        logs = {"loss": losses[0], "lr": record.learning_rate}
        if run.args.with_prior_preservation:
            logs |= {"instance_loss": losses[1], "prior_loss": losses[2]}
        run.accelerator.log(logs, step=record.step)
        shown = {"loss": f"{losses[0]:.4f}", "lr": f"{record.learning_rate:.1e}"}
    return shown


def check_loss(run: Run, loss: float, step: int, skipped_steps: int) -> None:
    """Stop where training has failed.

    Args:
        loss: of this step.
        skipped_steps: how many steps in a row fp16's loss scaling has skipped, as it does now and then.

    Raises:
        UserError: with the step, the last good checkpoint and what to try.
    """
    if skipped_steps == 0 and not math.isfinite(loss):
        what = f"the loss of step {step} is not finite"
    elif skipped_steps >= MOST_SKIPPED_STEPS:
        what = f"fp16 has overflowed in {skipped_steps} steps in a row up to step {step}"
    else:
        return
    raise UserError(
        f"{what}, and training stops; {last_checkpoint(Path(run.args.output_dir))}. Likely causes: --learning_rate "
        f"(with --scale_lr {run.optimizer.param_groups[0]['lr']:.1e}) is too high, or fp16 overflows (use "
        "--mixed_precision bf16 or no)"
    )


@torch.no_grad()
def validate(run: Run, step: int, phase: str) -> list[Image.Image]:
    """Images of ``--validation_prompt`` from the models in memory, written to the output folder and the trackers.

    Args:
        phase: name of the images in the trackers, ``validation`` on the way and ``test`` at the end.

    Returns:
        The images; none without a prompt or on processes other than the main one.
    """
    args, accelerator = run.args, run.accelerator
    if args.validation_prompt is None or args.num_validation_images == 0 or not accelerator.is_main_process:
        return []
    module = run.module
    module.eval()
    # Where the images are encoded ahead, the VAE is in memory only here. The Hub is not asked again.
    vae = run.vae or load_vae(run.inputs.base, accelerator, local_files_only=True)
    module.text_encoder.to(accelerator.device)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=module.text_encoder,
        tokenizer=run.inputs.tokenizer,
        unet=module.unet,
        scheduler=DPMSolverMultistepScheduler.from_config(module.noise_scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(desc=f"Images at step {step}", leave=False)
    images = []
    for number in range(args.num_validation_images):
        # One at a time: validation should not need more memory than training.
        generator = torch.Generator().manual_seed(args.seed + number)
        images += pipeline(
            args.validation_prompt,
            num_inference_steps=25,
            height=args.resolution,
            width=args.resolution,
            generator=generator,
        ).images
    module.train()
    del pipeline, vae
    if "instance" in run.dataset.text_features:
        module.text_encoder.to("cpu")
    return_freed_memory()

    folder = Path(args.output_dir, "validation")
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        write_image(folder / f"step_{step:06d}_{number}.png", image, "PNG")
    for tracker in accelerator.trackers:
        log_images(tracker, images, args.validation_prompt, phase, step)
    return images


def render_card(run: Run, concept: Concept, steps: int, images: Sequence[str] = ()) -> bytes:
    """The model card of a checkpoint or of the finished concept."""
    args = run.args
    settings = {"steps": steps} | {name: getattr(args, name) for name in SHOWN_ON_CARD}
    prompts = [entry.instance_prompt for entry in run.inputs.concepts]
    return model_card(concept, prompts, settings, args.validation_prompt, images).encode()


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
            card = render_card(run, concept, step)
            write_whole(temporary / CARD_NAME, lambda file: file.write(card))
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary / "training_state"))
        if accelerator.is_main_process:
            write_settings(run.settings, temporary / "training_state")
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where a file cannot be written
        shutil.rmtree(temporary, ignore_errors=True)
        raise cannot_write(path, error, output_dir) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        put_checkpoint(temporary, path, run.args.checkpoints_total_limit)
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
    """
    args, folder = run.args, Path(run.args.output_dir)
    concept = run.learned()
    # Weights first: whatever happens to the images, what was learned is safe.
    try:
        files = save_concept(concept, folder, safetensors_too=not args.no_safe_serialization)
    except (OSError, RuntimeError) as error:
        raise cannot_write(folder, error, folder) from error
    if args.no_safe_serialization:
        # An earlier run's safetensors would be preferred to what this one has just written.
        for name in files:
            (folder / name).with_suffix(".safetensors").unlink(missing_ok=True)
    images = []
    for number, image in enumerate(validate(run, run.total_steps, "test")):
        images.append(f"image_{number}.png")
        write_image(folder / images[-1], image, "PNG")
    card = render_card(run, concept, run.total_steps, images)
    write_whole(folder / CARD_NAME, lambda file: file.write(card))
    return Result(concept, [*files, *images, CARD_NAME], images)


def publish(run: Run, result: Result) -> str:
    """Upload exactly the files of the result; gives the address.

    Raises:
        UserError: where the upload fails; the message says how to try again.
    """
    args, folder = run.args, Path(run.args.output_dir)
    contents: dict[str, Path | bytes] = {name: folder / name for name in result.files}
    if not is_hub_id(args.pretrained_model_name_or_path):
        # The Hub refuses a card whose base model is no model of its own, and a local path is nobody's business.
        logger.warning("the base model is a local folder: the card on the Hub will not name it")
        concept = replace(result.concept, base_model=None)
        contents[CARD_NAME] = render_card(run, concept, run.total_steps, result.images)
    return push_to_hub(args.hub_model_id, contents, args.output_dir, args.hub_token)


def print_summary(run: Run, seconds_per_step: float, names: Sequence[str], address: str | None) -> None:
    """What a user wants to know at the end, and what to type next."""
    args = run.args
    prompt = args.validation_prompt or run.inputs.concepts[0]["instance_prompt"]
    command = ["python", "infer.py", "--prompt", prompt]
    if args.output_dir != build_parser().get_default("output_dir"):
        command += ["--model_dir", args.output_dir]
    print(f"\n{run.total_steps} steps, {seconds_per_step:.2f} s each, at most {peak_memory()}.")
    print(f"In {args.output_dir}: {', '.join(names)}" + (f", and on {address}" if address else ""))
    print(f"See your concept:\n  {shlex.join(command)}")
