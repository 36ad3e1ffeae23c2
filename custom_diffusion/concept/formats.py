"""Other programs' files of a concept: names and layouts only, nothing is read from or written to disk here.

Beside :mod:`files` because each layout is a translation of the same two tables, trained projections and tokens:

- the authors' ``delta.bin`` (their diffusers code): ``{"unet": {parameter name: weight}, "modifier_token": {...}}``,
  with ``{"u", "v"}`` in place of a weight where their compress.py has been;
- the authors' ``delta.ckpt`` (their first code): ``{"state_dict": {CompVis name: weight, "embed": rows}}``;
- kohya-ss' LoRA, which diffusers, ComfyUI, AUTOMATIC1111/Forge and InvokeAI read;
- an embedding file as these programs read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_diffusion.concept.low_rank import LowRank

# `down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight`
KEY = re.compile(
    r"(?P<attention>.+\.attn2)\.processor\."
    r"(?P<projection>to_k|to_v|to_q|to_out)_custom_diffusion\.(?P<parameter>(?:0\.)?(?:weight|bias))"
)

_PARAMETER = re.compile(r"(.+\.attn2)\.(to_k|to_v|to_q|to_out)\.((?:0\.)?(?:weight|bias))")

_COMPVIS = re.compile(r"model\.diffusion_model\.(?:(input|output)_blocks\.(\d+)|middle_block)\.1\.(.+)")


def parameter_name(key: str) -> str:
    """The UNet parameter that a key stands for: ``...attn2.to_k.weight`` for ``...attn2.processor.to_k_...``."""
    match = KEY.fullmatch(key)
    assert match is not None, key
    return f"{match['attention']}.{match['projection']}.{match['parameter']}"


def key_of_parameter(name: str) -> str:
    """The inverse of :func:`parameter_name`.

    Raises:
        ValueError: for what is no cross-attention projection.
    """
    match = _PARAMETER.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no cross-attention projection")
    return f"{match[1]}.processor.{match[2]}_custom_diffusion.{match[3]}"


def _parameter_of_compvis(name: str) -> str:
    """The UNet parameter of diffusers for a name of the first Stable Diffusion code (1.x and 2.x shapes)."""
    match = _COMPVIS.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no attention parameter of the UNet")
    side, number, rest = match[1], int(match[2] or 0), match[3]
    if side == "input":
        return f"down_blocks.{(number - 1) // 3}.attentions.{(number - 1) % 3}.{rest}"
    if side == "output":
        return f"up_blocks.{number // 3}.attentions.{number % 3}.{rest}"
    return f"mid_block.attentions.0.{rest}"


def from_delta(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, LowRank], dict[str, list[Tensor]]]:
    """Translate the content of a ``delta.bin`` or ``delta.ckpt``.

    Returns:
        Trained projections, low-rank differences from the base model (compressed files have these instead), both
        keyed like :attr:`Concept.attention`, and tokens with their vectors, one per text encoder in the order in which
        the authors encode with them. Tensors are the very ones of ``content``.

    Raises:
        ValueError: for content that is something else, or more than a concept can hold.
    """
    if isinstance(content.get("state_dict"), Mapping):
        content = _from_compvis(content["state_dict"])
    unet, tokens = content.get("unet"), content.get("modifier_token", {})
    if not isinstance(unet, Mapping) or not isinstance(tokens, Mapping):
        raise ValueError("holds no 'unet' table: it is no delta.bin of Custom Diffusion")
    if "text_encoder" in content:
        raise ValueError("holds a whole text encoder that was trained too; only tokens and attention can be read")
    weights: dict[str, Tensor] = {}
    differences: dict[str, LowRank] = {}
    for name, value in unet.items():
        key = key_of_parameter(name)
        if isinstance(value, Mapping) and {"u", "v"} <= value.keys():
            u, v = value["u"], value["v"]
            if not all(isinstance(factor, Tensor) and factor.dim() == 2 for factor in (u, v)) or len(u.T) != len(v):
                raise ValueError(f"has factors for {name!r} that do not fit each other")
            differences[key] = LowRank(u, v, alpha=float(len(v)))
        elif isinstance(value, Tensor):
            weights[key] = value
        else:
            raise ValueError(f"holds no weights for {name!r}")
    vectors = {token: list(own) if isinstance(own, (list, tuple)) else [own] for token, own in tokens.items()}
    for token, own in vectors.items():
        if not all(isinstance(vector, Tensor) and vector.dim() == 1 for vector in own):
            raise ValueError(f"holds no vector for {token!r}")
    return weights, differences, vectors


def _from_compvis(state: Mapping[str, Any]) -> dict[str, Any]:
    rows = state.get("embed", [])
    names = {name: _parameter_of_compvis(name) for name in state if name != "embed"}
    if isinstance(rows, Tensor) and rows.dim() == 1:
        rows = rows.unsqueeze(0)
    return {
        "unet": {parameter: state[name] for name, parameter in names.items()},
        # Their code names the tokens by position.
        "modifier_token": {f"<new{number}>": row.clone() for number, row in enumerate(rows, 1)},
    }


def to_delta(
    attention: Mapping[str, Tensor],
    tokens: Mapping[str, Sequence[Tensor]],
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, dict[str, Any]]:
    """The content of a ``delta.bin``.

    Args:
        attention: as in :class:`Concept`.
        tokens: as :func:`from_delta` gives them.
        factors: for some keys the low-rank factors (u, v) of the difference, as the authors' compress.py stores them.
    """
    unet: dict[str, Any] = {}
    for key, weight in attention.items():
        if factors and key in factors:
            u, v = factors[key]
            unet[parameter_name(key)] = {"u": u.clone(), "v": v.clone()}
        else:
            unet[parameter_name(key)] = weight.detach().to("cpu", copy=True)
    vectors = {token: [vector.detach().clone() for vector in own] for token, own in tokens.items()}
    return {
        "unet": unet,
        # One is no list: that is how the authors' code for Stable Diffusion 1.x writes it, and theirs for XL differs.
        "modifier_token": {token: own[0] if len(own) == 1 else own for token, own in vectors.items()},
    }


def to_lora(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    layer_name: Callable[[str], str],
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """A LoRA in kohya-ss' naming: ``lora_unet_..._attn2_to_k.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``.

    Args:
        factors: key to (u, v) of shapes (out, rank) and (rank, in) with u @ v the difference; equal norms on both
            sides keep half precision from underflowing.
        dtype: type to store the factors in.
        layer_name: of one of the UNet's layers, what kohya-ss' scripts call it.
        alpha: where it is given, the difference is alpha / rank * u @ v, and u and v are stored as they are; all have
            one rank then.
    """
    if alpha is not None:
        same = {key: (u.to(dtype), v.to(dtype)) for key, (u, v) in factors.items()}
        return _to_lora(same, alpha, layer_name)
    # Programs multiply by alpha / rank. One alpha for all layers, with the rest in the factors: diffusers (0.42) drops
    # alphas that differ between layers, with a warning only, and scales those layers wrongly.
    alpha = float(max((len(v) for _, v in factors.values()), default=1))
    scales = {key: (len(v) / alpha) ** 0.5 for key, (_, v) in factors.items()}
    scaled = {key: ((u * scales[key]).to(dtype), (v * scales[key]).to(dtype)) for key, (u, v) in factors.items()}
    return _to_lora(scaled, alpha, layer_name)


def _to_lora(
    factors: Mapping[str, tuple[Tensor, Tensor]], alpha: float, layer_name: Callable[[str], str]
) -> dict[str, Tensor]:
    tensors = {}
    for key, (u, v) in factors.items():
        name = "lora_unet_" + layer_name(parameter_name(key).removesuffix(".weight"))
        tensors[f"{name}.lora_down.weight"] = v.contiguous()
        tensors[f"{name}.lora_up.weight"] = u.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def bundled(embeddings: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Embeddings inside a LoRA's file, as AUTOMATIC1111 and OneTrainer have them: ``bundle_emb.new1.clip_l``.

    Args:
        embeddings: name of each word to its embedding file's content, see :func:`to_embedding`.
    """
    return {f"bundle_emb.{word}.{key}": rows for word, own in embeddings.items() for key, rows in own.items()}


def to_embedding(vectors: Mapping[str | None, Tensor]) -> dict[str, Tensor]:
    """An embedding file of one word: (1, width) for each text encoder, under its key in the token's own file.

    Where a family has a single text encoder, which has no key there, it is ``emb_params``: AUTOMATIC1111 wants exactly
    one tensor in the file; ComfyUI takes ``clip_l`` or else the first tensor, and InvokeAI and kohya-ss know
    ``emb_params``, so this is the form that all of them read.
    """
    return {
        key or "emb_params": vector.detach().to("cpu", torch.float32, copy=True).unsqueeze(0)
        for key, vector in vectors.items()
    }
