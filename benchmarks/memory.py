"""What a training step takes of a GPU's memory, counted and not measured: no GPU is needed, and no weights.

    python -m benchmarks.train --shape sdxl --recipes

Weights, gradients and optimizer states follow from the shapes. Activations are counted by torch's own bookkeeping:
a step runs on fake tensors, which have shapes and lifetimes but no content, and the most bytes that are alive at a
time are taken. A real GPU needs some more: the CUDA context (about half a GB), the allocator's holes, and what single
kernels work in.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_model import Shape, random_text_encoder, random_unet
from custom_diffusion.models.families import TIME_IDS
from custom_diffusion.training.attention import swap_attention_processors
from custom_diffusion.training.frozen_layers import keep_less
from custom_diffusion.training.tokens import ModifierTokens, train_new_words

GIB = 2**30
SMALLEST_IN_8_BITS = 4096  # values; bitsandbytes keeps the state of smaller tensors in 32 bits
BLOCK = 256  # values that share a factor in 32 bits


@dataclass(frozen=True)
class Recipe:
    """Settings that decide how much memory a step takes.

    Attributes:
        images: per step, class images among them.
    """

    resolution: int
    images: int
    adam_8bit: bool = False
    gradient_checkpointing: bool = False
    train_q_out: bool = False


RECIPES = tuple(
    Recipe(resolution, images, *more)
    for resolution in (512, 1024)
    for images, more in ((1, (False, False)), (1, (True, False)), (1, (True, True)), (2, (True, True)))
)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, for as long as they live.

    Attributes:
        peak: the most that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it makes."""
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Leave out what there is already."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, count: int) -> None:
        self.now -= count


def optimizer_bytes(parameters: Iterable[nn.Parameter], in_8_bits: bool) -> int:
    """Bytes of Adam's two states."""
    if not in_8_bits:
        return sum(8 * parameter.numel() for parameter in parameters)
    small = (parameter.numel() for parameter in parameters)
    return sum(8 * n if n < SMALLEST_IN_8_BITS else 2 * n + 8 * -(-n // BLOCK) for n in small)


def count(shape: Shape, recipe: Recipe) -> dict[str, float]:
    """GiB that a step takes in bf16, by what takes it, and how many millions of values are trained."""
    with FakeTensorMode():
        unet = random_unet(shape).requires_grad_(False)
        swap_attention_processors(unet, recipe.train_q_out)
        keep_less(unet)
        if recipe.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        texts = zip(shape.family.text_encoders, shape.texts, strict=True)
        encoders = nn.ModuleDict({part.name: random_text_encoder(part, text) for part, text in texts})
        encoders.requires_grad_(False)
        ids = {name: [49408] for name in encoders}
        tokenizers = {name: SimpleNamespace(eos_token_id=49407) for name in ids}
        train_new_words(dict(encoders), tokenizers, ModifierTokens(["<new1>"], ids, {name: [0] for name in ids}))
        parameters = [*unet.parameters(), *encoders.parameters()]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in parameters:
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        live = LiveBytes()
        live.know([*parameters, *unet.buffers(), *encoders.buffers()])
        take_step(shape, recipe, unet.train(), encoders, live)
    found = {
        "frozen": sum(2 * parameter.numel() for parameter in parameters if not parameter.requires_grad),
        "trained": sum(4 * parameter.numel() for parameter in trained),
        "Adam": optimizer_bytes(trained, recipe.adam_8bit),
        "gradients": sum(4 * parameter.numel() for parameter in trained),
    }
    # What is alive at the peak has those gradients among it that have been made by then.
    peak = found["frozen"] + found["trained"] + found["Adam"] + max(live.peak, found["gradients"])
    found |= {"activations, gradients so far": live.peak, "peak": peak}
    return {name: value / GIB for name, value in found.items()} | {"values": found["trained"] / 4e6}


def take_step(shape: Shape, recipe: Recipe, unet: nn.Module, encoders: nn.ModuleDict, live: LiveBytes) -> None:
    """A forward and a backward pass; half of several images are class images, whose text is encoded already."""
    side, width = recipe.resolution // 8, sum(text["hidden_size"] for text in shape.texts)
    latents = torch.randn(recipe.images, 4, side, side, dtype=torch.bfloat16)
    timesteps, time_ids = torch.zeros(recipe.images, dtype=torch.long), torch.zeros(recipe.images, TIME_IDS)
    instances = -(-recipe.images // 2)
    ids = {name: torch.zeros(instances, 77, dtype=torch.long) for name in encoders}
    sizes = {"features": (77, width), "pooled": (shape.texts[-1].get("projection_dim", 1),)}
    with live:
        told = shape.family.encode(encoders, ids)
        for name, own in told.items():
            others = torch.zeros(recipe.images - instances, *sizes[name], dtype=own.dtype)
            told[name] = torch.cat([own, others])
        predicted = shape.family.predict(unet, latents, timesteps, told, time_ids)
        predicted.float().square().mean().backward()


def print_recipes(name: str, shape: Shape) -> None:
    """Print what every recipe takes, as a table."""
    # Fake tensors have no memory whose pages could be given back.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    columns: list[str] = []
    for recipe in RECIPES:
        found = count(shape, recipe)
        if not columns:
            columns = [column for column in found if column != "values"]
            print(f"\n{name} in bf16, {found['values']:.1f} M values trained (keys and values); GiB, counted\n")
            print(f"| px | images per step | 8-bit Adam | checkpointing | {' | '.join(columns)} |")
            print("|---" * (4 + len(columns)) + "|")
        switches = ["yes" if on else "no" for on in (recipe.adam_8bit, recipe.gradient_checkpointing)]
        values = [f"{found[column]:.2f}" for column in columns]
        print(f"| {recipe.resolution} | {recipe.images} | {' | '.join([*switches, *values])} |", flush=True)
