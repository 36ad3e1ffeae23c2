"""A concept inside a pipeline: how it goes in, and how it comes out again.

Others change the same models: LoRAs are fused into them, projections are fused with each other, textual inversions
share the vocabulary, weights are moved and offloaded. Whatever comes in between, either all is as it should be, or one
line refuses and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from custom_diffusion.concept.files import Concept
from custom_diffusion.concept.gating import GatedUNet, ReadTexts, TokenGate
from custom_diffusion.concept.projections import check_shape, refuse_other_model
from custom_diffusion.concept.unet import Projection, find_projection, lora_is_fused, unwrapped
from custom_diffusion.errors import UserError
from custom_diffusion.models.families import Family, family_of, text_models_of
from custom_diffusion.models.vocabulary import (
    AddedWords,
    check_new_words,
    embedding_table,
    put_words,
    why_words_cannot_change,
)

_MARK = "_applied_concept"  # an attribute of the UNet


@dataclass
class AppliedConcept:
    """Concepts inside a pipeline; :meth:`remove` takes them out again, exactly.

    Attributes:
        pipeline: that they were put into. Other pipelines that share its models have them too.
        tokens: their modifier tokens.
    """

    pipeline: DiffusionPipeline
    tokens: list[str]
    _unet: Any = field(repr=False)
    _keys: list[str] = field(repr=False)
    _words: list[AddedWords] = field(repr=False)
    _gated: GatedUNet | None = field(default=None, repr=False)
    _removed: bool = field(default=False, repr=False)

    def remove(self) -> None:
        """Give UNet, text encoders and tokenizers the values they had before, in the type that they have now.

        What others have added since, such as textual inversions, stays. A second call does nothing.

        Raises:
            UserError: where that cannot be done now, because a LoRA is fused or weights are offloaded; nothing is
                changed then.
        """
        if self._removed:
            return
        _check_no_lost_lora(self.pipeline, self._unet)
        projections = [find_projection(self._unet, key) for key in self._keys]
        for projection in projections:
            projection.check_restorable()
        for words in self._words:
            _check_changeable(words.text_encoder)
        self._take_out()

    def _take_out(self) -> None:
        if self._gated is not None:
            self._gated.remove()
        for projection in (find_projection(self._unet, key) for key in self._keys):
            projection.restore()
        for words in self._words:
            words.remove()
        setattr(self._unet, _MARK, False)
        self._removed = True


def apply_concepts(
    pipeline: DiffusionPipeline, *concepts: Concept, scale: float | Sequence[float] = 1.0
) -> AppliedConcept:
    """Put one or several concepts into any pipeline of the Stable Diffusion family.

    The learned keys and values (and queries and outputs) are copied into the UNet's own ``attn2`` projections and
    the tokens into tokenizers and text encoders. Nothing is added to the forward pass, so speed stays as it was, and
    image-to-image, ControlNet or LoRA pipelines work as they do on the base model. Pipelines that share these models
    (``from_pipe``, ``**pipeline.components``) share the concept, whether they are made before or after.

    Concepts with ``--token_gate`` leave the projections as they are; their changes are added behind them, at their own
    words. ``prompt_embeds`` must come from this pipeline's ``encode_prompt``, after the concepts were applied.

    ``cross_attention_kwargs={"scale": ...}`` of a pipeline's call has no effect on a concept; it is for LoRAs.

    Args:
        pipeline: one of diffusers', of a family that :mod:`custom_diffusion.models.families` knows.
        concepts: several must agree wherever they trained the same projections (merging is another matter).
        scale: 0 keeps the base model's projections, 1 takes the learned ones, between and beyond blends linearly.
            Token embeddings have no counterpart in the base model and always go in whole. One, or one for each.

    Returns:
        A handle whose ``remove()`` restores the pipeline exactly.

    Raises:
        UserError: where a concept does not fit the pipeline or the others, or something is in its way, such as a LoRA
            that is fused or weights that are offloaded; nothing is changed then.
    """
    scales = _scales(scale, len(concepts))
    attention, tokens = _combine(concepts)
    family = family_of(pipeline.components, "this pipeline's model")
    _check_whole(pipeline, family)
    unet = unwrapped(pipeline.unet)
    if getattr(unet, _MARK, False):
        raise UserError("this pipeline already has a concept: remove() it first, or apply all of them in one call")
    here = repr(getattr(pipeline, "name_or_path", None) or "this pipeline's model")
    _check_no_lost_lora(pipeline, unet)
    projections = {key: _fitting_projection(unet, key, *owned, here) for key, owned in attention.items()}
    gated = _gated_projections(unet, concepts, here)
    tokenizers, text_encoders = text_models_of(family, pipeline)
    check_tokens(tokens, family, tokenizers, text_encoders, here)
    for text_encoder in text_encoders.values() if tokens else ():
        _check_changeable(text_encoder)

    applied = AppliedConcept(pipeline, list(tokens), unet, list(attention), [])
    try:
        for key, projection in projections.items():
            weight, owner = attention[key]
            own = next(own for own, concept in zip(scales, concepts, strict=True) if concept is owner)
            projection.learn(weight, own, is_difference=key in owner.differences)
        for name, tokenizer in tokenizers.items() if tokens else ():
            vectors = {token: own[name] for token, (own, _) in tokens.items()}
            applied._words.append(put_words(tokenizer, text_encoders[name], vectors))
        if gated:
            applied._gated = _gate(unet, gated, family, pipeline, concepts, scales)
    except BaseException:  # such as Ctrl-C, or a GPU without memory for the originals
        applied._take_out()
        raise
    setattr(unet, _MARK, True)
    return applied


def _scales(scale: float | Sequence[float], count: int) -> list[float]:
    """A scale for each of the concepts."""
    scales = [float(scale)] * count if isinstance(scale, int | float) else [float(one) for one in scale]
    if len(scales) != count:
        raise UserError(f"there are {len(scales)} scales for {count} concepts: give one, or one for each")
    return scales


def _check_whole(pipeline: DiffusionPipeline, family: Family) -> None:
    missing = [name for name in ("unet", *_text_parts(family)) if getattr(pipeline, name, None) is None]
    if missing:
        raise UserError(f"this pipeline has no {missing[0]}: load it whole, a concept changes UNet and text encoders")


def _gated_projections(unet: Any, concepts: Sequence[Concept], here: str) -> dict[str, Projection]:
    """The projections behind which gated concepts act, by their keys."""
    return {
        key: _fitting_projection(unet, key, weight, concept, here, gated=True)
        for concept in concepts
        for gate in concept.gates
        for key, weight in gate.whole().items()
    }


def _gate(
    unet: Any,
    projections: Mapping[str, Projection],
    family: Family,
    pipeline: DiffusionPipeline,
    concepts: Sequence[Concept],
    scales: Sequence[float],
) -> GatedUNet:
    """Let gated concepts act at their words, which the tokenizer knows by now."""
    gates = [(gate, scale) for concept, scale in zip(concepts, scales, strict=True) for gate in concept.gates]
    first, (tokenizers, text_encoders) = family.text_encoders[0].name, text_models_of(family, pipeline)
    gate_of_all = TokenGate(tokenizers[first], [gate.words for gate, _ in gates])
    texts = ReadTexts(gate_of_all, text_encoders[first])
    layers: list[tuple[Any, str, int]] = []
    try:
        for number, (gate, _) in enumerate(gates):
            for key, change in gate.whole().items():
                parameter, module, name = projections[key].parameter, projections[key].linear, f"gated_change_{number}"
                module.register_buffer(name, change.to(parameter.device, parameter.dtype), persistent=False)
                layers.append((module, name, number))
        return GatedUNet(unet, texts, layers, [scale for _, scale in gates])
    except BaseException:  # such as a GPU without memory for the changes
        texts.remove()
        for module, name, _ in layers:
            delattr(module, name)
        raise


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
        UserError: for a token that a vocabulary has already, that is another to the tokenizer, of another width, or of
            another family.
    """
    for token, (vectors, concept) in tokens.items():
        if vectors.keys() != text_encoders.keys():
            refuse_other_model(concept, f"has {token!r} for {', '.join(vectors)}; {here} is of {family.name}")
        for name, vector in vectors.items():
            check_shape(concept, token, vector, embedding_table(text_encoders[name])[0], here)
    whose = _of(dict.fromkeys(concept.source for _, concept in tokens.values()))
    for tokenizer in tokenizers.values():
        check_new_words(tokens, tokenizer, whose)


