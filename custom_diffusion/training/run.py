"""A training run: what it is made of, and how its parts are set up."""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    send_to_device,
    set_seed,
)
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer

from custom_diffusion.command_line import CONFIG_NAME, config_text
from custom_diffusion.concept.checkpoint_folders import checkpoint_step, list_checkpoints
from custom_diffusion.concept.files import Concept, load_concept
from custom_diffusion.data.batches import collate_fn, position_batches
from custom_diffusion.data.caching import encode_images, encode_posterior, encode_texts, sample_latents
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.data.dataset import CustomDiffusionDataset
from custom_diffusion.errors import UserError, is_out_of_memory
from custom_diffusion.files import output_folder, write_bytes
from custom_diffusion.machine import computes_bf16, return_freed_memory, use_all_cores
from custom_diffusion.models.base_model import ModelConfiguration
from custom_diffusion.text import first_line
from custom_diffusion.training.checkpoints import (
    RESUME_ADVICE,
    STATE_NAME,
    check_is_within,
    check_output_dir,
    claim_output_dir,
    instead_of,
    remove_leftovers,
    way_on,
)
from custom_diffusion.training.environment import MOST_STEPS, contradictions
from custom_diffusion.training.history import History
from custom_diffusion.training.lock import lock_folder
from custom_diffusion.training.objective import CustomDiffusion
from custom_diffusion.training.processes import PATIENCE, check_processes_agree
from custom_diffusion.training.publishing import create_hub_repository, tracker_address
from custom_diffusion.training.settings import (
    SETTINGS_NAME,
    check_settings,
    describe_images,
    digest_of_tensors,
    read_settings,
)
from custom_diffusion.training.signals import leave_signals_to_the_run

logger = logging.getLogger("custom_diffusion")

LATENTS_NAME = "latents"  # folder of --keep_latents in --output_dir
DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial")  # schedules that depend on the run's length


@dataclass
class Run:
    """What the loop works with.

    Attributes:
        settings: all that decides what is learned, for comparison with another run.
        steps: the optimizer steps to take; those before ``steps.start`` are done already.
        model: the prepared module, maybe wrapped for several processes.
        history: what the report will show.
        validation: batches for the validation loss, see :func:`validation.prepare_validation`.
    """

    args: argparse.Namespace
    settings: dict[str, Any]
    accelerator: Accelerator
    concepts: list[ConceptEntry]
    configuration: ModelConfiguration
    tokenizers: dict[str, CLIPTokenizer]
    dataset: CustomDiffusionDataset
    steps: range
    latents: Latents
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    history: History = field(default_factory=History)
    validation: list[dict[str, Any]] = field(default_factory=list)

    @property
    def module(self) -> CustomDiffusion:
        """The module itself, without wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def learned(self) -> Concept:
        """What was learned so far."""
        concept = self.module.learned(self.args.pretrained_model_name_or_path)
        return concept.trained_on(replace(self.configuration.base_model, tokenizer=self.args.tokenizer_name))

    def way_on(self) -> str:
        """Words about how to continue where a signal has ended the run at once."""
        return way_on(Path(self.args.output_dir))


# --- the machine ---------------------------------------------------------------------------------


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """An accelerator that does what the flags say, logs to ``--report_to`` and leaves the choice of types to the model.

    Raises:
        UserError: where the flags or accelerate's own configuration ask for what this machine cannot do.
    """
    try:
        accelerator = Accelerator(
            # Not the number alone, which an environment variable would replace.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
            mixed_precision=args.mixed_precision,
            dynamo_backend="no",  # --torch_compile compiles the UNet alone
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir))),
            # So that the schedule counts optimizer steps, and not those of every process.
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            kwargs_handlers=[
                # The frozen weights are in the compute type already: autocast would only cast again at every step.
                AutocastKwargs(enabled=False),
                # All buffers are constants; those of text encoders that no step needs are not on the GPU.
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"accelerate cannot be set up on this machine: {first_line(error)}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError(
            "fp16 needs a GPU, and this run is on a CPU: give --mixed_precision=bf16 or --mixed_precision=no"
        )
    # Checkpoints hold what is trained, and the training script writes that; the frozen gigabytes stay where they are.
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    return accelerator


def compute_type(accelerator: Accelerator) -> torch.dtype:
    """The type of all that is frozen."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def precision_name(mixed_precision: str) -> str:
    """What to call a ``--mixed_precision``."""
    return "fp32" if mixed_precision == "no" else mixed_precision


