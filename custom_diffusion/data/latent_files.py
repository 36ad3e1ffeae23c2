"""The encoded images that ``--keep_latents`` leaves on disk: their names, and reading and writing them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from custom_diffusion.data.views import Renderer, View
from custom_diffusion.files import write_whole


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
    shared = [digest.hexdigest(), settings, vae.device.type, renderer.size]
    shared += [torch.__version__, diffusers.__version__]

    @cache
    def digest_of(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def name(view: View) -> str:
        parts = [*shared, digest_of(view.path), view.flip, view.scale, view.top, view.left]
        smaller = view.scale is not None and view.scale < renderer.size
        canvas = [renderer.padding_mode] if smaller and renderer.padding_mode != "constant" else []
        return f"{hashlib.sha256(json.dumps([*parts, *canvas]).encode()).hexdigest()}.safetensors"

    return {view: name(view) for view in views}


def write_posterior(path: Path, posterior: Tensor) -> None:
    """Keep a posterior with its checksum, whole or not at all."""
    checksum = torch.frombuffer(bytearray(hashlib.sha256(_bytes(posterior)).digest()), dtype=torch.uint8)
    content = save({"posterior": posterior.contiguous(), "sha256": checksum})
    write_whole(path, lambda file: file.write(content))


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
