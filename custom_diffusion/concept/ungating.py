"""Weights that act everywhere, nearest to those of gated concepts: for programs that cannot express a gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from custom_diffusion.concept.closed_form import ungate_change
from custom_diffusion.concept.files import Concept
from custom_diffusion.concept.gating import TokenGate
from custom_diffusion.concept.parts import Part, concept_prompts
from custom_diffusion.concept.projections import check_shape, complete, original_projections
from custom_diffusion.concept.prompts import class_words
from custom_diffusion.concept.text_features import TextModels
from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel


@dataclass(frozen=True)
class Ungated:
    """A concept whose weights act everywhere, and how far it is from the gated one, over a set of prompts.

    Attributes:
        concept: without gates.
        prompts: how many name the concept, and how many do not.
        missed: at the concept's words, what keys and values lack of what was learned; relative, root mean square.
        moved: everywhere else, how far they are from the base model's; relative, root mean square.
    """

    concept: Concept
    prompts: tuple[int, int]
    missed: float
    moved: float

    def loss(self) -> str:
        """What is lost, in a sentence."""
        return (
            f"at the concept's words it misses {self.missed:.1%} of what was learned, and everywhere else it moves "
            f"keys and values by {self.moved:.1%} of the base model's, where the gated concept moves nothing (over "
            f"{self.prompts[0]} prompts with these words and {self.prompts[1]} without)"
        )


def prompts_of(concept: Concept, captions: Sequence[str]) -> list[str]:
    """Captions, and prompts that name a gated concept: alone, in captions of its class, and beside what others show."""
    known = class_words(concept)
    words = {token: known.get(token, "") for token in concept.tokens}
    for gate in concept.gates:
        if gate.words.classes:
            words |= dict.fromkeys(gate.words.tokens, gate.words.classes[0])
    part = Part(concept, words)
    phrases, beside = part.phrases(), []
    for number, caption in enumerate(captions):
        phrase = f"a {phrases[number // 2 % len(phrases)]}"
        beside.append(f"{phrase} next to {caption}" if number % 2 else f"{caption} next to {phrase}")
    return list(dict.fromkeys([*concept_prompts(part, captions), *beside, *captions]))


def ungate(concept: Concept, base_model: BaseModel, prompts: Sequence[str]) -> Ungated:
    """The plain weights that come nearest to gated ones in the mean square over prompts.

    Prompts that name the concept and prompts that do not weigh the same, however many there are of each.

    Args:
        concept: with one or several gated concepts.
        prompts: with the concepts' words and without.

    Raises:
        UserError: where no prompt has the words of one of the concepts, or they do not fit the base model.
    """
    wholes = [gate.whole() for gate in concept.gates]
    originals = original_projections(base_model, {key: None for whole in wholes for key in whole})
    for whole in wholes:
        for key, change in whole.items():
            check_shape(concept, key, change, originals[key])
    text_models = TextModels.load(base_model)
    text_models.add_tokens([Part(concept, {})])
    gate = TokenGate(next(iter(text_models.tokenizers.values())), [one.words for one in concept.gates])
    naming, others = _split(prompts, text_models, gate)
    squares = text_models.mean_squares(naming, gate)
    if others:
        squares = squares + text_models.mean_squares(others, gate)
    own = squares[1:]
    elsewhere = squares[0] - own.sum(0)

    attention = dict(complete(concept, originals).attention)
    lost = learned = moved = known = 0.0
    for key, original in originals.items():
        changes = [whole.get(key, torch.zeros_like(original)).double() for whole in wholes]
        change = ungate_change(changes, squares)
        lost += sum(_size(change - one, a) for one, a in zip(changes, own, strict=True))
        learned += sum(_size(one, a) for one, a in zip(changes, own, strict=True))
        moved += _size(change, elsewhere)
        known += _size(original.double(), elsewhere)
        attention[key] = (attention.get(key, original).double() + change).float()
    plain = replace(concept, attention=attention, differences={}, gates=())
    return Ungated(plain, (len(naming), len(others)), _relative(lost, learned), _relative(moved, known))


def _split(prompts: Sequence[str], text_models: TextModels, gate: TokenGate) -> tuple[list[str], list[str]]:
    """The prompts that name a concept, and the others.

    Raises:
        UserError: where no prompt names one of the concepts.
    """
    mask = gate.mask(next(iter(text_models.tokenize(prompts).values()))).any(1)  # (prompts, concepts)
    for words, is_named in zip(gate.concepts, mask.any(0).tolist(), strict=True):
        if not is_named:
            raise UserError(f"no prompt has {' or '.join(words.tokens)}, so nothing says what it means: give some")
    named = mask.any(1).tolist()
    return [p for p, own in zip(prompts, named, strict=True) if own], [
        p for p, own in zip(prompts, named, strict=True) if not own
    ]


def _size(weights: Tensor, square: Tensor) -> float:
    """The sum of squares of what weights (out, width) make of features with ``F^T F`` (width, width)."""
    return ((weights @ square) * weights).sum().item()


def _relative(part: float, whole: float) -> float:
    return math.sqrt(max(part, 0.0) / whole) if whole > 0 else 0.0
