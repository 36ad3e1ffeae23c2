"""Merging concepts that were trained separately, in closed form (Custom Diffusion paper, section 3.2)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from custom_diffusion.concept.applying import check_new_tokens, complete
from custom_diffusion.concept.files import Concept, check_token_name
from custom_diffusion.concept.prompts import LARGE_WORDS, SMALL_WORDS, class_words
from custom_diffusion.errors import UserError

CAPTIONS = Path(__file__).with_name("regularization.txt")


RIDGE = 1e-9  # relative to the mean square of a feature over all captions


# How much --prior_weight leaves as learned what nobody asks about; relative to the mean square of a prompts' feature.
NEARNESS = 0.1


TOLERANCE = 1e-5  # of the constraint, relative: what float32 weights can hold and no image can show


# fmt: on


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


def merge_weights(base: Tensor, targets: Tensor, values: Tensor, directions: Tensor) -> Tensor:
    """The weights that map targets to values and change the answers to unrelated captions least.

    Minimises ``||W Creg^T - W0 Creg^T||_F`` subject to ``W C^T = V`` (paper, section 3.2 and appendix):
    ``W = W0 + (V^T - W0 C^T) (d C^T)^-1 d``.

    Args:
        base: W0, (out, width).
        targets: C, (s, width).
        values: V, (s, out), what each concept's own weights make of its features.
        directions: d, (s, width), of :func:`merging_directions`.

    Returns:
        W, (out, width), in float64 like the computation; inputs may have any floating type.

    Raises:
        UserError: where targets are the same, and so cannot be told apart.
    """
    base, targets, values, directions = (x.double() for x in (base, targets, values, directions))
    # d C^T is symmetric, so one solve from the left does.
    products = directions @ targets.T
    # Equal targets need not fail to solve: rounding decides, and the answer would be arbitrary.
    if not torch.isfinite(products).all() or torch.linalg.matrix_rank(products, rtol=1e-12) < len(products):
        raise UserError("two of the concepts are the same, or their words are: give other --class_words")
    change = torch.linalg.solve(products, values - targets @ base.T)
    return base + change.T @ directions


def weigh_weights(
    base: Tensor, learned: Sequence[Tensor], targets: Sequence[Tensor], regularization: Tensor, prior_weight: float
) -> Tensor:
    """The weights that answer the concepts' prompts as learned and unrelated captions as the base model, in balance.

    With Grams (mean squares) A_c of the targets of concept c and B of the captions, and D_c what it learned, minimises
    ``sum_c |(W - W_c) A_c^1/2|^2 + prior_weight |(W - W0) B^1/2|^2 + m |W - W0 - sum_c D_c|^2``:
    ``W = W0 + (sum_c D_c (A_c + m)) (sum_c A_c + prior_weight B + m)^-1``. That is the paper's objective (section 3.2)
    with its constraint made a part of the sum. The last term, `NEARNESS`, keeps directions that neither asks about:
    without it these are free, and prompts unlike all of these answer with anything.

    Args:
        base: W0, (out, width).
        learned: W_c, (out, width) each.
        targets: A_c, (width, width) each, as :func:`mean_square` gives them.
        regularization: B, alike.
        prior_weight: at least 0; 0 keeps what a single concept has learned.

    Returns:
        W, (out, width), in float64 like the computation; inputs may have any floating type.
    """
    base, regularization = base.double(), regularization.double()
    together = sum(target.double() for target in targets)
    near = NEARNESS * together.diagonal().mean() * torch.eye(len(together), dtype=torch.float64)
    wanted = sum((own.double() - base) @ (a.double() + near) for own, a in zip(learned, targets, strict=True))
    # The sum is symmetric, so a solve from the left of what is transposed does.
    return base + torch.linalg.solve(together + prior_weight * regularization + near, wanted.T).T


def constraint_error(weights: Tensor, targets: Tensor, values: Tensor) -> float:
    """``||W C^T - V|| / ||V||`` in the Frobenius norm; shapes as in :func:`merge_weights`."""
    reached = targets.double() @ weights.double().T
    return ((reached - values).norm() / values.norm().clamp(min=1e-300)).item()


@torch.no_grad()
def text_features(
    prompts: Sequence[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel, leave_out: str = ""
) -> Tensor:
    """Features of every token of the prompts up to the first end-of-text, without the start token.

    Args:
        prompts: texts; longer ones than the encoder's 77 tokens are cut.
        tokenizer, encoder: of the base model, with the modifier tokens in them.
        leave_out: words at the start of every prompt whose features are not wanted.

    Returns:
        (number of tokens of all prompts, width), float32.
    """
    skip = 1 + len(tokenizer(leave_out, add_special_tokens=False).input_ids)
    ids = [tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids for prompt in prompts]
    features: list[Tensor] = []
    # The encoder is causal: what is behind a token does not change it, so no padding is needed, only equal lengths.
    for length in sorted(set(map(len, ids))):
        rows = torch.tensor([row for row in ids if len(row) == length])
        features += [encoder(part)[0][:, skip:].flatten(0, 1) for part in rows.split(64)]
    return torch.cat(features)


@torch.no_grad()
def mean_square(prompts: Sequence[str], tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> Tensor:
    """``F^T F / n`` of the features F of n prompts at all positions, as a UNet sees them; (width, width), float64.

    Start and padding are the same in every prompt, and so weigh most: what is changed there is changed for all.
    """
    total = torch.zeros((encoder.config.hidden_size,) * 2, dtype=torch.float64)
    for start in range(0, len(prompts), 64):
        batch = list(prompts[start : start + 64])
        ids = tokenizer(batch, padding="max_length", truncation=True, return_tensors="pt").input_ids
        features = encoder(ids)[0].flatten(0, 1).double()
        total += features.T @ features
    return total / len(prompts)


def read_captions(path: Path, count: int) -> list[str]:
    """At most ``count`` captions, spread evenly over the file.

    Raises:
        UserError: for a file that cannot be read or is empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--captions {str(path)!r} cannot be read: {getattr(error, 'strerror', error)}") from error
    captions = list(dict.fromkeys(line for line in lines if line))
    if not captions:
        raise UserError(f"--captions {str(path)!r} has no captions")
    return [captions[number * len(captions) // count] for number in range(min(count, len(captions)))]


@dataclass(frozen=True)
class Part:
    """One of the concepts to merge, with tokens that no other has.

    Attributes:
        concept: under its tokens' new names.
        words: token to class words, such as ``wooden pot``.
    """

    concept: Concept
    words: dict[str, str]

    def phrases(self) -> list[str]:
        """The concept's words as they stand in prompts, ``<new1> cat``."""
        return [f"{token} {self.words[token]}".strip() for token in self.concept.tokens]


def prepare_parts(concepts: Sequence[Concept], given_words: Sequence[str] | None) -> list[Part]:
    """Give every token its class words, and a name of its own; says what was renamed.

    Raises:
        UserError: where class words are missing or too many, or a concept cannot be merged.
    """
    for concept in concepts:
        check_mergeable(concept, concepts[0])
    count = sum(len(concept.tokens) for concept in concepts)
    if given_words is not None and len(given_words) != count:
        raise UserError(f"--class_words has {len(given_words)} entries for {count} tokens: give one for each")
    taken = {token for concept in concepts for token in concept.tokens}
    used: set[str] = set()
    remaining = iter(given_words or ())
    parts = []
    for concept in concepts:
        known = class_words(concept)
        tokens, words, names = {}, {}, {}
        for token, vector in concept.tokens.items():
            if given_words is None and token not in known:
                raise UserError(
                    f"the card of {concept.source!r} does not say what {token!r} is: "
                    "give a class for every token, such as --class_words cat 'wooden pot'"
                )
            name = names[token] = free_name(token, taken) if token in used else token
            taken.add(name)
            used.add(name)
            tokens[name], words[name] = vector, next(remaining) if given_words is not None else known[token]
            if name != token:
                print(f"{token} of {concept.source} is now {name}, because another concept has {token} too")
        prompt = None if concept.instance_prompt is None else _rename(concept.instance_prompt, names)
        parts.append(Part(replace(concept, tokens=tokens, instance_prompt=prompt), words))
    return parts


def check_mergeable(concept: Concept, first: Concept) -> None:
    """Refuse what the closed form has no answer for.

    Raises:
        UserError: for a concept without tokens or keys and values, or with other layers than the first one.
    """
    keys, others = ({*c.attention, *c.differences} for c in (concept, first))
    if any("to_q_custom" in key or "to_out_custom" in key for key in keys):
        raise UserError(
            f"{concept.source!r} also trained queries and outputs (--freeze_model crossattn): only keys and values "
            "see nothing but text, so only they can be merged; train the concepts together with --concepts_list"
        )
    if not keys or not concept.tokens:
        raise UserError(f"{concept.source!r} has no {'tokens' if keys else 'attention weights'} to merge")
    if keys != others:
        raise UserError(f"{first.source!r} and {concept.source!r} have different layers: other base models")


def free_name(token: str, taken: set[str]) -> str:
    """The first of ``<new2>``, ``<new3>``, ... that is not taken, for ``<new1>``; ``<cat2>`` for ``<cat>``."""
    match = re.fullmatch(r"(.*?)(\d*)(>?)", token)
    assert match is not None
    number = int(match[2] or 1)
    while token in taken:
        number += 1
        token = f"{match[1]}{number}{match[3]}"
    check_token_name(token)
    return token


def _rename(text: str, names: Mapping[str, str]) -> str:
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(pattern, lambda match: names[match[0]], text)


@torch.no_grad()
def add_tokens(parts: Sequence[Part], tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
    """Put the tokens of all parts into tokenizer and text encoder.

    Raises:
        UserError: for a token that the vocabulary has already, or of another width.
    """
    tokens = {
        token: (vectors["text_encoder"], part.concept)
        for part in parts
        for token, vectors in part.concept.tokens.items()
    }
    check_new_tokens(tokens, tokenizer, encoder)
    tokenizer.add_tokens(list(tokens))
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    for token, (vector, _) in tokens.items():
        table[tokenizer.convert_tokens_to_ids(token)] = vector.to(table.dtype)


def target_features(parts: Sequence[Part], tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> list[Tensor]:
    """Per part the features of its words, alone and behind "photo of a", each (tokens, width)."""
    features = []
    for part in parts:
        phrases = part.phrases()
        alone = text_features(phrases, tokenizer, encoder)
        lead = "photo of a"
        in_prompt = text_features([f"{lead} {phrase}" for phrase in phrases], tokenizer, encoder, lead)
        features.append(torch.cat([alone, in_prompt]))
    return features


def concept_prompts(part: Part, captions: Sequence[str]) -> list[str]:
    """Prompts of the part's concepts: alone, as training shows them, and those captions that name their classes.

    In the last the concepts take the place of their classes: "a cat on the grass" becomes "a <new1> cat on the grass".
    """
    sizes = ("", *SMALL_WORDS, *LARGE_WORDS)
    prompts = part.phrases()
    prompts += [f"{size}photo of a {phrase}" for phrase in part.phrases() for size in sizes]
    phrases_of: dict[str, list[str]] = {}
    for words, phrase in zip(part.words.values(), part.phrases(), strict=True):
        if words:
            phrases_of.setdefault(words, []).append(phrase)
    if phrases_of:
        # The longest first: "cat face" has "cat" in it.
        classes = re.compile(rf"\b({'|'.join(map(re.escape, sorted(phrases_of, key=len, reverse=True)))})\b")
        # Two tokens may be of one class: each gets its turn in every caption.
        for turn in range(max(map(len, phrases_of.values()))):
            chosen = {words: phrases[turn % len(phrases)] for words, phrases in phrases_of.items()}
            named = [classes.sub(lambda match, chosen=chosen: chosen[match[0]], caption) for caption in captions]
            prompts += [prompt for prompt, caption in zip(named, captions, strict=True) if prompt != caption]
    return prompts


def check_shape(part: Part, key: str, own: Tensor, base: Tensor) -> None:
    """Refuse a concept that was learned on another base model.

    Raises:
        UserError: where its projection ``key`` has another shape than the base model's.
    """
    if own.shape != base.shape:
        raise UserError(
            f"{part.concept.source!r} has {key!r} of shape {tuple(own.shape)}, the base model has "
            f"{tuple(base.shape)}: give the base model that it was trained on"
        )


def weigh_concepts(
    parts: Sequence[Part],
    base: Mapping[str, Tensor],
    targets: Sequence[Tensor],
    regularization: Tensor,
    prior_weight: float,
) -> tuple[Concept, float]:
    """Weigh concepts against captions, layer by layer.

    Args:
        parts: one or more.
        base: the base model's projections, keyed like :attr:`concept.Concept.attention`.
        targets, regularization, prior_weight: as :func:`weigh_weights` takes them.

    Returns:
        The concepts in one, and how far the answers to the captions still move, as a part (root mean square) of how far
        all that was learned moves them.

    Raises:
        UserError: where a concept does not fit the base model.
    """
    wholes = [complete(part.concept, base).attention for part in parts]
    attention, moved, moved_before = {}, 0.0, 0.0
    for key, weight in base.items():
        for part, whole in zip(parts, wholes, strict=True):
            check_shape(part, key, whole[key], weight)
        learned = [whole[key] for whole in wholes]
        attention[key] = weigh_weights(weight, learned, targets, regularization, prior_weight).float()
        change, change_before = attention[key] - weight, sum(own - weight for own in learned)
        moved += (change.double() @ regularization * change).sum().item()
        moved_before += (change_before.double() @ regularization * change_before).sum().item()
    tokens = {token: vector for part in parts for token, vector in part.concept.tokens.items()}
    return Concept(attention, tokens), math.sqrt(moved / moved_before) if moved_before else 1.0


def merge_concepts(
    parts: Sequence[Part], base: Mapping[str, Tensor], targets: Sequence[Tensor], regularization: Tensor
) -> tuple[Concept, float]:
    """Merge layer by layer.

    Args:
        parts: at least two.
        base: the base model's projections, keyed like :attr:`concept.Concept.attention`.
        targets: as :func:`target_features` gives them.
        regularization: features of unrelated captions, (n, width).

    Returns:
        The merged concept and its worst relative constraint error.

    Raises:
        UserError: as the two functions above; where a concept does not fit the base model; where the constraint is
            missed by more than 1e-5.
    """
    wholes = [complete(part.concept, base).attention for part in parts]
    attention, worst = {}, 0.0
    together = torch.cat(list(targets))
    directions = merging_directions(together, regularization)
    for key, weight in base.items():
        for part, whole in zip(parts, wholes, strict=True):
            check_shape(part, key, whole[key], weight)
        values = torch.cat([c.double() @ whole[key].double().T for c, whole in zip(targets, wholes, strict=True)])
        attention[key] = merge_weights(weight, together, values, directions).float()
        worst = max(worst, constraint_error(attention[key], together, values))
    if not worst <= TOLERANCE:
        raise UserError(
            f"the merged weights miss the concepts by {worst:.1e} of their size, more than {TOLERANCE}: the concepts' "
            "words are too much alike; give other --class_words"
        )
    tokens = {token: vector for part in parts for token, vector in part.concept.tokens.items()}
    return Concept(attention, tokens), worst