def _of(sources: Iterable[str]) -> str:
    return f" of {' or '.join(map(repr, sources))}"


def _text_parts(family: Family) -> list[str]:
    return [name for part in family.text_encoders for name in (part.tokenizer, part.name)]


def _combine(
    concepts: Sequence[Concept],
) -> tuple[dict[str, tuple[Tensor, Concept]], dict[str, tuple[dict[str, Tensor], Concept]]]:
    """Projections and tokens of all concepts, each with the concept that it is of."""
    attention: dict[str, tuple[Tensor, Concept]] = {}
    tokens: dict[str, tuple[dict[str, Tensor], Concept]] = {}
    for concept in concepts:
        for token, vectors in concept.tokens.items():
            known = next((one for one in tokens if one.lower() == token.lower()), None)  # as tokenizers read them
            if known is not None and (concept.gates or tokens[known][1].gates):
                raise UserError(
                    f"{known!r} is a token of {tokens[known][1].source!r} and of {concept.source!r}: train one of them "
                    "with another --modifier_token"
                )
            if known is not None:
                raise UserError(
                    f"{known!r} is a token of {tokens[known][1].source!r} and of {concept.source!r}: "
                    "merge.py makes one concept of the two and renames one of the tokens"
                )
            tokens[token] = (vectors, concept)
        differences = {key: difference.whole() for key, difference in concept.differences.items()}
        for key, weight in (concept.attention | differences).items():
            if key in attention and not torch.equal(attention[key][0].float(), weight.float()):
                raise UserError(
                    f"{attention[key][1].source!r} and {concept.source!r} each trained their own attention weights; "
                    "one UNet can hold one set: merge them with merge.py, or train them together with --concepts_list"
                )
            attention.setdefault(key, (weight, concept))
    return attention, tokens


def _fitting_projection(
    unet: Any, key: str, weight: Tensor, concept: Concept, here: str, gated: bool = False
) -> Projection:
    try:
        projection = find_projection(unet, key)
    except AttributeError:
        refuse_other_model(concept, f"{here} has no {key.split('.processor.')[0]}")
    check_shape(concept, key.split(".processor.")[1], weight, projection.parameter, here)
    projection.check_free(may_be_fused=gated)
    return projection


def _check_changeable(text_encoder: Any) -> None:
    reason = why_words_cannot_change(text_encoder)
    if reason is not None:
        raise UserError(f"the vocabulary of the text encoder cannot be changed now: {reason}")


def _check_no_lost_lora(pipeline: DiffusionPipeline, unet: Any) -> None:
    """Refuse a pipeline whose LoRA is fused but unloaded: nobody knows any more what it changed."""
    if getattr(pipeline, "fused_loras", None) and not any(map(lora_is_fused, unet.modules())):
        raise UserError(
            "a LoRA was fused into this pipeline and then unloaded, so that it cannot be told from the base model: "
            "load the pipeline again, and fuse LoRAs after applying the concept"
        )
