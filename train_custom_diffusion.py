"""Teach a text-to-image diffusion model new concepts from a few images of each, with Custom Diffusion.

Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", CVPR 2023 (arXiv 2212.04488): fine-tune the
key and value projections of the UNet's cross-attention and one new word per concept, on the images plus class
images that keep what the model knew. This file has the flags, the method in the order of :func:`main`, and the loop;
the package custom_diffusion has the parts.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
from collections.abc import Mapping, Sequence

from custom_diffusion.command_line import (
    DEFAULT_MODEL,
    HelpFormatter,
    OneOrSeveral,
    denoising_steps,
    end_quietly_on_interrupt,
    import_diffusers,
    one_or_several,
    parse_with_config,
    positive_int,
    positive_number,
    run,
    seed_number,
    switch,
)
from custom_diffusion.errors import UserError
from custom_diffusion.training.environment import MOST_STEPS, follow_configuration, runs_on_cpu
from custom_diffusion.training.trackers import tracker_problem

# diffusers' and accelerate's names, which would take seconds to import.
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
)  # fmt: skip
TRACKERS = (
    "all", "aim", "tensorboard", "wandb", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab", "trackio", "none",
)  # fmt: skip

# What holds the frozen UNet in fewer bits, and the extra that installs it.
QUANTIZERS = {"8bit": ("torchao", "quantize"), "4bit": ("bitsandbytes", "8bit")}

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor")
# What they do not have. A value other than the default would silently do nothing.
MEANINGLESS = {
    "prodigy": ("scale_lr",),
    "adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon"),
}
LEAST_PRODIGY_RATE = 0.01  # below it somebody means another optimizer's learning rate

LAST_POLYNOMIAL_RATE = 1e-7  # diffusers'

# Of numbers: the least that works, and what they have to be below.
RANGES = {
    "learning_rate": (0.0, math.inf), "prior_loss_weight": (0.0, math.inf), "adam_beta1": (0.0, 1.0),
    "adam_beta2": (0.0, 1.0), "adam_weight_decay": (0.0, math.inf), "adam_epsilon": (0.0, math.inf),
}  # fmt: skip

# --- flags ---------------------------------------------------------------------------------------


# fmt: off
def build_parser() -> argparse.ArgumentParser:
    """The command line of diffusers' example, flag for flag."""
    parser = argparse.ArgumentParser(
        description="Teach a Stable Diffusion model new concepts from a few images of each (Custom Diffusion).",
        usage="%(prog)s --pretrained_model_name_or_path MODEL --instance_data_dir IMAGES "
              "--instance_prompt 'photo of a <new1> cat' --modifier_token '<new1>' [more options: --help]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    is_on = {"type": switch, "nargs": "?", "const": True, "default": False, "metavar": "True|False"}

    add = parser.add_argument_group("base model").add_argument
    add("--pretrained_model_name_or_path", required=True,
        help="Folder or Hub id of a Stable Diffusion 1.x, 2.x or XL model.")
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help="Variant of the model's files, such as fp16.")
    add("--tokenizer_name", help="Folder or Hub id of another tokenizer than the model's.")
    add("--pretrained_vae_model_name_or_path",
        help="Folder or Hub id of another VAE than the model's, such as madebyollin/sdxl-vae-fp16-fix.")

    add = parser.add_argument_group("concepts").add_argument
    add("--instance_data_dir", help="Folder with four or five images of the concept, or id of a dataset on the Hub; "
        "photo.txt beside photo.jpg, or metadata.jsonl, may hold a prompt for each in place of --instance_prompt.")
    add("--instance_prompt", help="Prompt that names the concept, such as 'photo of a <new1> cat'.")
    add("--modifier_token", help="The concept's new word; several are joined with '+': '<new1>+<new2>'. "
        "Without it only the attention is trained.")
    add("--initializer_token", default="ktn+pll+ucd",
        help="Where the new words start from, joined with '+': entries of the vocabulary ('ktn', or 'cat</w>' for the "
        "whole word cat), or else words that are one token.")
    add("--concepts_list", help="JSON file with several concepts: a list of {instance_prompt, class_prompt, "
        "instance_data_dir, class_data_dir, validation_data_dir}. Replaces the flags of these names.")
    add("--masked_loss", **is_on,
        help="The loss counts inside the mask of each instance image: mask/photo.png or photo-masklabel.png beside "
        "photo.jpg, white inside, or the image's own alpha channel, whose hidden colours are then shown.")
    add("--unmasked_weight", type=float, default=0.1,
        help="With it, how much the loss outside the mask counts, from 0 to 1.")
    add("--hflip", **is_on, help="Mirror half of the images.")
    add("--noaug", **is_on, help="No resize augmentation of the instance images.")
    add("--padding_mode", default="constant", choices=["constant", "edge"],
        help="Around images that this augmentation makes smaller: grey that the loss leaves out, as in the paper; or "
        "their edges continued and learned too, which teaches small views at small resolutions.")
    add("--cutmix_probability", type=float, default=0.0,
        help="With several concepts, share of the steps, from 0 to 1, that show one beside another ('... next to ...') "
        "in images twice as wide, so that both can be drawn in one; such as 0.5. These steps take twice the memory.")
    add("--cutmix_data_dir",
        help="Folder of other images, each with a caption (photo.txt beside photo.jpg, or metadata.jsonl), that these "
        "steps show beside a concept, so that its word affects only its own object; works with one concept too.")
    add("--resolution", type=positive_int, default=512,
        help="Side of the training images in pixels; 768 for Stable Diffusion 2.x at 768. If not given, 1024 for "
        "Stable Diffusion XL.")
    add("--aspect_buckets", **is_on,
        help="Images keep their proportions: each is cropped to the nearest of several shapes that have the area of "
        "--resolution, up to 2.5:1, rather than to a square. infer.py --height and --width draw in such a shape.")
    add("--center_crop", **is_on, help="Crop class images at the centre rather than at a random place.")

    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", **is_on, help="Also train on class images, so that the class keeps its look.")
    add("--real_prior", **is_on, help="The class images are real ones with captions, as retrieve.py collects them.")
    add("--class_data_dir", help="Folder of class images; without --real_prior, missing ones are generated into it.")
    add("--class_prompt", help="Prompt of the class, such as 'cat'.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the loss on class images.")
    add("--num_class_images", type=positive_int, default=200, help="How many class images each concept has.")
    add("--sample_batch_size", type=positive_int,
        help="Class images generated at once, per device. If not given, as many as half of the free memory holds, up "
        "to 32.")
    add("--class_image_scheduler", default="dpmsolver++", choices=["dpmsolver++", "default"],
        help="Sampler of class images: DPM-Solver++, or the base model's own scheduler, as in diffusers' example.")
    add("--class_image_steps", type=denoising_steps,
        help="Denoising steps of each class image; if not given, 25, and 50 with the base model's own scheduler.")
    add("--prior_generation_precision", choices=["no", "fp32", "fp16", "bf16"],
        help="Precision of class images; if not given, fp16 on a GPU, bf16 on a CPU that computes it (but for tiny "
        "models), or else fp32.")

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default=DEFAULT_MODEL, help="Where everything is written.")
    add("--seed", type=seed_number, default=42, help="Seed of everything random.")
    add("--train_batch_size", type=positive_int, default=4,
        help="Instance images per step and device, and as many class images.")
    add("--num_train_epochs", type=positive_int, default=1,
        help="Passes over the images, where --max_train_steps is not given.")
    add("--max_train_steps", type=positive_int, help="Optimizer steps: 250 for one concept, 500 for two.")
    add("--gradient_accumulation_steps", type=positive_int, default=1,
        help="Batches per optimizer step. If not given, accelerate's configuration.")
    add("--gradient_checkpointing", **is_on, help="Less memory, slower steps.")
    add("--learning_rate", type=float, default=1e-5,
        help="Learning rate, before --scale_lr. For prodigy, a factor of its own estimate, 1 if not given.")
    add("--scale_lr", **is_on,
        help="Multiply it by batch size, processes and accumulation, and by 2 with prior preservation.")
    add("--lr_scheduler", default="constant", choices=SCHEDULES,
        help="Schedule of the learning rate.")
    add("--lr_warmup_steps", type=int, default=500, help="Warm-up steps of the schedules that have a warm-up.")
    add("--dataloader_num_workers", type=int, default=2,
        help="Processes that load images; the result is the same for any number.")
    add("--freeze_model", default="crossattn_kv", choices=["crossattn_kv", "crossattn"],
        help="What is trained of the cross-attention: keys and values, or all projections (better for faces).")
    add("--token_gate", **is_on,
        help="What is learned acts only at the concept's own words: the modifier token and its class words. Prompts "
        "without them give the base model's images, and concepts are applied together without merging. Needs no class "
        "images; keys and values alone.")
    add("--rank", type=positive_int,
        help="Train a change of this rank beside each projection, such as 16, rather than the projection: smaller "
        "files, checkpoints and optimizer states. If not given, whole projections.")
    add("--rank_alpha", type=positive_number,
        help="The change is multiplied by this divided by --rank; if not given, by 1.")
    add("--optimizer", choices=OPTIMIZERS,
        help="If not given, adamw. adamw8bit needs pip install '.[8bit]'. prodigy finds its own step size, and needs "
        "pip install '.[prodigy]'. adafactor keeps the smallest state.")
    add("--use_8bit_adam", **is_on, help="The same as --optimizer=adamw8bit.")
    add("--adam_beta1", type=float, default=0.9, help="First beta of AdamW and Prodigy.")
    add("--adam_beta2", type=float, default=0.999, help="Second beta of AdamW and Prodigy.")
    add("--adam_weight_decay", type=float, default=1e-2, help="Weight decay of every optimizer.")
    add("--adam_epsilon", type=float, default=1e-8, help="Epsilon of AdamW and Prodigy.")
    add("--snr_gamma", type=positive_number,
        help="Weight the loss of each image by its noise level (Min-SNR, Hang et al. 2023); the paper recommends 5. If "
        "not given, all levels count alike.")
    add("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    add("--set_grads_to_none", **is_on,
        help="Drop gradients between steps rather than zero them: always so here, since it changes nothing but memory.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="Precision of the frozen model; what is trained stays fp32. If not given, accelerate's configuration.")
    add("--quantize_base", choices=QUANTIZERS,
        help="Hold the frozen UNet's linear layers, but for its cross-attention, in 8 bits (pip install '.[quantize]') "
        "or in 4 (pip install '.[8bit]', and a CUDA GPU). Less memory, slower steps; for one process.")
    add("--allow_tf32", **is_on, help="TF32 matrix products, on Ampere GPUs and later.")
    add("--enable_xformers_memory_efficient_attention", **is_on,
        help="xFormers' attention; needs a CUDA GPU and pip install '.[xformers]'.")
    add("--no_latent_cache", **is_on,
        help="Augment and encode the images at every step, rather than once before the first.")
    add("--latent_variants", type=positive_int, default=20,
        help="How many augmentations of each instance image there are to draw from, without --no_latent_cache; "
        "with --noaug nothing is approximated.")
    add("--keep_latents", **is_on,
        help="Keep the encoded images in --output_dir/latents; a later run there encodes only what has changed.")
    add("--torch_compile", **is_on,
        help="Compile the UNet: faster steps after a first one that takes minutes, so for long runs; a CPU needs g++.")
    add("--local_rank", type=int, default=-1, help="Set by launchers of several processes.")

    add = parser.add_argument_group("checkpoints and validation").add_argument
    add("--checkpointing_steps", type=positive_int, default=250,
        help="Steps between checkpoints; each can be resumed from, and looked at with infer.py.")
    add("--checkpoints_total_limit", type=positive_int, help="How many checkpoints are kept.")
    add("--overwrite", **is_on, help="Replace another run that --output_dir holds; otherwise that is an error.")
    add("--resume_from_checkpoint",
        help="Checkpoint in --output_dir to continue from, such as 'checkpoint-250', or 'latest'.")
    add("--validation_prompt", action=OneOrSeveral,
        help="Prompt of images that show the progress, such as '<new1> cat in a bucket'; may be given several times.")
    add("--num_validation_images", type=int, default=2, help="How many images of each.")
    add("--validation_steps", type=positive_int, default=50, help="Steps between validations.")
    add("--validation_at_start", **is_on, help="Make these images before the first step too.")
    add("--validation_data_dir",
        help="Folder of other images of the concept: their loss, always with the same noise, falls while the concept "
        "is learned and rises when the instance images are learned by heart.")
    add("--validation_split", type=positive_int,
        help="Instead, hold out this many of each concept's instance images, the last by name, such as 1 of five.")

    add = parser.add_argument_group("output and logging").add_argument
    add("--save_precision", choices=["fp32", "fp16"],
        help="Precision of the result's weights; fp16 halves its files. If not given, fp16 with --rank, which makes a "
        "LoRA, or else fp32. Checkpoints are always in fp32.")
    add("--no_safe_serialization", **is_on, help="Write only the .bin files, no safetensors.")
    add("--report_to", default="tensorboard", choices=TRACKERS,
        help="Where losses and images are logged; wandb and comet_ml need pip install '.[wandb]' or '.[comet]'.")
    add("--logging_dir", default="logs", help="Folder of the logs, inside --output_dir.")
    add("--push_to_hub", **is_on, help="Upload the result to the Hub.")
    add("--hub_token", help="Token for that; `hf auth login` keeps it off the command line.")
    add("--hub_model_id", help="Repository to upload to; if not given, the name of --output_dir.")
    return parser


# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and check what can be checked before anything is read.

    Raises:
        SystemExit: as argparse does, after a usage line and one line that names what is wrong.
    """
    parser = build_parser()
    args = parse_with_config(parser, argv)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    given = given_flags(argv)
    try:
        follow_configuration(args, given)
    except UserError as error:
        parser.error(str(error))
    settle_optimizer(parser, args, given)
    if args.rank_alpha is not None and args.rank is None:
        parser.error("--rank_alpha has no meaning without --rank: leave it out")
    if args.save_precision is None:
        args.save_precision = "fp32" if args.rank is None else "fp16"
    if args.token_gate and args.modifier_token is None:
        parser.error("--token_gate acts at a new word: give --modifier_token")
    if args.token_gate and args.freeze_model == "crossattn":
        parser.error("--token_gate gates keys and values; queries and outputs see no words: leave out --freeze_model")
    if not 0 <= args.unmasked_weight <= 1:
        parser.error(f"--unmasked_weight {args.unmasked_weight} is not between 0 and 1")
    if args.unmasked_weight != parser.get_default("unmasked_weight") and not args.masked_loss:
        parser.error("--unmasked_weight has no meaning without --masked_loss: leave it out, or give both")
    if args.concepts_list is None:
        if args.instance_data_dir is None or args.instance_prompt is None:
            parser.error("give --instance_data_dir and --instance_prompt, or --concepts_list")
        if args.with_prior_preservation and (args.class_data_dir is None or args.class_prompt is None):
            parser.error("--with_prior_preservation needs --class_data_dir and --class_prompt (or --concepts_list)")
    if args.real_prior and not args.with_prior_preservation:
        parser.error("--real_prior says which class images to use, but without --with_prior_preservation none are used")
    if not 0 <= args.cutmix_probability <= 1:
        parser.error(f"--cutmix_probability {args.cutmix_probability} is not between 0 and 1")
    if args.cutmix_probability and args.concepts_list is None and args.cutmix_data_dir is None:
        parser.error(
            "--cutmix_probability shows one concept beside another: give several, with --concepts_list, or other "
            "images, with --cutmix_data_dir"
        )
    if args.cutmix_data_dir is not None and not args.cutmix_probability:
        parser.error("--cutmix_data_dir has no meaning without --cutmix_probability: give both, such as 0.5")
    if args.cutmix_probability and args.aspect_buckets:
        parser.error("--cutmix_probability shows squares beside each other: leave out that or --aspect_buckets")
    for name, (least, above) in RANGES.items():
        if not least <= getattr(args, name) < above:
            parser.error(f"--{name} {getattr(args, name)} is not at least {least:g} and below {above:g}")
    if (args.max_train_steps or 0) > MOST_STEPS:
        parser.error(f"--max_train_steps {args.max_train_steps} is more than {MOST_STEPS}")
    if not args.max_grad_norm > 0:
        parser.error(f"--max_grad_norm {args.max_grad_norm} is not above 0, so nothing would be learned")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= LAST_POLYNOMIAL_RATE and not args.scale_lr:
        parser.error(f"--lr_scheduler=polynomial ends at {LAST_POLYNOMIAL_RATE}: give a larger --learning_rate")
    for prompt in one_or_several(args.validation_prompt):
        if not prompt.isprintable():
            parser.error(f"--validation_prompt {prompt!r} holds line breaks or unprintable characters")
    if args.validation_data_dir is not None and args.validation_split is not None:
        parser.error("--validation_data_dir and --validation_split both say what to validate with: give one of them")
    if args.validation_data_dir is not None and args.concepts_list is not None:
        parser.error(
            "--validation_data_dir is for one concept: give each of --concepts_list its validation_data_dir there"
        )
    if args.num_validation_images < 0 or args.lr_warmup_steps < 0 or args.dataloader_num_workers < 0:
        parser.error("--num_validation_images, --lr_warmup_steps and --dataloader_num_workers cannot be negative")
    if args.enable_xformers_memory_efficient_attention:
        # On a CPU xFormers imports and diffusers calls it available, but every call of it fails.
        if not _has_cuda():
            parser.error(
                "--enable_xformers_memory_efficient_attention needs a CUDA GPU, and there is none: leave it out"
            )
        _require(parser, "xformers", "--enable_xformers_memory_efficient_attention", "xformers")
    if args.quantize_base is not None:
        settle_quantization(parser, args)
    if args.keep_latents and args.no_latent_cache:
        parser.error("--keep_latents has nothing to keep with --no_latent_cache: leave one of them out")
    if args.torch_compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        parser.error("--torch_compile needs the compiler g++, or another that the variable CXX names")
    problem = tracker_problem(args.report_to, TRACKERS)
    if problem is not None:
        parser.error(problem)
    if args.hub_token is not None and args.report_to not in ("tensorboard", "none"):
        parser.error(f"--report_to={args.report_to} records the command line, --hub_token with it: use `hf auth login`")
    if args.mixed_precision == "fp16" and not _has_cuda():
        parser.error("fp16 needs a GPU, and there is none: give --mixed_precision=bf16 or --mixed_precision=no")
    return args


def settle_optimizer(parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]) -> None:
    """Make one of the two flags that name the optimizer, and refuse what it has no use for.

    Args:
        given: the names of the flags that were given.
    """
    if args.use_8bit_adam and args.optimizer not in (None, "adamw", "adamw8bit"):
        parser.error(f"--use_8bit_adam means --optimizer=adamw8bit, not {args.optimizer}: leave one of them out")
    args.optimizer = "adamw8bit" if args.use_8bit_adam else args.optimizer or "adamw"
    args.use_8bit_adam = args.optimizer == "adamw8bit"
    for name in MEANINGLESS.get(args.optimizer, ()):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} has no meaning for --optimizer={args.optimizer}: leave it out")
    if args.optimizer == "prodigy":
        if "learning_rate" not in given:
            args.learning_rate = 1.0
        if args.learning_rate < LEAST_PRODIGY_RATE:
            parser.error(
                f"--learning_rate {args.learning_rate} is a factor of the step size that --optimizer=prodigy finds "
                "itself: give --learning_rate=1"
            )
        _require(parser, "prodigyopt", "--optimizer=prodigy", "prodigy")
    if args.use_8bit_adam:
        _require(parser, "bitsandbytes", "8-bit Adam", "8bit")


def settle_quantization(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse ``--quantize_base`` where it cannot work."""
    package, extra = QUANTIZERS[args.quantize_base]
    _require(parser, package, f"--quantize_base={args.quantize_base}", extra)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("--quantize_base is for one process, and there are several: leave it out")
    if args.quantize_base == "4bit" and not _has_cuda():
        parser.error("--quantize_base=4bit needs a CUDA GPU, and there is none: give --quantize_base=8bit")


def given_flags(argv: Sequence[str] | None) -> set[str]:
    """The names of the flags that were given, on the command line or in the file of ``--config``."""
    parser = build_parser()
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    return set(vars(parse_with_config(parser, argv)))


def _require(parser: argparse.ArgumentParser, package: str, flag: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        parser.error(f"{flag} needs the package {package}: pip install '.[{extra}]'")


def _has_cuda() -> bool:
    if runs_on_cpu():
        return False
    import torch  # takes seconds, which only the flags that need a GPU should cost

    return torch.cuda.is_available()


if __name__ == "__main__":
    # --help and a wrong flag end here, before the libraries below are loaded
    quantizer = QUANTIZERS.get(parse_args().quantize_base, (None,))[0]
    end_quietly_on_interrupt()
    import_diffusers(quantizer)

# The tokenizer is used in forked data workers; its own threads do not survive a fork and would only warn about it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On a CPU, activations in huge pages: a step of Stable Diffusion's shape waits for a tenth of the page faults. torch
# reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import logging
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from custom_diffusion.data.buckets import Shape, describe_buckets, find_buckets, shapes_of
from custom_diffusion.data.class_images import generate_class_images
from custom_diffusion.data.concept_list import ConceptEntry, read_concepts
from custom_diffusion.data.dataset import CustomDiffusionDataset
from custom_diffusion.data.images import find_class_images, find_cutmix_images, find_instance_images
from custom_diffusion.data.masks import find_masks
from custom_diffusion.models.base_model import BaseModel, ModelConfiguration, read_configuration
from custom_diffusion.training.attention import check_rank, train_attention
from custom_diffusion.training.checkpoints import find_checkpoint
from custom_diffusion.training.gate import build_gate
from custom_diffusion.training.lock import unlocks_folders
from custom_diffusion.training.objective import CustomDiffusion
from custom_diffusion.training.optimizers import build_optimizer
from custom_diffusion.training.processes import name_to_speak_as
from custom_diffusion.training.progress import STEPS_BETWEEN_READS, StepRecord, report_steps
from custom_diffusion.training.prompts import check_prompts
from custom_diffusion.training.quantizing import load_unet
from custom_diffusion.training.run import (
    Run,
    announce,
    build_schedule,
    cache_texts,
    check_inputs,
    compute_type,
    fit_to_machine,
    open_output_dir,
    plan_steps,
    prepare_latents,
    resume,
    start,
    training_batches,
)
from custom_diffusion.training.saving import begin, finish, save_checkpoint, validate
from custom_diffusion.training.settings import describe_settings
from custom_diffusion.training.signals import StopSignal, during
from custom_diffusion.training.tokens import add_modifier_tokens, parse_modifier_tokens, train_new_words
from custom_diffusion.training.validation import split_images

logger = logging.getLogger("custom_diffusion")

# --- the method ----------------------------------------------------------------------------------


@unlocks_folders
def main(argv: Sequence[str] | None = None) -> None:
    """Teach the concepts, and save what was learned."""
    args = parse_args(argv)
    accelerator = start(args)
    # All that is small is read and checked first: a mistake should show before anything slow is loaded or written.
    concepts = read_concepts(args)
    tokens, initializers = parse_modifier_tokens(args)
    instance_images, validation_images, class_images, others = find_images(args, concepts)
    checkpoint = find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
    configuration = read_model(args, given_flags(argv))
    tokenizers = configuration.base_model.tokenizers(configuration.family, args.tokenizer_name)
    modifier_tokens = add_modifier_tokens(tokenizers, tokens, initializers)
    check_prompts(args, concepts, instance_images, class_images, others, tokenizers, modifier_tokens)
    gate = build_gate(concepts, instance_images, tokens, tokenizers) if args.token_gate else None
    masks = read_masks(args, [*instance_images, *validation_images], configuration)
    images = (instance_images, class_images, others)
    settings = describe_settings(args, *images, concepts, accelerator.num_processes, gate, masks)
    open_output_dir(args, settings, checkpoint, accelerator)

    # Without real class images, the base model draws its own idea of each class.
    if args.with_prior_preservation and not args.real_prior:
        generate_class_images(configuration.base_model, concepts, accelerator, args)
        class_images = find_class_images(concepts, args.num_class_images, real_prior=False)
    dataset = build_dataset(args, instance_images, class_images, others, masks, configuration, tokenizers, accelerator)
    steps = plan_steps(args, dataset, checkpoint, accelerator.num_processes)
    check_inputs(args, settings, class_images, steps, checkpoint, accelerator)
    # While nothing else is loaded: the VAE has the memory to itself, and large batches are fast.
    latents = prepare_latents(args, dataset, steps, configuration, accelerator)

    # Trained are a row for each modifier token, and copies of the cross-attention's projections, or changes of them.
    text_encoders = configuration.base_model.text_encoders(configuration.family)
    train_new_words(text_encoders, tokenizers, modifier_tokens)
    unet = load_unet(configuration.base_model, args.quantize_base, compute_type(accelerator))
    train_attention(unet, args, 0 if gate is None else len(gate.concepts))
    prior_loss_weight = args.prior_loss_weight if args.with_prior_preservation else None
    parts = (configuration.family, text_encoders, unet, configuration.noise_scheduler, modifier_tokens)
    model = CustomDiffusion(*parts, prior_loss_weight, args.snr_gamma, gate, args.unmasked_weight)
    fit_to_machine(model, args, accelerator, configuration.latent_size)
    optimizer = build_optimizer(args, list(model.trained().values()), accelerator)
    model, optimizer, lr_scheduler = accelerator.prepare(model, optimizer, build_schedule(args, optimizer, steps.stop))
    run = Run(
        args=args,
        settings=settings,
        accelerator=accelerator,
        concepts=concepts,
        configuration=configuration,
        tokenizers=tokenizers,
        dataset=dataset,
        steps=steps,
        latents=latents,
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
    )
    cache_texts(run)
    resume(run, checkpoint)
    announce(run)
    begin(run, validation_images)
    finish(run, train(run))


def find_images(args: argparse.Namespace, concepts: Sequence[ConceptEntry]) -> tuple[list[tuple[Path, str]], ...]:
    """Instance images, those to validate with, real class images, and those to show beside a concept."""
    instance_images, validation_images = split_images(args, concepts, find_instance_images(concepts, args.masked_loss))
    class_images = find_class_images(concepts, args.num_class_images, real_prior=True) if args.real_prior else []
    return instance_images, validation_images, class_images, find_cutmix_images(args.cutmix_data_dir)


def read_model(args: argparse.Namespace, given: set[str]) -> ModelConfiguration:
    """What the base model's small files say; without a given ``--resolution`` it becomes what the model is made for."""
    base_model = BaseModel(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        other_vae=args.pretrained_vae_model_name_or_path,
    )
    configuration = read_configuration(base_model, args.resolution if "resolution" in given else None)
    args.resolution = configuration.resolution
    check_rank(args.rank, base_model)
    buckets_of(args, configuration)  # a resolution that has none should show now
    return configuration


def buckets_of(args: argparse.Namespace, configuration: ModelConfiguration) -> Sequence[Shape]:
    """The shapes in which images keep their proportions; none without ``--aspect_buckets``."""
    return find_buckets(args.resolution, configuration.side_multiple) if args.aspect_buckets else []


def read_masks(
    args: argparse.Namespace, images: Sequence[tuple[Path, str]], configuration: ModelConfiguration
) -> dict[Path, Path] | None:
    """The masks of these images by their paths; None without ``--masked_loss``."""
    if not args.masked_loss:
        return None
    return find_masks([path for path, _ in images], shapes_of(images, buckets_of(args, configuration)))


def build_dataset(
    args: argparse.Namespace,
    instance_images: Sequence[tuple[Path, str]],
    class_images: Sequence[tuple[Path, str]],
    others: Sequence[tuple[Path, str]],
    masks: Mapping[Path, Path] | None,
    configuration: ModelConfiguration,
    tokenizers: dict[str, CLIPTokenizer],
    accelerator: Accelerator,
) -> CustomDiffusionDataset:
    """The training samples."""
    buckets = buckets_of(args, configuration)
    if buckets:
        describe_buckets(instance_images, buckets)
    return CustomDiffusionDataset(
        instance_images,
        class_images,
        partial(configuration.family.tokenize, tokenizers),
        size=args.resolution,
        mask_size=configuration.latent_size,
        center_crop=args.center_crop,
        hflip=args.hflip,
        aug=not args.noaug,
        seed=args.seed,
        variants=None if args.no_latent_cache else args.latent_variants,
        cutmix_probability=args.cutmix_probability,
        cutmix_images=others,
        samples_per_step=args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps,
        padding_mode=args.padding_mode,
        with_time_ids=configuration.family.reads_time_ids,
        buckets=buckets,
        masks=masks,
    )


# --- the loop ------------------------------------------------------------------------------------


def train(run: Run, read_every: int | None = None) -> float:
    """Take the steps; gives the mean seconds of one, without validation and checkpoints.

    Args:
        read_every: steps between readings of the losses, which wait for the device; they are read before every
            checkpoint too. If not given, every step on a CPU and :data:`STEPS_BETWEEN_READS` on a GPU.

    Raises:
        Interrupted: after SIGINT or SIGTERM, when the step is done and its checkpoint written; after a second one at
            once.
        UserError: where the loss is not finite or a checkpoint cannot be written.
    """
    args, accelerator = run.args, run.accelerator
    trained = list(run.module.trained().values())
    step, busy, started = run.steps.start, 0.0, time.perf_counter()
    on_cpu, alone = accelerator.device.type == "cpu", accelerator.num_processes == 1
    read_every = read_every or (1 if on_cpu else STEPS_BETWEEN_READS)
    losses: Tensor | float = 0.0
    unread, skipped_steps = list[StepRecord](), 0
    bar = partial(tqdm, desc="Steps", total=run.steps.stop, initial=step, disable=not accelerator.is_local_main_process)
    with StopSignal(accelerator) as stop, during("the steps", run.way_on), bar() as progress:
        for batch in training_batches(run):
            with accelerator.accumulate(run.model):
                loss, *parts = run.model(run.latents.draw(batch), **batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, args.max_grad_norm)
                run.optimizer.step()
                run.lr_scheduler.step()
                run.optimizer.zero_grad(set_to_none=True)
            losses = losses + torch.stack([loss, *parts]).detach()
            if not accelerator.sync_gradients:
                continue

            step += 1
            progress.update(1)
            skipped_steps = skipped_steps + 1 if accelerator.optimizer_step_was_skipped else 0
            mean_losses = losses / args.gradient_accumulation_steps
            unread.append(StepRecord(step, mean_losses, run.lr_scheduler.get_last_lr()[0], skipped_steps))
            losses = 0.0
            # Several processes ask each other whether to stop, so they have to ask after the same steps.
            noticed = alone and stop.number is not None
            regular = (read_every, args.checkpointing_steps, args.validation_steps)
            if not (noticed or step == run.steps.stop or any(step % steps == 0 for steps in regular)):
                continue

            progress.set_postfix(report_steps(run, unread))
            unread.clear()
            busy += time.perf_counter() - started
            stopped = stop.came()
            if step % args.checkpointing_steps == 0 or stopped:
                with during(f"the writing of checkpoint-{step}", run.way_on):
                    save_checkpoint(run, step)
            if stopped and step < run.steps.stop:
                raise stop.interruption(step)
            if step % args.validation_steps == 0 and step < run.steps.stop:
                with during(f"the validation images of step {step}", run.way_on):
                    validate(run, step, "validation")
            started = time.perf_counter()
    return busy / max(1, len(run.steps))


if __name__ == "__main__":
    run(
        main,
        "interrupted before the first step; run the same command again",
        name_to_speak_as,
        "give a smaller --train_batch_size or --resolution; docs/recipes.md has the flags for small graphics cards",
    )
