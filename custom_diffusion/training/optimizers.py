"""The optimizers of ``--optimizer``, set up so that ``--learning_rate`` means as nearly the same as it can."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io

import torch
from accelerate import Accelerator
from torch import nn
from transformers.optimization import Adafactor


def build_optimizer(
    args: argparse.Namespace, parameters: list[nn.Parameter], accelerator: Accelerator
) -> torch.optim.Optimizer:
    """``--optimizer`` over what is trained, with the learning rate scaled as ``--scale_lr`` says."""
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes
        learning_rate *= 2.0 if args.with_prior_preservation else 1.0
    if args.optimizer == "adafactor":
        # transformers' rather than torch's, which multiplies the learning rate by the size of each weight matrix: a
        # rate that suits Adam would do nothing. Here it is the size of a step, as it is Adam's.
        return Adafactor(
            parameters,
            lr=learning_rate,
            weight_decay=args.adam_weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    options = {
        "lr": learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer == "adamw8bit":
        return importlib.import_module("bitsandbytes.optim").AdamW8bit(parameters, **options)
    if args.optimizer == "prodigy":
        prodigy = importlib.import_module("prodigyopt").Prodigy
        # What its authors recommend for diffusion models, and for schedules with a warm-up. It prints a line.
        with contextlib.redirect_stdout(io.StringIO()):
            return prodigy(parameters, use_bias_correction=True, safeguard_warmup=True, **options)
    # Under fp16 the fused kernel would skip steps by itself, and accelerate could not tell.
    fused = accelerator.device.type in ("cpu", "cuda") and accelerator.mixed_precision != "fp16"
    return torch.optim.AdamW(parameters, fused=fused, **options)
