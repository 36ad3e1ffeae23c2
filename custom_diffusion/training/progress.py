"""The losses of a run: read, checked and logged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from custom_diffusion.errors import UserError
from custom_diffusion.training.checkpoints import last_checkpoint
from custom_diffusion.training.run import Run

STEPS_BETWEEN_READS = 10  # of losses on a GPU: reading one waits until the GPU has done all that it was given
MOST_SKIPPED_STEPS = 50  # fp16's loss scale halves at each; 2^50 is far below anything that helps


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
        run.history.steps.append({"step": record.step, **logs})
        shown = {"loss": f"{losses[0]:.4f}", "lr": f"{record.learning_rate:.1e}"}
    if run.history.validations:
        shown["validation"] = f"{run.history.validations[-1]['validation_loss']:.4f}"
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
