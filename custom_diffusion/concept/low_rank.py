"""A change of a projection as the product of two narrow matrices, and how a concept's weights file holds it.

Where diffusers' Custom Diffusion processors have ``...attn2.processor.to_k_custom_diffusion.weight``, there is
``...attn2.processor.to_k_low_rank.up.weight`` of shape (out, rank), ``.down.weight`` of (rank, in), and ``.alpha`` of
(1,). No loader of whole projections takes the one for the other: diffusers refuses a file without
``custom_diffusion`` in its keys, and earlier versions of this project name the first key that they do not know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_KEY = re.compile(r"(?P<projection>.+\.attn2\.processor\.to_[kvq]|.+\.attn2\.processor\.to_out)_low_rank\.(?P<rest>.+)")
_PARTS = ("up.weight", "down.weight", "alpha")


@dataclass(frozen=True)
class LowRank:
    """The matrix ``alpha / rank * up @ down``.

    Attributes:
        up: (out, rank).
        down: (rank, in).
        alpha: a finite number.
    """

    up: Tensor
    down: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The number of columns of ``up``."""
        return len(self.down)

    def whole(self) -> Tensor:
        """The matrix itself, (out, in), float32."""
        up, down = self.factors()
        return up @ down

    def factors(self) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in), float32, whose product is the matrix."""
        return self.up.float() * (self.alpha / max(1, self.rank)), self.down.float()

    def balanced(self) -> LowRank:
        """The same matrix with both sides about alike large, so that half precision holds them; exact in float32."""
        up, down = self.up.float().norm().item(), self.down.float().norm().item()
        factor = 2.0 ** round(math.log2(down / up) / 2) if up and down else 1.0
        return LowRank(self.up * factor, self.down / factor, self.alpha)

    def to(self, dtype: torch.dtype) -> LowRank:
        """The same factors in another type; in half precision, balanced first."""
        even = self if dtype == torch.float32 else self.balanced()
        return LowRank(even.up.to(dtype), even.down.to(dtype), self.alpha)

    def tensors(self, key: str) -> dict[str, Tensor]:
        """What was learned, under the names of the weights file; the very tensors.

        Args:
            key: of the projection in :attr:`Concept.attention`.
        """
        stem = _stem(key)
        return {f"{stem}.up.weight": self.up, f"{stem}.down.weight": self.down}

    def stored(self, key: str) -> dict[str, Tensor]:
        """All that the weights file has of it."""
        return self.tensors(key) | {f"{_stem(key)}.alpha": torch.tensor([self.alpha], dtype=torch.float64)}


def _stem(key: str) -> str:
    """``...to_k_low_rank`` for ``...to_k_custom_diffusion.weight``; ``to_out_low_rank.0`` for that of an output."""
    return key.removesuffix(".weight").replace("_custom_diffusion", "_low_rank")


def low_rank_of(content: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The low-rank changes in the content of a weights file, keyed like :attr:`Concept.attention`; others are left out.

    Factors that were stored in half precision become float32, in which all is computed.

    Raises:
        ValueError: for factors that are missing, no numbers, or do not fit each other.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in content.items():
        match = _KEY.fullmatch(name)
        if match is not None:
            place, part = ("0.", match["rest"][2:]) if match["rest"].startswith("0.") else ("", match["rest"])
            if part not in _PARTS or (match["projection"].endswith("to_out") != bool(place)):
                raise ValueError(f"holds {name!r}, which is no part of a low-rank change")
            found.setdefault(f"{match['projection']}_custom_diffusion.{place}weight", {})[part] = value
    return {key: _joined(key, parts) for key, parts in found.items()}


def is_low_rank(name: str) -> bool:
    """Whether a name in a weights file is that of a low-rank change."""
    return _KEY.fullmatch(name) is not None


def _joined(key: str, parts: Mapping[str, Tensor]) -> LowRank:
    if parts.keys() != set(_PARTS):
        raise ValueError(f"has only {' and '.join(sorted(parts))} of the low-rank change {key!r}")
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in parts.values()):
        raise ValueError(f"has no numbers for {key!r}")
    up, down, alpha = (parts[part] for part in _PARTS)
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != len(down) or alpha.numel() != 1:
        raise ValueError(f"has factors for {key!r} that do not fit each other")
    value = float(alpha)
    if not math.isfinite(value):
        raise ValueError(f"has an alpha for {key!r} that is not finite")
    return LowRank(up.float(), down.float(), value)
