"""Run by torchrun in test_distributed.py: train, then compare what the processes ended with.

Prints the largest difference between the processes, and a digest of the latents that they have encoded.
"""

from __future__ import annotations

import hashlib
import sys

import torch
from accelerate.utils import gather_object

import train_custom_diffusion
from custom_diffusion.training.run import Run


def digest_of_latents(run: Run) -> str:
    """The same wherever every view has the same posterior."""
    digest = hashlib.sha256()
    for view, posterior in sorted(run.dataset.posteriors.items(), key=lambda item: repr(item[0])):
        digest.update(repr(view).encode() + posterior.float().numpy().tobytes())
    return digest.hexdigest()


def train_and_compare(run: Run) -> float:
    """In the place of the script's own loop: take the steps, and compare what every process has then."""
    seconds = train(run)
    mine = torch.cat([parameter.detach().flatten() for parameter in run.module.trained().values()])
    everyone = gather_object([mine])
    digests = gather_object([digest_of_latents(run)])
    if run.accelerator.is_main_process:
        assert len(everyone) == run.accelerator.num_processes
        print("difference", max((other - mine).abs().max().item() for other in everyone))
        print("processes", len(everyone))
        print("latents", *sorted(set(digests)))
    return seconds


if __name__ == "__main__":
    train = train_custom_diffusion.train
    train_custom_diffusion.train = train_and_compare
    train_custom_diffusion.main(sys.argv[1:])
