"""Teach a Stable Diffusion model new concepts from a few images of each, with Custom Diffusion.

Kumari et al., "Multi-Concept Customization of Text-to-Image Diffusion", CVPR 2023 (arXiv 2212.04488): fine-tune the
key and value projections of the UNet's cross-attention and one new word per concept, on the images plus class
images that keep what the model knew. This file reads in that order: arguments, data, tokens, attention, loss, the
run, the loop, saving.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# The tokenizer is used in forked data workers; its own threads do not survive a fork and would only warn about it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On a CPU, activations in huge pages: a step of Stable Diffusion's shape waits for a tenth of the page faults. torch
# reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import LoggerType, set_seed
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from diffusers.optimization import SchedulerType, get_scheduler
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from base_model import BaseModel, check_base_model, load_pretrained, load_tokenizer
from caching import encode_images, encode_posterior, encode_texts, sample_latents
from checkpoints import (
    Interrupted,
    StopSignal,
    cannot_write,
    checkpoint_step,
    claim_output_dir,
    describe_settings,
    find_checkpoint,
    last_checkpoint,
    leave_signals_to_the_run,
    list_checkpoints,
    make_output_dir,
    put_checkpoint,
    remove_leftovers,
    write_settings,
)
from class_images import generate_class_images
from concept import (
    CARD_NAME,
    Concept,
    UserError,
    check_token_name,
    is_hub_id,
    load_concept,
    model_card,
    save_concept,
)
from config import CONFIG_NAME, HelpFormatter, parse_with_config, save_config, switch
from data import (
    CustomDiffusionDataset,
    collate_fn,
    find_class_images,
    find_instance_images,
    position_batches,
    read_concepts,
)
from frozen_layers import keep_less, recompute_wide_layers
from machine import (
    build_accelerator,
    computes_bf16,
    peak_memory,
    release_pages,
    return_freed_memory,
    trim_heap,
    use_all_cores,
)
from images import UserError, write_image, write_whole
from publishing import create_hub_repository, log_images, push_to_hub, tracker_address

logger = logging.getLogger("custom_diffusion")

STEPS_BETWEEN_READS = 10  # of losses on a GPU: reading one waits until the GPU has done all that it was given
LATENTS_NAME = "latents"  # folder of --keep_latents in --output_dir
# Flags that a model card shows.
SHOWN_ON_CARD = (
    "freeze_model", "resolution", "train_batch_size", "gradient_accumulation_steps", "learning_rate", "scale_lr",
    "with_prior_preservation", "real_prior", "hflip", "noaug", "padding_mode", "cutmix_probability", "seed",
)  # fmt: skip
MOST_SKIPPED_STEPS = 50  # fp16's loss scale halves at each; 2^50 is far below anything that helps


# --- arguments -----------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


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
        help="Folder or Hub id of a Stable Diffusion 1.x or 2.x model.")
    add("--revision", help="Branch, tag or commit of the model on the Hub.")
    add("--variant", help="Variant of the model's files, such as fp16.")
    add("--tokenizer_name", help="Folder or Hub id of another tokenizer than the model's.")

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
        "instance_data_dir, class_data_dir}. Replaces the four flags of these names.")
    add("--hflip", **is_on, help="Mirror half of the images.")
    add("--noaug", **is_on, help="No resize augmentation of the instance images.")
    add("--padding_mode", default="constant", choices=["constant", "edge"],
        help="Around images that this augmentation makes smaller: grey that the loss leaves out, as in the paper; or "
        "their edges continued and learned too, which teaches small views at small resolutions.")
    add("--cutmix_probability", type=float, default=0.0,
        help="With several concepts, share of the steps, from 0 to 1, that show one beside another ('... next to ...') "
        "in images twice as wide, so that both can be drawn in one; such as 0.5. These steps take twice the memory.")
    add("--resolution", type=positive_int, default=512,
        help="Side of the training images in pixels; 768 for Stable Diffusion 2.x at 768.")
    add("--center_crop", **is_on, help="Crop class images at the centre rather than at a random place.")

    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", **is_on, help="Also train on class images, so that the class keeps its look.")
    add("--real_prior", **is_on, help="The class images are real ones with captions, as retrieve.py brings them.")
    add("--class_data_dir", help="Folder of class images; without --real_prior, missing ones are generated into it.")
    add("--class_prompt", help="Prompt of the class, such as 'cat'.")
    add("--prior_loss_weight", type=float, default=1.0, help="Weight of the loss on class images.")
    add("--num_class_images", type=positive_int, default=200, help="How many class images each concept has.")
    add("--sample_batch_size", type=positive_int, default=4, help="Class images generated at once, per device.")
    add("--prior_generation_precision", choices=["no", "fp32", "fp16", "bf16"],
        help="Precision of that generation; if not given, fp16 on a GPU and fp32 on a CPU.")

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="custom-diffusion-model", help="Where everything is written.")
    add("--seed", type=int, default=42, help="Seed of everything random.")
    add("--train_batch_size", type=positive_int, default=4,
        help="Instance images per step and device, and as many class images.")
    add("--num_train_epochs", type=positive_int, default=1,
        help="Passes over the images, where --max_train_steps is not given.")
    add("--max_train_steps", type=positive_int, help="Optimizer steps: 250 for one concept, 500 for two.")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="Batches per optimizer step.")
    add("--gradient_checkpointing", **is_on, help="Less memory, slower steps.")
    add("--learning_rate", type=float, default=1e-5, help="Learning rate, before --scale_lr.")
    add("--scale_lr", **is_on,
        help="Multiply it by batch size, processes and accumulation, and by 2 with prior preservation.")
    add("--lr_scheduler", default="constant", choices=[kind.value for kind in SchedulerType],
        help="Schedule of the learning rate.")
    add("--lr_warmup_steps", type=int, default=500, help="Warm-up steps of the schedules that have a warm-up.")
    add("--dataloader_num_workers", type=int, default=2,
        help="Processes that load images; the result is the same for any number.")
    add("--freeze_model", default="crossattn_kv", choices=["crossattn_kv", "crossattn"],
        help="What is trained of the cross-attention: keys and values, or all projections (better for faces).")
    add("--use_8bit_adam", **is_on, help="8-bit Adam; needs requirements-8bit.txt.")
    add("--adam_beta1", type=float, default=0.9, help="Adam's first beta.")
    add("--adam_beta2", type=float, default=0.999, help="Adam's second beta.")
    add("--adam_weight_decay", type=float, default=1e-2, help="Adam's weight decay.")
    add("--adam_epsilon", type=float, default=1e-8, help="Adam's epsilon.")
    add("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    add("--set_grads_to_none", **is_on,
        help="Drop gradients between steps rather than zero them: always so here, since it changes nothing but memory.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"],
        help="Precision of the frozen model; what is trained stays fp32. If not given, accelerate's configuration.")
    add("--allow_tf32", **is_on, help="TF32 matrix products, on Ampere GPUs and later.")
    add("--enable_xformers_memory_efficient_attention", **is_on,
        help="xFormers' attention; needs a CUDA GPU and requirements-xformers.txt.")
    add("--no_latent_cache", **is_on,
        help="Encode the images anew at every step, each time augmented anew, rather than once before the first.")
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
        help="Checkpoint in --output_dir to go on from, such as 'checkpoint-250', or 'latest'.")
    add("--validation_prompt", help="Prompt of images that show the progress, such as '<new1> cat in a bucket'.")
    add("--num_validation_images", type=int, default=2, help="How many of them.")
    add("--validation_steps", type=positive_int, default=50, help="Steps between them.")

    add = parser.add_argument_group("output and logging").add_argument
    add("--no_safe_serialization", **is_on, help="Write only the .bin files, no safetensors.")
    add("--report_to", default="tensorboard", choices=[*map(str, LoggerType), "none"],
        help="Where losses and images are logged; wandb and comet_ml need requirements-wandb.txt or -comet.txt.")
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
    if args.concepts_list is None:
        if args.instance_data_dir is None or args.instance_prompt is None:
            parser.error("give --instance_data_dir and --instance_prompt, or --concepts_list")
        if args.with_prior_preservation and (args.class_data_dir is None or args.class_prompt is None):
            parser.error("--with_prior_preservation needs --class_data_dir and --class_prompt (or --concepts_list)")
    if args.real_prior and not args.with_prior_preservation:
        parser.error("--real_prior says which class images to use, but without --with_prior_preservation none are used")
    if not 0 <= args.cutmix_probability <= 1:
        parser.error(f"--cutmix_probability {args.cutmix_probability} is not between 0 and 1")
    if args.cutmix_probability and args.concepts_list is None:
        parser.error("--cutmix_probability shows one concept beside another: give several, with --concepts_list")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} is not between 0 and 2^32 - 1")
    if args.validation_prompt is not None and not args.validation_prompt.isprintable():
        parser.error(f"--validation_prompt {args.validation_prompt!r} holds line breaks or characters that are no text")
    if args.num_validation_images < 0 or args.lr_warmup_steps < 0 or args.dataloader_num_workers < 0:
        parser.error("--num_validation_images, --lr_warmup_steps and --dataloader_num_workers cannot be negative")
    if args.enable_xformers_memory_efficient_attention:
        # On a CPU xFormers imports and diffusers calls it available, but every call of it fails.
        if not torch.cuda.is_available():
            parser.error(
                "--enable_xformers_memory_efficient_attention needs a CUDA GPU, and there is none: leave it out"
            )
        _require(parser, "xformers", "--enable_xformers_memory_efficient_attention", "requirements-xformers.txt")
    if args.keep_latents and args.no_latent_cache:
        parser.error("--keep_latents has nothing to keep with --no_latent_cache: leave one of them out")
    if args.torch_compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        parser.error("--torch_compile needs the compiler g++, or another that the variable CXX names")
    if args.use_8bit_adam:
        _require(parser, "bitsandbytes", "--use_8bit_adam", "requirements-8bit.txt")
    trackers = {
        "tensorboard": "requirements.txt",
        "wandb": "requirements-wandb.txt",
        "comet_ml": "requirements-comet.txt",
    }
    if args.report_to in trackers:
        _require(parser, args.report_to, f"--report_to={args.report_to}", trackers[args.report_to])
    if args.hub_token is not None and args.report_to not in ("tensorboard", "none"):
        parser.error(f"--report_to={args.report_to} records the command line, --hub_token with it: use `hf auth login`")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("--mixed_precision=fp16 needs a GPU, and there is none: use bf16 or leave it out")
    return args


def _require(parser: argparse.ArgumentParser, package: str, flag: str, requirements: str) -> None:
    if importlib.util.find_spec(package) is None:
        parser.error(f"{flag} needs the package {package}: pip install -r {requirements}")


# --- data ----------------------------------------------------------------------------------------


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


# --- tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModifierTokens:
    """The new words and where they start from.

    Attributes:
        tokens: such as ``["<new1>", "<new2>"]``; empty where only the attention is trained.
        ids: their ids in the tokenizer, consecutive and behind the whole vocabulary.
        initializer_ids: the vocabulary entries whose embeddings they start from.
    """

    tokens: list[str]
    ids: list[int]
    initializer_ids: list[int]


def parse_modifier_tokens(args: argparse.Namespace, concepts: Sequence[dict[str, str]]) -> tuple[list[str], list[str]]:
    """Modifier and initializer tokens of the command line, checked as far as that goes without a tokenizer.

    Raises:
        UserError: for names that cannot be used, too few initializers, or a token that no prompt has.
    """
    if args.modifier_token is None:
        return [], []
    tokens, initializers = args.modifier_token.split("+"), args.initializer_token.split("+")
    for token in tokens:
        check_token_name(token)
        if tokens.count(token) > 1:
            raise UserError(f"--modifier_token has {token!r} twice")
        if not any(token in concept["instance_prompt"] for concept in concepts):
            prompts = ", ".join(repr(concept["instance_prompt"]) for concept in concepts)
            raise UserError(
                f"the modifier token {token!r} is in no instance prompt ({prompts}), so it would learn nothing"
            )
    if len(initializers) < len(tokens):
        raise UserError(
            f"--initializer_token has {len(initializers)} entries for {len(tokens)} modifier tokens: "
            "give one for each, joined with '+'"
        )
    for concept in concepts:
        if not any(token in concept["instance_prompt"] for token in tokens):
            logger.warning(f"the instance prompt {concept['instance_prompt']!r} has none of the modifier tokens")
    return tokens, initializers[: len(tokens)]


def add_modifier_tokens(tokenizer: CLIPTokenizer, tokens: Sequence[str], initializers: Sequence[str]) -> ModifierTokens:
    """Add the new words to the tokenizer, and find where each starts from.

    An initializer is looked up as a vocabulary entry first: the default ``ktn`` is an entry that occurs only inside
    words (the rarest make the most neutral start), and as a word of its own it would be two tokens.

    Raises:
        UserError: for a token that is in the vocabulary, or an initializer of several tokens.
    """
    vocabulary = tokenizer.get_vocab()
    initializer_ids = []
    for token, initializer in zip(tokens, initializers, strict=True):
        if token in vocabulary or f"{token}</w>" in vocabulary:
            raise UserError(
                f"the modifier token {token!r} is in the tokenizer's vocabulary already; take another, such as '<new1>'"
            )
        ids = (
            [vocabulary[initializer]]
            if initializer in vocabulary
            else tokenizer(initializer, add_special_tokens=False).input_ids
        )
        if len(ids) != 1:
            raise UserError(
                f"the initializer {initializer!r} of {token!r} is {len(ids)} tokens and must be one; take a common word"
            )
        initializer_ids += ids
        logger.info(f"{token} starts from vocabulary entry {ids[0]}, {tokenizer.convert_ids_to_tokens(ids[0])!r}")
    tokenizer.add_tokens(list(tokens))
    return ModifierTokens(list(tokens), tokenizer.convert_tokens_to_ids(list(tokens)), initializer_ids)


class ModifierTokenEmbedding(nn.Module):
    """The text encoder's embedding table with trainable rows for the modifier tokens behind it.

    Only the rows are a parameter that trains: the table has no gradient, no optimizer state and no weight decay.

    Args:
        table: the frozen table, (vocabulary size, width).
        first_id: id of the first modifier token; all ids from there on are modifier tokens.
        rows: what they start from, (number of tokens, width), float32.
    """

    def __init__(self, table: nn.Embedding, first_id: int, rows: Tensor) -> None:
        super().__init__()
        # The table is the first submodule because libraries take a model's first parameter for its type.
        self.table = table
        self.rows = nn.Embedding.from_pretrained(rows, freeze=False)
        self.first_id = first_id

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) ids to (batch, length, width) embeddings in the table's type."""
        is_modifier = input_ids >= self.first_id
        known = self.table(input_ids.masked_fill(is_modifier, 0))
        learned = self.rows((input_ids - self.first_id).clamp(min=0)).to(known.dtype)
        return torch.where(is_modifier.unsqueeze(-1), learned, known)