def start(args: argparse.Namespace) -> Accelerator:
    """Take what the run needs of the machine, and clean up after a run in the same folder that was killed.

    Raises:
        UserError: as :func:`build_accelerator` does, and where another run is at work in the folder.
    """
    use_all_cores()
    accelerator = build_accelerator(args)
    quiet_libraries(accelerator)
    for sentence in contradictions(args):
        logger.warning(sentence)
    folder = Path(args.output_dir)
    if accelerator.is_main_process and folder.is_dir():
        lock_folder(folder)
        remove_leftovers(folder)
    accelerator.wait_for_everyone()
    # device_specific: a process's own random state is its own, though samples and noise do not depend on it.
    set_seed(args.seed, device_specific=True)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if compute_type(accelerator) == torch.bfloat16 and accelerator.device.type == "cpu" and not computes_bf16():
        logger.warning(
            "this CPU has no instructions for bf16: --mixed_precision=bf16 takes less memory, but its steps are slower"
        )
    return accelerator


def quiet_libraries(accelerator: Accelerator) -> None:
    """Leave the screen to our own messages and to warnings, and let only the main process speak."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks`")  # diffusers still passes it to the Hub
    # accelerate knows no other name for it yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
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
        UserError: where the folder cannot be written to or holds another run, or a tracker or the Hub refuses.
    """
    output_folder(args.output_dir)
    if not accelerator.is_main_process:
        return
    folder = Path(args.output_dir)
    lock_folder(folder)
    overwritten = check_output_dir(folder, settings, checkpoint, args.overwrite, args.max_train_steps, args.config)
    flags = config_text(args)  # as they were given: another run has another repository
    try:
        config = {name: value for name, value in vars(args).items() if name != "hub_token"}
        if isinstance(args.validation_prompt, list):  # trackers take single values
            config["validation_prompt"] = " | ".join(args.validation_prompt)
        accelerator.init_trackers("custom-diffusion", config=config)
    except Exception as error:  # each tracker raises its own
        raise UserError(f"--report_to={args.report_to}: {first_line(error)}") from error
    for tracker in accelerator.trackers:
        logger.info(f"follow this run: {tracker_address(tracker)}")
    if args.push_to_hub:
        name = args.hub_model_id or folder.resolve().name
        args.hub_model_id = create_hub_repository(name, args.hub_token)
    # Last: whoever refuses before this leaves what is there as it was.
    claim_output_dir(folder, settings, overwritten)
    write_bytes(folder / CONFIG_NAME, flags)


# --- what is trained, and on what ----------------------------------------------------------------


def plan_steps(
    args: argparse.Namespace, dataset: CustomDiffusionDataset, checkpoint: Path | None, num_processes: int
) -> range:
    """The optimizer steps to take: up to ``--max_train_steps`` or the end of ``--num_train_epochs`` passes.

    Raises:
        UserError: for too many steps; each of them is planned ahead.
    """
    batches_per_epoch = math.ceil(len(dataset) / (args.train_batch_size * num_processes))
    steps_per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    total = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    if total > MOST_STEPS:
        raise UserError(f"--num_train_epochs gives {total} steps, more than {MOST_STEPS}: give a smaller number")
    return range(0 if checkpoint is None else checkpoint_step(checkpoint), total)


