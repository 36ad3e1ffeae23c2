"""The projections that a concept changes, and the base model's own weights of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NoReturn

from torch import Tensor

from custom_diffusion.concept import formats
from custom_diffusion.concept.files import Concept
from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel


def original_projections(base_model: BaseModel, keys: Iterable[str]) -> dict[str, Tensor]:
    """The base model's own weights of the projections that a concept trained, under the concept's keys, float32.

    Raises:
        UserError: where the base model has no such projections.
    """
    name_of = {key: formats.parameter_name(key) for key in keys}
    parameters = base_model.unet_parameters(name_of.values())
    return {key: parameters[name] for key, name in name_of.items()}


def complete(concept: Concept, originals: Mapping[str, Tensor]) -> Concept:
    """The concept with full projections in place of differences.

    Args:
        originals: the base model's projections, keyed like ``attention``; for every key of ``differences``.

    Raises:
        UserError: where a difference does not fit its projection.
    """
    attention = dict(concept.attention)
    for key, factors in concept.differences.items():
        difference = factors.whole()
        check_shape(concept, key, difference, originals[key])
        attention[key] = originals[key].float() + difference
    return replace(concept, attention=attention, differences={})


def check_shape(
    concept: Concept, name: str, learned: Tensor, original: Tensor, here: str = "the base model given"
) -> None:
    """Refuse a concept that was learned on another base model.

    Args:
        name: of the projection or the token.
        learned, original: what the concept has of it, and what the model has.
        here: what to call the model.

    Raises:
        UserError: where their shapes differ.
    """
    if learned.shape != original.shape:
        wanted = f"has {name!r} of shape {tuple(learned.shape)}; {here} has {tuple(original.shape)}"
        refuse_other_model(concept, wanted)


def refuse_other_model(concept: Concept, reason: str) -> NoReturn:
    """Say that a concept does not fit the model here.

    Raises:
        UserError: always.
    """
    trained_on = repr(concept.base_model) if concept.base_model else "an unnamed base model"
    raise UserError(
        f"{concept.source!r} was trained on {trained_on} and {reason}: give the base model that it was trained on"
    )