# --- attention -----------------------------------------------------------------------------------


class CustomDiffusionAttnProcessor(nn.Module):
    """Cross-attention with trainable copies of its projections.

    The copies are float32 whatever the type of the frozen model: at a learning rate of 1e-5 the updates would round
    away in 16 bits. Parameter names are those of diffusers' Custom Diffusion processors, and so are the saved keys.

    Args:
        attention: the layer, in full precision; keys and values are copied from it.
        train_q_out: copy query and output projections too (``--freeze_model crossattn``).
        use_xformers: xFormers' kernel rather than torch's.
    """

    def __init__(self, attention: Attention, train_q_out: bool, use_xformers: bool = False) -> None:
        super().__init__()
        self.train_q_out = train_q_out
        self.use_xformers = use_xformers
        self.to_k_custom_diffusion = _trainable_copy(attention.to_k)
        self.to_v_custom_diffusion = _trainable_copy(attention.to_v)
        if train_q_out:
            self.to_q_custom_diffusion = _trainable_copy(attention.to_q)
            self.to_out_custom_diffusion = nn.ModuleList([_trainable_copy(attention.to_out[0])])

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(batch, pixels, hidden size), attending to text features (batch, length, text width)."""
        batch_size, _, inner_dim = hidden_states.shape
        if attention_mask is not None:
            raise NotImplementedError("Custom Diffusion trains without an attention mask")
        query_projection = self.to_q_custom_diffusion if self.train_q_out else attn.to_q
        out_projection = self.to_out_custom_diffusion[0] if self.train_q_out else attn.to_out[0]
        query = _project(query_projection, hidden_states)
        # The start-of-text token says nothing about the concept, and takes most of the attention: no gradient
        # from it (the authors' code).
        key = _detach_first(_project(self.to_k_custom_diffusion, encoder_hidden_states))
        value = _detach_first(_project(self.to_v_custom_diffusion, encoder_hidden_states))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if self.use_xformers:
            from xformers.ops import memory_efficient_attention

            attended = memory_efficient_attention(query, key, value, scale=attn.scale)
        else:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            attended = F.scaled_dot_product_attention(query, key, value, scale=attn.scale).transpose(1, 2)
        return _project(out_projection, attended.reshape(batch_size, -1, inner_dim))


def _trainable_copy(linear: nn.Linear) -> nn.Linear:
    copy = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device=linear.weight.device)
    copy.load_state_dict(linear.state_dict())
    return copy.requires_grad_(True)


def _project(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply a projection in the type of its input, whatever type its weights are kept in."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


def _detach_first(x: Tensor) -> Tensor:
    """(batch, length, channels) without gradient through the first position."""
    return torch.cat([x[:, :1].detach(), x[:, 1:]], dim=1)


def swap_attention_processors(unet: UNet2DConditionModel, train_q_out: bool, use_xformers: bool = False) -> None:
    """Give every cross-attention layer (``attn2``) of the UNet trainable projections; self-attention stays as it is."""
    processors = dict(unet.attn_processors)
    for name in processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            processors[name] = CustomDiffusionAttnProcessor(attention, train_q_out, use_xformers)
            # The copies do their work: the originals would only take memory.
            originals = [attention.to_k, attention.to_v]
            attention.to_k = attention.to_v = None
            if train_q_out:
                originals += [attention.to_q, attention.to_out[0]]
                attention.to_q, attention.to_out[0] = None, nn.Identity()
            for linear in originals:
                release_pages(linear.weight)
        elif use_xformers:
            processors[name] = XFormersAttnProcessor()
    unet.set_attn_processor(processors)


# --- loss ----------------------------------------------------------------------------------------


def custom_diffusion_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, prior_loss_weight: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked loss on instance images plus weighted prior loss on class images.

    Args:
        prediction, target: (N, C, H, W), in any floating type. With prior preservation the second half are class
            images.
        mask: (N, 1, H, W), 1 where the loss of an instance image counts. Each image's loss is the sum over the
            masked latents divided by the mask's area, as in the authors' code: the mask has one channel, so an
            instance image counts C times as much as the mean over its latents.
        prior_loss_weight: None without prior preservation.

    Returns:
        The loss to minimise, the instance loss and the prior loss (0 without prior), float32 scalars.
    """
    error = F.mse_loss(prediction.float(), target.float(), reduction="none")
    if prior_loss_weight is None:
        instance_error, prior_loss = error, error.new_zeros(())
    else:
        instance_error, prior_error = error.chunk(2)
        mask = mask.chunk(2)[0]
        prior_loss = prior_error.mean()
    instance_loss = ((instance_error * mask).sum([1, 2, 3]) / mask.sum([1, 2, 3])).mean()
    return instance_loss + (prior_loss_weight or 0.0) * prior_loss, instance_loss, prior_loss


