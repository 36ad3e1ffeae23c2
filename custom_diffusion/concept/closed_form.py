"""The closed form that merges projections (Custom Diffusion paper, section 3.2 and appendix): matrices only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from custom_diffusion.errors import UserError

RIDGE = 1e-9  # relative to the mean square of a feature over all captions

# How much --prior_weight leaves as learned what nobody asks about; relative to the mean square of a prompts' feature.
NEARNESS = 0.1

UNGATE_RIDGE = 1e-4  # of ungate_change; relative to the mean square of a prompts' feature


def merging_directions(targets: Tensor, regularization: Tensor) -> Tensor:
    """``d = C (Creg^T Creg)^-1``: along these the weights change, because there unrelated captions feel it least.

    Args:
        targets: C, (s, width), text features of the concepts' words.
        regularization: Creg, (n, width), text features of unrelated captions; n must exceed the width.

    Returns:
        (s, width), float64.

    Raises:
        UserError: for too few captions.
    """
    targets, regularization = targets.double(), regularization.double()
    count, width = regularization.shape
    if count < width:
        raise UserError(
            f"the captions have {count} words, too few for text features of width {width}: "
            "give more with --captions and --num_captions"
        )
    gram = regularization.T @ regularization
    # The features are float32: a direction that only their rounding has would otherwise count as one that no caption
    # uses, and take all of the change (a text encoder whose last layer norm has no bias has such a direction).
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return torch.cholesky_solve(targets.T, torch.linalg.cholesky(gram)).T


def merge_weights(original: Tensor, targets: Tensor, values: Tensor, directions: Tensor) -> Tensor:
    """The weights that map targets to values and change the answers to unrelated captions least.

    Minimises ``||W Creg^T - W0 Creg^T||_F`` subject to ``W C^T = V`` (paper, section 3.2 and appendix):
    ``W = W0 + (V^T - W0 C^T) (d C^T)^-1 d``.

    Args:
        original: W0, (out, width).
        targets: C, (s, width).
        values: V, (s, out), what each concept's own weights make of its features.
        directions: d, (s, width), of :func:`merging_directions`.

    Returns:
        W, (out, width), in float64 like the computation; inputs may have any floating type.

    Raises:
        UserError: where targets are the same, and so cannot be told apart.
    """
    original, targets, values, directions = (x.double() for x in (original, targets, values, directions))
    # d C^T is symmetric, so one solve from the left does.
    products = directions @ targets.T
    # Equal targets need not fail to solve: rounding decides, and the answer would be arbitrary.
    if not torch.isfinite(products).all() or torch.linalg.matrix_rank(products, rtol=1e-12) < len(products):
        raise UserError("two of the concepts are the same, or their words are: give other --class_words")
    change = torch.linalg.solve(products, values - targets @ original.T)
    return original + change.T @ directions


def weigh_weights(
    original: Tensor, learned: Sequence[Tensor], targets: Sequence[Tensor], regularization: Tensor, prior_weight: float
) -> Tensor:
    """The weights that answer the concepts' prompts as learned and unrelated captions as the base model, in balance.

    With Grams (mean squares) A_c of the targets of concept c and B of the captions, and D_c what it learned, minimises
    ``sum_c |(W - W_c) A_c^1/2|^2 + prior_weight |(W - W0) B^1/2|^2 + m |W - W0 - sum_c D_c|^2``:
    ``W = W0 + (sum_c D_c (A_c + m)) (sum_c A_c + prior_weight B + m)^-1``. That is the paper's objective (section 3.2)
    with its constraint made a part of the sum. The last term, `NEARNESS`, keeps directions that neither asks about:
    without it these are free, and prompts unlike all of these answer with anything.

    Args:
        original: W0, (out, width).
        learned: W_c, (out, width) each.
        targets: A_c, (width, width) each, as :meth:`TextModels.mean_square` gives them.
        regularization: B, alike.
        prior_weight: at least 0; 0 keeps what a single concept has learned.

    Returns:
        W, (out, width), in float64 like the computation; inputs may have any floating type.
    """
    original, regularization = original.double(), regularization.double()
    together = reduce(torch.add, (target.double() for target in targets))
    near = NEARNESS * together.diagonal().mean() * torch.eye(len(together), dtype=torch.float64)
    changes = ((own.double() - original) @ (a.double() + near) for own, a in zip(learned, targets, strict=True))
    wanted = reduce(torch.add, changes)
    # The sum is symmetric, so a solve from the left of what is transposed does.
    return original + torch.linalg.solve(together + prior_weight * regularization + near, wanted.T).T


def ungate_change(changes: Sequence[Tensor], squares: Tensor) -> Tensor:
    """The change that, acting everywhere, comes nearest to changes that act at the words of their concepts alone.

    With features c_i of prompts and the gates m_k(i) of the concepts, minimises
    ``sum_i |D c_i - sum_k m_k(i) D_k c_i|^2 + r |D|^2``: ``D = (sum_k D_k A_k) (A + r)^-1``, where
    ``A = sum_i c_i c_i^T`` and ``A_k = sum_i m_k(i) c_i c_i^T``. The last term, `UNGATE_RIDGE`, keeps the base model
    where no prompt asks.

    Args:
        changes: D_k, (out, width) each.
        squares: A and behind it the A_k, (1 + number of concepts, width, width), float64, as
            :meth:`TextModels.mean_squares` gives them.

    Returns:
        D, (out, width), in float64 like the computation.
    """
    everywhere, *own = squares
    ridge = UNGATE_RIDGE * everywhere.diagonal().mean() * torch.eye(len(everywhere), dtype=torch.float64)
    wanted = reduce(torch.add, (change.double() @ a for change, a in zip(changes, own, strict=True)))
    # The sum is symmetric, so a solve from the left of what is transposed does.
    return torch.linalg.solve(everywhere + ridge, wanted.T).T


def constraint_error(weights: Tensor, targets: Tensor, values: Tensor) -> float:
    """``||W C^T - V|| / ||V||`` in the Frobenius norm; shapes as in :func:`merge_weights`."""
    reached = targets.double() @ weights.double().T
    return ((reached - values).norm() / values.norm().clamp(min=1e-300)).item()
