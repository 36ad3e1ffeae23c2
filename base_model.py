"""The base model of a concept: which one it is, and the parts of it that a command needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import formats
from concept import Concept, ConceptError, is_hub_id
from pictures import first_line


@dataclass(frozen=True)
class BaseModel:
    """Where a base model is: folder or Hub id, with revision (of the Hub) and variant (of the files, such as fp16)."""

    name: str
    revision: str | None = None
    variant: str | None = None

    def load(self, loader: Callable[..., Any] = DiffusionPipeline.from_pretrained, **options: Any) -> Any:
        """Call a ``from_pretrained`` on it.

        Raises:
            ConceptError: in one line, where the libraries' errors are pages.
        """
        try:
            return loader(self.name, revision=self.revision, **options)
        except Exception as error:  # the libraries raise OSError, ValueError, EntryNotFoundError, ...
            reason = first_line(error)
            raise ConceptError(f"cannot load the base model {self.name!r}: {reason}") from error

    def pipeline(self, dtype: torch.dtype) -> DiffusionPipeline:
        """The whole pipeline."""
        return self.load(dtype=dtype, variant=self.variant)

    def projections(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The UNet's weights under the keys of :attr:`concept.Concept.attention`, float32; the rest is not kept.

        Raises:
            ConceptError: where the UNet has no such weights.
        """
        loader = UNet2DConditionModel.from_pretrained
        unet = self.load(loader, subfolder="unet", variant=self.variant, dtype=torch.float32)
        parameters = dict(unet.named_parameters())
        try:
            return {key: parameters[formats.parameter_name(key)].detach().clone() for key in keys}
        except KeyError as error:
            raise ConceptError(f"the base model {self.name!r} has no {error.args[0]}: it is another model") from None

    def text_models(self) -> tuple[CLIPTokenizer, CLIPTextModel]:
        """Tokenizer and text encoder, the latter in float32."""
        tokenizer = self.load(CLIPTokenizer.from_pretrained, subfolder="tokenizer")
        loader = CLIPTextModel.from_pretrained
        return tokenizer, self.load(loader, subfolder="text_encoder", variant=self.variant, dtype=torch.float32)


def find_base_model(
    given: str | None, revision: str | None, variant: str | None, concepts: Sequence[Concept]
) -> BaseModel:
    """The base model of the command line, or else the one that the concepts' cards name.

    Raises:
        ConceptError: where none is known, the cards disagree, or there is no such folder.
    """
    known = {concept.base_model: concept.source for concept in concepts if concept.base_model}
    if given is None and len(known) > 1:
        (one, its), (other, others) = list(known.items())[:2]
        raise ConceptError(
            f"{its!r} was trained on {one!r} and {others!r} on {other!r}; "
            "if these are the same model, give --pretrained_model_name_or_path"
        )
    name = given or next(iter(known), None)
    if name is None:
        raise ConceptError(
            f"the card of {concepts[0].source!r} names no base model: give --pretrained_model_name_or_path"
        )
    if not Path(name).is_dir() and not is_hub_id(name):
        raise ConceptError(f"there is no base model folder {name!r}: give --pretrained_model_name_or_path")
    return BaseModel(name, revision, variant)