class CustomDiffusion(nn.Module):
    """Text encoder and UNet with what is trained in them; its forward pass is the training objective.

    It is one module so that DistributedDataParallel, gradient accumulation and compilation see all of it: the
    example wraps only a holder of the processors, and its processes drift apart.

    Args:
        text_encoder, unet: in full precision; both are frozen here.
        noise_scheduler: how latents are noised, and whether noise or velocity is predicted.
        modifier_tokens: see :func:`add_modifier_tokens`.
        train_q_out, use_xformers: see :class:`CustomDiffusionAttnProcessor`.
        prior_loss_weight: None without prior preservation.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        noise_scheduler: DDPMScheduler,
        modifier_tokens: ModifierTokens,
        train_q_out: bool = False,
        use_xformers: bool = False,
        prior_loss_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.text_encoder = text_encoder.requires_grad_(False)
        self.unet = unet.requires_grad_(False)
        self.noise_scheduler = noise_scheduler
        self.modifier_tokens = modifier_tokens
        self.prior_loss_weight = prior_loss_weight
        if modifier_tokens.tokens:
            table = text_encoder.get_input_embeddings()
            rows = table.weight.detach()[modifier_tokens.initializer_ids].float().clone()
            text_encoder.set_input_embeddings(ModifierTokenEmbedding(table, modifier_tokens.ids[0], rows))
        swap_attention_processors(unet, train_q_out, use_xformers)
        keep_less(unet)
        self.predict: Callable = unet.forward

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that is trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def cast_frozen(self, dtype: torch.dtype, channels_last: bool = False) -> None:
        """Hold all that is not trained in ``dtype``; what is trained stays float32.

        Args:
            channels_last: lay the weights of convolutions out as tensor cores want them.
        """
        for parameter in self.parameters():
            if not parameter.requires_grad and parameter.dtype != dtype:
                original = parameter.data
                layout = torch.channels_last if channels_last and original.ndim == 4 else torch.preserve_format
                parameter.data = original.to(dtype, memory_format=layout)
                release_pages(original)

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass rather than keep them."""
        self.unet.enable_gradient_checkpointing()
        self._recompute_text()

    def recompute_cheaply(self, latent_size: int) -> None:
        """Compute again, of activations that take much memory, those that take little time."""
        if recompute_wide_layers(self.unet, latent_size):
            self._recompute_text()

    def _recompute_text(self) -> None:
        if self.modifier_tokens.tokens:
            # transformers renames it; the older versions that we support know only the older name.
            enable = getattr(self.text_encoder, "activation_checkpointing_enable", None)
            (enable or self.text_encoder.gradient_checkpointing_enable)()

    def compile_unet(self, **options: Any) -> None:
        """Let ``torch.compile`` (``options``) do the UNet's part; images are made with the UNet as it is."""
        self.predict = torch.compile(self.unet.forward, **options)

    def encode_prompts(self, input_ids: Tensor) -> Tensor:
        """Token ids (N, length) to text features (N, length, text width): the only place that conditions on text."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self.modifier_tokens.tokens)):
            return self.text_encoder(input_ids)[0]

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        mask: Tensor,
        input_ids: Tensor | None = None,
        text_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The losses of :func:`custom_diffusion_loss` for one batch.

        Args:
            latents, noise: (N, C, H, W), float32; latents already scaled by the VAE's factor.
            timesteps: (N,).
            mask: (N, 1, H, W).
            input_ids: (M, length), the captions of the first M; None where M is 0.
            text_features: (N - M, length, text width), those of the others; None where there are none.
        """
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(latents, noise, timesteps)
        else:
            target = noise
        encoded = [] if input_ids is None else [self.encode_prompts(input_ids)]
        encoded += [] if text_features is None else [text_features]
        prediction = self.predict(noisy_latents.to(self.unet.dtype), timesteps, torch.cat(encoded)).sample
        return custom_diffusion_loss(prediction, target, mask, self.prior_loss_weight)

    def learned(self, base_model: str) -> Concept:
        """What was learned so far, as :mod:`concept` stores it."""
        attention = {
            f"{name}.{key}": value
            for name, processor in self.unet.attn_processors.items()
            if isinstance(processor, CustomDiffusionAttnProcessor)
            for key, value in processor.state_dict().items()
        }
        names = self.modifier_tokens.tokens
        rows = self.text_encoder.get_input_embeddings().rows.weight.detach() if names else []
        return Concept(attention, dict(zip(names, rows, strict=True)), base_model)

    @torch.no_grad()
    def restore(self, concept: Concept) -> None:
        """Go on from what :meth:`learned` gave.

        Raises:
            UserError: where the concept does not have the same tokens and projections.
        """
        current = self.learned(base_model="")
        stored = concept.attention | concept.tokens
        for name, value in (current.attention | current.tokens).items():
            if name not in stored or stored[name].shape != value.shape:
                raise UserError(
                    f"{concept.source!r} does not fit this run ({name!r}): resume with the same base model, "
                    "--modifier_token and --freeze_model"
                )
            value.copy_(stored[name])


