"""The encoded images that ``--keep_latents`` leaves on disk: their names, and reading and writing them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import PIL
import torch
import torchvision
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from custom_diffusion.data.views import RENDERING_VERSION, Renderer, View
from custom_diffusion.files import write_bytes

# Before there were versions in front, a name was the second part alone.
_NAME = re.compile(r"([0-9a-f]{16}-)?[0-9a-f]{64}\.safetensors")


def posterior_names(renderer: Renderer, views: Sequence[View], vae: AutoencoderKL) -> dict[View, str]:
    """A file name for each view's posterior that differs wherever the posterior may.

    Args:
        renderer: makes the pixels of the views.
        vae: encodes them, on its device and in its type.
    """
    digest = hashlib.sha256()
    # The weights are in the type that they compute in.
    for part in (vae.encoder, vae.quant_conv):
        for tensor in part.state_dict().values() if part is not None else ():
            digest.update(_bytes(tensor))
    settings = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    shared = [digest.hexdigest(), settings, vae.device.type, torch.get_float32_matmul_precision(), renderer.size]
    prefix = _versions()

    @cache
    def digest_of(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def name(view: View) -> str:
        parts = [*shared, digest_of(view.path), view.flip, view.scale, view.top, view.left]
        smaller = view.scale is not None and view.scale < renderer.size
        canvas: list[Any] = [renderer.padding_mode] if smaller and renderer.padding_mode != "constant" else []
        canvas += [list(view.canvas)] if view.canvas else []
        canvas += ["colours that alpha hides"] if renderer.hides_nothing(view) else []
        return f"{prefix}-{_digest([*parts, *canvas])}.safetensors"

    return {view: name(view) for view in views}


def _versions() -> str:
    """Begins the names of all files of these versions of what decodes, resizes and encodes."""
    versions = [PIL.__version__, torchvision.__version__, torch.__version__, diffusers.__version__]
    return _digest([RENDERING_VERSION, *versions])[:16]


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def remove_stale(folder: Path) -> int:
    """Remove the posteriors that other versions have left, which no run will read; gives how many there were."""
    stale = [
        path for path in folder.iterdir() if _NAME.fullmatch(path.name) and not path.name.startswith(f"{_versions()}-")
    ]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def write_posterior(path: Path, posterior: Tensor) -> None:
    """Keep a posterior with its checksum, whole or not at all."""
    checksum = torch.frombuffer(bytearray(hashlib.sha256(_bytes(posterior)).digest()), dtype=torch.uint8)
    write_bytes(path, save({"posterior": posterior.contiguous(), "sha256": checksum}))


def read_posterior(path: Path) -> Tensor | None:
    """What :func:`write_posterior` has kept; None where there is nothing, or something else than was written."""
    try:
        content = load(path.read_bytes())
        posterior, checksum = content["posterior"], content["sha256"]
    except (OSError, SafetensorError, KeyError):
        return None
    return posterior if _bytes(checksum) == hashlib.sha256(_bytes(posterior)).digest() else None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