def check_inputs(
    args: argparse.Namespace,
    settings: dict[str, Any],
    class_images: Sequence[tuple[Path, str]],
    steps: range,
    checkpoint: Path | None,
    accelerator: Accelerator,
) -> None:
    """Complete the settings, and compare them between the processes and with those of the checkpoint.

    Raises:
        UserError: where processes see other inputs than the main one, or the checkpoint was made of others or is
            beyond the end of the run.
    """
    if class_images:
        settings.setdefault("class_images", describe_images(class_images))
    settings["total_steps"] = steps.stop
    check_processes_agree(settings, None if checkpoint is None else checkpoint.name, accelerator)
    if checkpoint is None:
        return
    path = checkpoint / STATE_NAME / SETTINGS_NAME
    check_settings(settings, path, RESUME_ADVICE)
    earlier = read_settings(path)
    if earlier:
        check_is_within(checkpoint, steps.stop)
    total_steps = earlier.get("total_steps", steps.stop)
    if total_steps != steps.stop and args.lr_scheduler in DECAYING:
        logger.warning(
            f"--lr_scheduler={args.lr_scheduler} spans the whole run: up to step {steps.start} the learning rates were "
            f"those of a run of {total_steps} steps, and from there on they are those of one of {steps.stop}"
        )


def fit_to_machine(
    model: CustomDiffusion, args: argparse.Namespace, accelerator: Accelerator, latent_size: int
) -> None:
    """Hold what is frozen in the compute type, and compute again rather than keep what the flags or a CPU ask for."""
    # On CPUs channels_last makes no difference (benchmarks/README.md).
    model.cast_frozen(compute_type(accelerator), channels_last=accelerator.device.type == "cuda")
    model.train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    # Compiled, torch itself chooses what to compute again.
    elif accelerator.device.type == "cpu" and not args.torch_compile:
        model.recompute_cheaply(latent_size)
    if args.torch_compile:
        model.compile_unet()