# --- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What the user gave, read and checked; no weights among it."""

    base: BaseModel
    concepts: list[dict[str, str]]
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
    make_output_dir(args.output_dir)
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


# --- the loop ------------------------------------------------------------------------------------


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


def train(run: Run, first_step: int, read_every: int | None = None) -> float:
    """The loop; gives the mean seconds per step, without validation and checkpoints.

    Args:
        read_every: steps between readings of the losses, which wait for the device; they are read before every
            checkpoint too. If not given, every step on a CPU and :data:`STEPS_BETWEEN_READS` on a GPU.

    Raises:
        Interrupted: after SIGINT or SIGTERM, when the step is done and its checkpoint written.
        UserError: where the loss is not finite or a checkpoint cannot be written.
    """
    args, accelerator = run.args, run.accelerator
    trained = list(run.module.trained().values())
    step, busy, started = first_step, 0.0, time.perf_counter()
    on_cpu, alone = accelerator.device.type == "cpu", accelerator.num_processes == 1
    read_every = read_every or (1 if on_cpu else STEPS_BETWEEN_READS)
    losses: Tensor | float = 0.0
    unread: list[StepRecord] = []
    skipped_steps = 0
    bar = partial(tqdm, desc="Steps", disable=not accelerator.is_local_main_process)
    with StopSignal(accelerator) as stop, bar(total=run.total_steps, initial=first_step) as progress:
        for batch in training_batches(run, first_step):
            with accelerator.accumulate(run.model):
                posterior = batch.pop("posterior", None)
                if posterior is None:
                    posterior = encode_posterior(run.vae, batch.pop("pixel_values"))
                latents = sample_latents(posterior, batch.pop("posterior_noise"), run.scaling_factor)
                loss, *parts = run.model(latents, **batch)
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
            if not (noticed or step == run.total_steps or any(step % steps == 0 for steps in regular)):
                continue

            progress.set_postfix(report_steps(run, unread))
            unread.clear()
            busy += time.perf_counter() - started
            stopped = stop.came()
            if step % args.checkpointing_steps == 0 or stopped:
                save_checkpoint(run, step)
            if stopped and step < run.total_steps:
                name = signal.Signals(stop.number).name
                raise Interrupted(
                    stop.number, f"stopped by {name} after step {step}; go on with --resume_from_checkpoint=latest"
                )
            if step % args.validation_steps == 0 and step < run.total_steps:
                validate(run, step, "validation")
            started = time.perf_counter()
    return busy / max(1, step - first_step)


