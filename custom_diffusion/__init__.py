"""Custom Diffusion (Kumari et al., CVPR 2023): teach a text-to-image diffusion model a concept from a few images.

``load_concept`` reads what training has written, and ``apply_concepts`` puts it into a diffusers pipeline.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from custom_diffusion.concept.applying import AppliedConcept, apply_concepts
    from custom_diffusion.concept.files import Concept, load_concept, save_concept
    from custom_diffusion.errors import UserError

__version__ = "1.0.0"
__all__ = ["AppliedConcept", "Concept", "UserError", "apply_concepts", "load_concept", "save_concept"]

_HOMES = {
    "AppliedConcept": "concept.applying",
    "apply_concepts": "concept.applying",
    "Concept": "concept.files",
    "load_concept": "concept.files",
    "save_concept": "concept.files",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    # Only when asked for: a command that answers --help should not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
