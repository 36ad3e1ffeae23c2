"""Merging concepts that were trained separately: layer by layer, in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from custom_diffusion.concept.closed_form import constraint_error, merge_weights, merging_directions, weigh_weights
from custom_diffusion.concept.files import Concept
from custom_diffusion.concept.parts import Part
from custom_diffusion.concept.projections import check_shape, complete
from custom_diffusion.errors import UserError

TOLERANCE = 1e-5  # of the constraint, relative: what float32 weights can hold and no image can show


def _tokens(parts: Sequence[Part]) -> dict[str, dict[str, Tensor]]:
    return {token: vectors for part in parts for token, vectors in part.concept.tokens.items()}


def _projections(parts: Sequence[Part], originals: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every part's projections, whole.

    Raises:
        UserError: where a concept does not fit the base model.
    """
    wholes = [complete(part.concept, originals).attention for part in parts]
    for part, whole in zip(parts, wholes, strict=True):
        for key, original in originals.items():
            check_shape(part.concept, key, whole[key], original)
    return wholes


def weigh_concepts(
    parts: Sequence[Part],
    originals: Mapping[str, Tensor],
    targets: Sequence[Tensor],
    regularization: Tensor,
    prior_weight: float,
) -> tuple[Concept, float]:
    """Weigh concepts against captions, layer by layer.

    Args:
        parts: one or more.
        originals: the base model's projections, keyed like :attr:`Concept.attention`.
        targets, regularization, prior_weight: as :func:`weigh_weights` takes them.

    Returns:
        The concepts in one, and how far the answers to the captions still move, as a part (root mean square) of how far
        all that was learned moves them.

    Raises:
        UserError: where a concept does not fit the base model.
    """
    wholes = _projections(parts, originals)
    attention, moved, moved_before = {}, 0.0, 0.0
    for key, original in originals.items():
        learned = [whole[key] for whole in wholes]
        attention[key] = weigh_weights(original, learned, targets, regularization, prior_weight).float()
        change = attention[key] - original
        change_before = reduce(torch.add, (own - original for own in learned))
        moved += (change.double() @ regularization * change).sum().item()
        moved_before += (change_before.double() @ regularization * change_before).sum().item()
    return Concept(attention, _tokens(parts)), math.sqrt(moved / moved_before) if moved_before else 1.0


def merge_concepts(
    parts: Sequence[Part], originals: Mapping[str, Tensor], targets: Sequence[Tensor], regularization: Tensor
) -> tuple[Concept, float]:
    """Merge layer by layer.

    Args:
        parts: at least two.
        originals: the base model's projections, keyed like :attr:`Concept.attention`.
        targets: as :meth:`TextModels.target_features` gives them.
        regularization: features of unrelated captions, (n, width).

    Returns:
        The merged concept and its worst relative constraint error.

    Raises:
        UserError: as the two functions above; where a concept does not fit the base model; where the constraint is
            missed by more than 1e-5.
    """
    wholes = _projections(parts, originals)
    attention, worst = {}, 0.0
    together = torch.cat(list(targets))
    directions = merging_directions(together, regularization)
    for key, original in originals.items():
        values = torch.cat([c.double() @ whole[key].double().T for c, whole in zip(targets, wholes, strict=True)])
        attention[key] = merge_weights(original, together, values, directions).float()
        worst = max(worst, constraint_error(attention[key], together, values))
    if not worst <= TOLERANCE:
        raise UserError(
            f"the merged weights miss the concepts by {worst:.1e} of their size, more than {TOLERANCE}: the concepts' "
            "words are too much alike; give other --class_words"
        )
    return Concept(attention, _tokens(parts)), worst
