"""A concept inside a pipeline: how it goes in, and how it comes out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from custom_diffusion.concept import formats
from custom_diffusion.concept.files import Concept
from custom_diffusion.concept.projections import check_shape, refuse_other_model
from custom_diffusion.errors import UserError
from custom_diffusion.models.families import Family, family_of, text_models_of
from custom_diffusion.models.vocabulary import AddedWords, check_new_words, embedding_table, put_words


@dataclass
class AppliedConcept:
    """Concepts inside a pipeline; :meth:`remove` takes them out again, exactly."""

    pipeline: DiffusionPipeline
    tokens: list[str]
    _weights: list[tuple[nn.Parameter, Tensor]] = field(repr=False)
    _words: dict[str, AddedWords] = field(repr=False)

    def remove(self) -> None:
        """Restore UNet, text encoders and tokenizers to the values they had before."""
        with torch.no_grad():
            for parameter, original in self._weights:
                parameter.copy_(original)
        for tokenizer, words in self._words.items():
            words.remove()
            setattr(self.pipeline, tokenizer, words.original)
        self.pipeline.unet._applied_concept = None


def apply_concepts(pipeline: DiffusionPipeline, *concepts: Concept, scale: float = 1.0) -> AppliedConcept:
    """Put one or several concepts into any pipeline of the Stable Diffusion family.

    The learned keys and values (and queries and outputs) are copied into the UNet's own ``attn2`` projections and
    the tokens into tokenizers and text encoders. Nothing is added to the forward pass, so speed stays as it was, and
    image-to-image, ControlNet or LoRA pipelines work as they do on the base model.

    Args:
        pipeline: one of diffusers', of a family that :mod:`custom_diffusion.models.families` knows.
        concepts: several must agree wherever they trained the same projections (merging is another matter).
        scale: 0 keeps the base model's projections, 1 takes the learned ones, between and beyond blends linearly.
            Token embeddings have no counterpart in the base model and always go in whole.

    Returns:
        A handle whose ``remove()`` restores the pipeline exactly.

    Raises:
        UserError: where a concept does not fit the pipeline or the others; nothing is changed then.
    """
    attention, tokens = _combine(concepts)
    if getattr(pipeline.unet, "_applied_concept", None) is not None:
        raise UserError("this pipeline already has a concept: remove() it first, or apply all of them in one call")
    family = family_of(pipeline.components, "this pipeline's model")
    here = repr(getattr(pipeline, "name_or_path", None) or "this pipeline's model")
    parameters = {key: _find_parameter(pipeline.unet, key, owned) for key, (_, owned) in attention.items()}
    for key, (weight, owner) in attention.items():
        check_shape(owner, key.split(".processor.")[1], weight, parameters[key], here)
    check_tokens(tokens, family, *text_models_of(family, pipeline), here)

    weights = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    words = _put_tokens(tokens, family, pipeline) if tokens else {}
    with torch.no_grad():
        for key, parameter in parameters.items():
            value, owner = attention[key]
            original, learned = parameter.float(), value.to(parameter.device, torch.float32)
            if key in owner.differences:
                learned = original + learned
            parameter.copy_(torch.lerp(original, learned, scale))
    applied = AppliedConcept(pipeline, list(tokens), weights, words)
    pipeline.unet._applied_concept = applied
    return applied


def check_tokens(
    tokens: Mapping[str, tuple[dict[str, Tensor], Concept]],
    family: Family,
    tokenizers: Mapping[str, Any],
    text_encoders: Mapping[str, Any],
    here: str = "the base model given",
) -> None:
    """Make sure that tokenizers and text encoders can take new words.

    Args:
        tokens: each with its embeddings, (width,) by text encoder, and the concept that it is of.
        tokenizers, text_encoders: by the names of the text encoders.
        here: what to call the model that they are of.

    Raises:
        UserError: for a token that a vocabulary has already, of another width, or of another family.
    """
    for token, (vectors, concept) in tokens.items():
        if vectors.keys() != text_encoders.keys():
            refuse_other_model(concept, f"has {token!r} for {', '.join(vectors)}; {here} is of {family.name}")
        for name, vector in vectors.items():
            check_new_words([token], tokenizers[name], f" of {concept.source!r}")
            check_shape(concept, token, vector, embedding_table(text_encoders[name])[0], here)


def _put_tokens(
    tokens: Mapping[str, tuple[dict[str, Tensor], Concept]], family: Family, pipeline: DiffusionPipeline
) -> dict[str, AddedWords]:
    """Put tokens into a pipeline; gives what it takes to undo that, by the names of the tokenizers."""
    words = {}
    tokenizers, text_encoders = text_models_of(family, pipeline)
    for part in family.text_encoders:
        vectors = {token: own[part.name] for token, (own, _) in tokens.items()}
        # Other pipelines may share the tokenizer object: ours becomes a copy, and theirs does not change.
        added = words[part.tokenizer] = put_words(tokenizers[part.name], text_encoders[part.name], vectors)
        setattr(pipeline, part.tokenizer, added.tokenizer)
    return words


def _combine(
    concepts: Sequence[Concept],
) -> tuple[dict[str, tuple[Tensor, Concept]], dict[str, tuple[dict[str, Tensor], Concept]]]:
    """Projections and tokens of all concepts, each with the concept that it is of."""
    attention: dict[str, tuple[Tensor, Concept]] = {}
    tokens: dict[str, tuple[dict[str, Tensor], Concept]] = {}
    for concept in concepts:
        for token, vectors in concept.tokens.items():
            if token in tokens:
                raise UserError(f"{token!r} is a token of {tokens[token][1].source!r} and of {concept.source!r}")
            tokens[token] = (vectors, concept)
        for key, weight in (concept.attention | concept.differences).items():
            if key in attention and not torch.equal(attention[key][0].float(), weight.float()):
                raise UserError(
                    f"{attention[key][1].source!r} and {concept.source!r} each trained their own attention weights; "
                    "one UNet can hold one set: merge them with merge.py, or train them together with --concepts_list"
                )
            attention.setdefault(key, (weight, concept))
    return attention, tokens


def _find_parameter(unet: nn.Module, key: str, concept: Concept) -> nn.Parameter:
    path, parameter = formats.parameter_name(key).rsplit(".", 1)
    try:
        module = unet.get_submodule(path)
        # A LoRA that was loaded before wraps the projection; the concept belongs into what it wraps.
        found = getattr(getattr(module, "base_layer", module), parameter)
    except AttributeError:
        refuse_other_model(concept, f"this pipeline's UNet has no {path}")
    if found.is_meta:
        raise UserError("apply the concept before enabling offloading: the UNet's weights are not in memory")
    return found