def build_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The schedule of the learning rate, in optimizer steps."""
    if args.lr_scheduler != "constant" and args.lr_warmup_steps > total_steps:
        logger.warning(
            f"--lr_warmup_steps={args.lr_warmup_steps} is longer than the run of {total_steps} steps, which will not "
            "reach its learning rate"
        )
    return get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps,
    )


# --- latents and batches -------------------------------------------------------------------------


@dataclass
class Latents:
    """Where the latents of a batch come from.

    Attributes:
        vae: None where the images are encoded already.
        scaling_factor: of the VAE's latents.
        width: of one image in pixels, where several may be beside each other.
    """

    vae: AutoencoderKL | None
    scaling_factor: float
    width: int | None

    def draw(self, batch: dict[str, Any]) -> Tensor:
        """Take out of a batch what its latents are drawn from, and draw them: (N, C, H, W), scaled, float32."""
        posterior = batch.pop("posterior", None)
        if posterior is None:
            posterior = encode_posterior(self.vae, batch.pop("pixel_values"), self.width)
        return sample_latents(posterior, batch.pop("posterior_noise"), self.scaling_factor)


def load_vae(configuration: ModelConfiguration, accelerator: Accelerator, **options: Any) -> AutoencoderKL:
    """The frozen VAE, on the device, in the type that its family wants; ``options`` go to ``from_pretrained``."""
    dtype = configuration.family.vae_dtype(configuration.vae, compute_type(accelerator))
    return configuration.base_model.vae(dtype, **options).to(accelerator.device)


def prepare_latents(
    args: argparse.Namespace,
    dataset: CustomDiffusionDataset,
    steps: range,
    configuration: ModelConfiguration,
    accelerator: Accelerator,
) -> Latents:
    """Load the VAE, and encode what the steps will show; with ``--no_latent_cache`` every step encodes instead."""
    vae = load_vae(configuration, accelerator)
    latents = Latents(vae, vae.config.scaling_factor, None if args.aspect_buckets else args.resolution)
    if not args.no_latent_cache:
        folder = Path(args.output_dir, LATENTS_NAME) if args.keep_latents else None
        encode_images(dataset, dataset.positions(steps), vae, accelerator, folder, args.dataloader_num_workers)
        latents.vae = vae = None
        return_freed_memory()
    return latents


def cache_texts(run: Run) -> None:
    """Encode the captions that hold nothing to learn, once; what encodes may then leave the device."""
    module, device = run.module, run.accelerator.device
    positions = run.dataset.positions(run.steps)
    encode_texts(run.dataset, positions, module.encode_prompts, module.modifier_tokens.ids, device)
    if "instance" in run.dataset.conditioning:
        # No step needs them any more.
        module.text_encoders.to("cpu")


def training_batches(run: Run) -> Iterator[dict[str, Any]]:
    """The batches of this process for all steps, on its device."""
    args, accelerator = run.args, run.accelerator
    accumulation = args.gradient_accumulation_steps
    positions = position_batches(
        first=run.steps.start * accumulation,
        count=len(run.steps) * accumulation,
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
            latent_channels=run.configuration.latent_channels,
            num_train_timesteps=run.configuration.noise_scheduler.config.num_train_timesteps,
        ),
        num_workers=args.dataloader_num_workers,
        worker_init_fn=leave_signals_to_the_run,
        pin_memory=on_gpu,
    )
    for batch in loader:
        yield send_to_device(batch, accelerator.device, non_blocking=on_gpu)


def resume(run: Run, path: Path | None) -> None:
    """Continue from a checkpoint, where there is one.

    Raises:
        UserError: where it was trained from other weights, or is beyond the end of the run.
    """
    run.settings["starting_values"] = digest_of_tensors(run.module.trained().values())
    if run.args.rank is not None or run.args.token_gate:
        # What is trained then starts from zeros and random values, whatever the base model is.
        frozen = [value for name, value in run.module.unet.named_parameters() if ".attn2.to_" in name]
        run.settings["base_values"] = digest_of_tensors(frozen)
    if path is None:
        present = list_checkpoints(Path(run.args.output_dir))
        if present and run.args.resume_from_checkpoint is None:
            logger.warning(
                f"{run.args.output_dir!r} holds checkpoints of an earlier run, up to {present[-1].name}; "
                "this run starts afresh and replaces those of the same steps; "
                "--resume_from_checkpoint=latest would continue it"
            )
        return
    state = path / STATE_NAME
    check_settings(run.settings, state / SETTINGS_NAME, RESUME_ADVICE)
    run.module.restore(load_concept(path))
    check_is_within(path, run.steps.stop)
    load_state(run, state)
    logger.info(f"resuming from {path}")


def load_state(run: Run, state: Path) -> None:
    """Give optimizer, schedule and random numbers the state that a checkpoint has kept.

    Raises:
        UserError: where the state is damaged.
    """
    try:
        run.accelerator.load_state(str(state))
    except Exception as error:  # accelerate, torch, pickle and safetensors each raise their own
        if is_out_of_memory(error):
            raise
        raise UserError(f"{str(state)!r} cannot be read ({first_line(error)}): {instead_of(state.parent)}") from error
    # It counts batches, whose size may be another now; checkpoints are only written between optimizer steps.
    run.accelerator.step = 0
    if "schedule_counts" not in read_settings(state / SETTINGS_NAME):
        # A checkpoint of the time when each process counted the steps of all.
        run.lr_scheduler.scheduler.last_epoch //= len(list(state.glob("random_states_*.pkl"))) or 1


def announce(run: Run) -> None:
    """Say what the steps are made of."""
    args = run.args
    logger.info(
        f"{len(run.dataset.instance_images)} instance images, {len(run.dataset.class_images)} class images; "
        f"{len(run.steps)} steps of {args.train_batch_size} x {run.accelerator.num_processes} processes "
        f"x {args.gradient_accumulation_steps} accumulation, in {precision_name(args.mixed_precision)}; "
        f"{sum(parameter.numel() for parameter in run.module.trained().values()):,} trained values"
    )
