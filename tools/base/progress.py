"""What the three trainings of the base model share: the schedule, a log, and checkpoints that survive a stop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm

from custom_diffusion.machine import computes_bf16


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(on: torch.device) -> torch.autocast:
    """bf16 where matrices are multiplied, on a GPU and on a CPU that can: there it is about twice as fast as fp32.

    A CPU without the instructions for it would be slower than in fp32.
    """
    return torch.autocast(on.type, torch.bfloat16, enabled=on.type != "cpu" or computes_bf16())


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, hold: float = 0.0) -> float:
    """Linear warm-up to `peak`, kept for the share `hold` of `steps`, then half a cosine down to zero at the last."""
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, round(hold * steps))
    return peak * 0.5 * (1 + math.cos(math.pi * max(step - start, 0) / max(steps - start, 1)))


class MatrixOptimizer:
    """Muon (Jordan et al. 2024) for the weights that are matrices, AdamW for the rest; one learning rate for both.

    Muon makes all singular values of an update alike. After as many seconds, the UNet's loss on other images was lower
    than with AdamW at its best rate. A convolution counts as the matrix of its output channels by all its inputs.
    """

    def __init__(self, module: torch.nn.Module, weight_decay: float, apart: tuple[str, ...] = ()) -> None:
        """`apart` names starts of parameters' names that AdamW takes too: first and last layers, and embeddings.

        The memory of `module`, channels last, must stay where it is: Muon is given other views of it.
        """
        matrices = {name for name, p in module.named_parameters() if p.ndim >= 2 and not name.startswith(apart)}
        self.matrices = [p for name, p in module.named_parameters() if name in matrices]
        self.views = [torch.nn.Parameter(_as_matrix(p.data)) for p in self.matrices]
        rest = [p for name, p in module.named_parameters() if name not in matrices]
        self.optimizers = (
            torch.optim.Muon(self.views, lr=0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=0, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True),
        )

    @property
    def param_groups(self) -> list[dict]:
        """Those of both optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Update all weights by their gradients."""
        for view, parameter in zip(self.views, self.matrices, strict=True):
            view.grad = _as_matrix(parameter.grad)
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.matrices:
            parameter.grad = None
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        """Those of both optimizers."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        """Take up what `state_dict` gave."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight as it is, a convolution's (out, in, h, w) as (out, h * w * in), without a copy."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


class Training:
    """The state of one training on disk: modules, optimizer, step and average of the weights, and a log of losses.

    `folder` gets `state.pt` (replaced as a whole, read with `weights_only`) and `log.jsonl`, a line per reading.
    """

    def __init__(
        self,
        folder: Path,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer | MatrixOptimizer,
        steps: int,
        average: float = 0.0,
        hold: float = 0.0,
    ) -> None:
        """Restore what `folder` holds of an interrupted training of the same number of `steps`.

        Before the learning rate falls, which is for the share `hold` of the steps, a training of another number will do
        too. `average` is the decay of an exponential moving average of the weights; 0 keeps none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.module, self.optimizer, self.steps = folder, module, optimizer, steps
        self.decay, self.hold = average, hold
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()} if average else {}
        self.step, self.seconds, self.sums, self.count = 0, 0.0, {}, 0
        state_file = folder / "state.pt"
        if state_file.exists():
            state = torch.load(state_file, map_location="cpu", weights_only=True)
            if state["steps"] == steps or state["step"] <= hold * min(state["steps"], steps):
                module.load_state_dict(state["module"])
                optimizer.load_state_dict(state["optimizer"])
                self.average = {name: value.to(self.average[name].device) for name, value in state["average"].items()}
                self.step, self.seconds = state["step"], state["seconds"]

    def __iter__(self) -> Iterator[int]:
        """The steps that are left, with a progress bar, a checkpoint every few minutes and one at the end."""
        started = saved = time.monotonic()
        before = self.seconds
        left = range(self.step, self.steps)
        bar = tqdm(left, initial=self.step, total=self.steps, desc=self.folder.name, mininterval=5)
        for self.step in bar:
            yield self.step
            if self.average and self.step % 4 == 3:  # often enough, and cheap
                decay = min(self.decay, (1 + self.step) / (10 + self.step)) ** 4
                for name, value in self.module.state_dict().items():
                    self.average[name].lerp_(value.to(self.average[name].dtype), 1 - decay)
            self.seconds = before + time.monotonic() - started
            if self.count >= 100 or self.step + 1 == self.steps:
                means = {name: round(value.item() / self.count, 5) for name, value in self.sums.items()}
                bar.set_postfix(means)
                with (self.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps({"step": self.step + 1, "seconds": round(self.seconds), **means}) + "\n")
                self.sums, self.count = {}, 0
            if time.monotonic() - saved > 180 or self.step + 1 == self.steps:
                self.save()
                saved = time.monotonic()

    def update(self, loss: torch.Tensor, peak: float, losses: dict[str, torch.Tensor]) -> None:
        """One optimizer step down `loss`, at the rate that the schedule with this `peak` has now.

        `losses` go into the means that are written every 100 steps; nothing is read from the device before.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, peak, hold=self.hold)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1

    def save(self) -> None:
        """Write the state under another name, then rename: a stop at any moment leaves one that reads."""
        state = {
            "steps": self.steps, "step": self.step + 1, "seconds": self.seconds, "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(), "average": self.average,
        }  # fmt: skip
        half_written = self.folder / "state.tmp"
        torch.save(state, half_written)
        half_written.replace(self.folder / "state.pt")
