"""The low-rank approximation of what a concept changes (Custom Diffusion paper, appendix)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from custom_diffusion.concept.files import Concept
from custom_diffusion.concept.projections import check_shape

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
PAPER_ENERGY = 0.6

_LEVELS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)  # of the table


@dataclass(frozen=True)
class Decomposition:
    """Singular value decomposition of what was learned in one projection, ``W - W0 = u diag(s) v``.

    Attributes:
        u, s, v: (out, n), (n,), (n, in) with n the smaller side, float32; s descends.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def rank(self, energy: float) -> int:
        """The smallest rank whose singular values make up this share of their sum (paper, appendix)."""
        if energy >= 1:
            return len(self.s)
        share = self.s.double().cumsum(0) / self.s.double().sum().clamp(min=1e-300)
        return min(len(self.s), int((share < energy).sum()) + 1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in), whose product is the best approximation of that rank; both sides alike large."""
        root = self.s[:rank].sqrt()
        return self.u[:, :rank] * root, root.unsqueeze(1) * self.v[:rank]


def decompose(concept: Concept, originals: Mapping[str, Tensor]) -> dict[str, Decomposition]:
    """Per trained projection matrix the singular values of its change.

    Args:
        originals: the base model's projections, keyed like :attr:`Concept.attention`.

    Raises:
        UserError: where the concept does not fit the base model.
    """
    result = {}
    for key, weight in concept.attention.items():
        check_shape(concept, key, weight, originals[key])
        if weight.dim() == 2:
            u, s, v = torch.linalg.svd(weight.float() - originals[key], full_matrices=False)
            result[key] = Decomposition(u, s, v)
    return result


def relative_error(decompositions: Mapping[str, Decomposition], ranks: Mapping[str, int]) -> float:
    """``||difference - its approximation|| / ||difference||`` over all layers together, in the Frobenius norm."""
    lost = sum(d.s[ranks[key] :].double().square().sum().item() for key, d in decompositions.items())
    whole = sum(d.s.double().square().sum().item() for d in decompositions.values())
    return math.sqrt(lost / whole) if whole else 0.0


def megabytes(decompositions: Mapping[str, Decomposition], ranks: Mapping[str, int], dtype: torch.dtype) -> float:
    """What the factors take in a file, in 10^6 bytes."""
    count = sum(ranks[key] * (len(d.u) + d.v.shape[1]) for key, d in decompositions.items())
    return count * dtype.itemsize / 1e6


def energy_table(decompositions: Mapping[str, Decomposition]) -> str:
    """A Markdown table: per energy the ranks, the sizes and the error of a LoRA."""
    lines = ["| energy | rank per layer | fp16 | fp32 | relative error |", "|---|---|---|---|---|"]
    for level in _LEVELS:
        ranks = {key: d.rank(level) for key, d in decompositions.items()}
        sizes = " | ".join(f"{megabytes(decompositions, ranks, dtype):.1f} MB" for dtype in DTYPES.values())
        error = relative_error(decompositions, ranks)
        lines.append(f"| {level:.0%} | {min(ranks.values())} to {max(ranks.values())} | {sizes} | {error:.1%} |")
    return "\n".join(lines)
