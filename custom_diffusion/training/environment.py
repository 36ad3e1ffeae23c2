"""What accelerate's configuration asks for beside the flags, made one truth. Imports nothing that takes time."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection

from custom_diffusion.errors import UserError

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
PRECISION = "ACCELERATE_MIXED_PRECISION"
DYNAMO = "ACCELERATE_DYNAMO_BACKEND"
PRECISIONS = ("no", "fp16", "bf16")
# Each splits or wraps the model in a way that neither checkpoints nor results would survive.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}

MOST_STEPS = 1_000_000  # of a run; each of them is planned ahead


def follow_configuration(args: argparse.Namespace, given: Collection[str]) -> None:
    """Write into the flags what accelerate's configuration asks for where they were not given.

    ``accelerate launch`` passes its configuration on in environment variables. Whoever reads the flags afterwards
    reads what is in force.

    Args:
        given: the names of the flags that were given.

    Raises:
        UserError: for what is not supported.
    """
    for variable, name in UNSUPPORTED.items():
        if _is_on(variable):
            raise UserError(
                f"accelerate's configuration asks for {name} ({variable}), which is not supported: `accelerate config` "
                "makes one without it"
            )
    if args.mixed_precision is None:
        args.mixed_precision = (os.environ.get(PRECISION) or "no").lower()
        if args.mixed_precision not in PRECISIONS:
            raise UserError(
                f"accelerate's configuration asks for the precision {args.mixed_precision!r} ({PRECISION}), which is "
                f"not supported: give --mixed_precision, one of {', '.join(PRECISIONS)}"
            )
    steps = os.environ.get(ACCUMULATION)
    if steps is not None and "gradient_accumulation_steps" not in given:
        if not steps.isdecimal() or int(steps) < 1:
            raise UserError(
                f"accelerate's configuration asks for {steps!r} accumulation steps ({ACCUMULATION}): give "
                "--gradient_accumulation_steps"
            )
        args.gradient_accumulation_steps = int(steps)


def contradictions(args: argparse.Namespace) -> list[str]:
    """What accelerate's configuration asks for and does not get, because flags say otherwise; a sentence each."""
    found = []
    # `accelerate launch` writes "no" where nobody asked for a precision.
    precision = (os.environ.get(PRECISION) or "no").lower()
    if precision not in ("no", args.mixed_precision):
        found.append(
            f"accelerate's configuration asks for {precision} ({PRECISION}); "
            f"--mixed_precision={args.mixed_precision} is in force"
        )
    steps = os.environ.get(ACCUMULATION)
    if steps is not None and steps != str(args.gradient_accumulation_steps):
        found.append(
            f"accelerate's configuration asks for {steps} accumulation steps ({ACCUMULATION}); "
            f"--gradient_accumulation_steps={args.gradient_accumulation_steps} is in force"
        )
    backend = (os.environ.get(DYNAMO) or "no").lower()
    if backend != "no":
        in_force = "--torch_compile compiles the UNet" if args.torch_compile else "without --torch_compile nothing is"
        found.append(f"accelerate's configuration asks for compilation by {backend!r} ({DYNAMO}); {in_force}")
    return found


def runs_on_cpu() -> bool:
    """Whether accelerate is told to use a CPU though there may be a GPU."""
    return _is_on("ACCELERATE_USE_CPU") or os.environ.get("ACCELERATE_TORCH_DEVICE", "").startswith("cpu")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "on", "y", "t")