# --- validation and saving -----------------------------------------------------------------------


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
    prompts = [entry["instance_prompt"] for entry in run.inputs.concepts]
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


# --- the command ---------------------------------------------------------------------------------


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


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, and say where everything is."""
    use_all_cores()
    run = prepare_run(parse_args(argv))
    accelerator = run.accelerator
    first_step = resume(run)
    logger.info(
        f"{len(run.dataset.instance_images)} instance images, {len(run.dataset.class_images)} class images; "
        f"{run.total_steps - first_step} steps of {run.args.train_batch_size} x {accelerator.num_processes} processes "
        f"x {run.args.gradient_accumulation_steps} accumulation; "
        f"{sum(parameter.numel() for parameter in run.module.trained().values()):,} trained values"
    )
    seconds_per_step = train(run, first_step)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        result = save_result(run)
        address = publish(run, result) if run.args.push_to_hub else None
        print_summary(run, seconds_per_step, result.files, address)
    accelerator.wait_for_everyone()
    # Freed in this order, two processes end cleanly even on a busy machine.
    accelerator.end_training()
    run.model = run.optimizer = run.lr_scheduler = None
    accelerator.free_memory()


def run_command_line(argv: Sequence[str] | None = None) -> None:
    """Run :func:`main`; whatever can go wrong for a user ends in one line and an exit code.

    Raises:
        SystemExit: with 1 for an error, 128 + its number after a signal.
    """
    # Every process finds the same error; one line of it is enough.
    speaks = int(os.environ.get("LOCAL_RANK", "0")) <= 0
    try:
        main(argv)
    except UserError as error:
        sys.exit(f"error: {error}" if speaks else 1)
    except OSError as error:
        # A full disk, a folder that may not be written to: what was written before is whole.
        sys.exit(f"error: {error.filename or 'a file'}: {error.strerror or error}")
    except Interrupted as interruption:
        if speaks:
            print(interruption, file=sys.stderr)
        sys.exit(interruption.exit_code)
    except KeyboardInterrupt:
        sys.exit("interrupted before the first step; run the same command again")


if __name__ == "__main__":
    run_command_line()
