"""A concept inside a pipeline: how it goes in, and how it comes out again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

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


def complete(concept: Concept, base: Mapping[str, Tensor]) -> Concept:
    """The concept with full projections in place of differences.

    Args:
        base: the base model's projections, keyed like ``attention``; for every key of ``differences``.

    Raises:
        UserError: where a difference does not fit its projection.
    """
    attention = dict(concept.attention)
    for key, difference in concept.differences.items():
        if key not in base or base[key].shape != difference.shape:
            raise UserError(f"{_trained_on(concept)}; the base model given has no fitting {key!r}")
        attention[key] = base[key].float() + difference
    return replace(concept, attention=attention, differences={})


@dataclass
class AppliedConcept:
    """Concepts inside a pipeline; :meth:`remove` takes them out again, exactly."""

    pipeline: Any
    tokens: list[str]
    _weights: list[tuple[nn.Parameter, Tensor]] = field(repr=False)
    _tokenizer: Any = field(repr=False)
    _table_rows: int = field(repr=False)
    _covered_rows: Tensor = field(repr=False)

    def remove(self) -> None:
        """Restore UNet, text encoder and tokenizer to the values they had before."""
        with torch.no_grad():
            for parameter, original in self._weights:
                parameter.copy_(original)
            if self.tokens:
                encoder = self.pipeline.text_encoder
                first = len(self._tokenizer)
                table = encoder.get_input_embeddings().weight
                table[first : first + len(self._covered_rows)] = self._covered_rows
                encoder.resize_token_embeddings(self._table_rows, mean_resizing=False)
                self.pipeline.tokenizer = self._tokenizer
        self.pipeline.unet._applied_concept = None


def apply_concepts(pipeline: Any, *concepts: Concept, scale: float = 1.0) -> AppliedConcept:
    """Put one or several concepts into any pipeline of the Stable Diffusion family.

    The learned keys and values (and queries and outputs) are copied into the UNet's own ``attn2`` projections and
    the tokens into tokenizer and text encoder. Nothing is added to the forward pass, so speed stays as it was, and
    image-to-image, ControlNet or LoRA pipelines work as they do on the base model.

    Args:
        pipeline: has ``unet``, ``text_encoder`` and ``tokenizer``.
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
    parameters = {key: _find_parameter(pipeline.unet, key, concept) for key, (_, concept) in attention.items()}
    for key, parameter in parameters.items():
        _check_fit(key, attention[key][0], parameter, attention[key][1], pipeline)
    if tokens:
        check_new_tokens(tokens, pipeline.tokenizer, pipeline.text_encoder)

    weights = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    table = encoder.get_input_embeddings().weight
    applied = AppliedConcept(
        pipeline, list(tokens), weights, tokenizer, len(table), table[len(tokenizer) :][: len(tokens)].clone()
    )
    with torch.no_grad():
        for key, parameter in parameters.items():
            value, concept = attention[key]
            original, learned = parameter.float(), value.to(parameter.device, torch.float32)
            if key in concept.differences:
                learned = original + learned
            parameter.copy_(torch.lerp(original, learned, scale))
        if tokens:
            # Other pipelines may share the tokenizer object: ours becomes a copy, and theirs does not change.
            pipeline.tokenizer = copy.deepcopy(tokenizer)
            pipeline.tokenizer.add_tokens(list(tokens))
            if len(pipeline.tokenizer) > len(table):
                encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
            table = encoder.get_input_embeddings().weight
            for token, (vector, _) in tokens.items():
                table[pipeline.tokenizer.convert_tokens_to_ids(token)] = vector.to(table.device, table.dtype)
    pipeline.unet._applied_concept = applied
    return applied


_Owned = dict[str, tuple[Tensor, Concept]]


def _combine(concepts: Sequence[Concept]) -> tuple[_Owned, _Owned]:
    attention: _Owned = {}
    tokens: _Owned = {}
    for concept in concepts:
        for token, vectors in concept.tokens.items():
            vector = vectors["text_encoder"]
            if token in tokens:
                raise UserError(f"{token!r} is a token of {tokens[token][1].source!r} and of {concept.source!r}")
            tokens[token] = (vector, concept)
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
        raise UserError(f"{_trained_on(concept)}; this pipeline's UNet has no {path}") from None
    if found.is_meta:
        raise UserError("apply the concept before enabling offloading: the UNet's weights are not in memory")
    return found


def _check_fit(key: str, weight: Tensor, parameter: nn.Parameter, concept: Concept, pipeline: Any) -> None:
    if weight.shape != parameter.shape:
        here = getattr(pipeline, "name_or_path", None) or "this pipeline's model"
        raise UserError(
            f"{_trained_on(concept)}, with {key.split('.processor.')[1]} of shape {tuple(weight.shape)}; "
            f"{here!r} wants {tuple(parameter.shape)}: load the base model that the concept was trained on"
        )


def check_new_tokens(tokens: Mapping[str, tuple[Tensor, Concept]], tokenizer: Any, encoder: nn.Module) -> None:
    """Make sure that tokenizer and text encoder can take new words.

    Args:
        tokens: each with its embedding, (width,), and the concept that it is of.

    Raises:
        UserError: for a token that the vocabulary has already, or of another width.
    """
    vocabulary, width = tokenizer.get_vocab(), encoder.get_input_embeddings().embedding_dim
    for token, (vector, concept) in tokens.items():
        if token in vocabulary:
            raise UserError(f"the token {token!r} of {concept.source!r} is in the tokenizer's vocabulary already")
        if vector.shape != (width,):
            raise UserError(
                f"{_trained_on(concept)}, with {token!r} of shape {tuple(vector.shape)}; the text encoder here wants "
                f"{(width,)}: load the base model that the concept was trained on"
            )


def _trained_on(concept: Concept) -> str:
    return f"{concept.source!r} was trained on {concept.base_model or 'an unnamed base model'!r}"
