"""The concepts that are merged, each with tokens that no other has, and the prompts that name them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from custom_diffusion.concept.files import Concept, check_token_name
from custom_diffusion.concept.prompts import LARGE_WORDS, SMALL_WORDS, any_of, class_words, replace_words
from custom_diffusion.errors import UserError


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
    # Tokenizers read upper and lower case alike.
    taken = {token.lower() for concept in concepts for token in concept.tokens}
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
            name = names[token] = free_name(token, taken) if token.lower() in used else token
            taken.add(name.lower())
            used.add(name.lower())
            tokens[name], words[name] = vector, next(remaining) if given_words is not None else known[token]
            if name != token:
                print(f"{token} of {concept.source} is now {name}, because another concept has {token.lower()} too")
        prompt = None if concept.instance_prompt is None else replace_words(concept.instance_prompt, names)
        parts.append(Part(replace(concept, tokens=tokens, instance_prompt=prompt), words))
    return parts


def check_mergeable(concept: Concept, first: Concept) -> None:
    """Refuse what the closed form has no answer for.

    Raises:
        UserError: for a concept without tokens or keys and values, or with other layers than the first one.
    """
    if concept.gates:
        raise UserError(
            f"{concept.source!r} acts only at its own words (--token_gate) and needs no merging: give all of them to "
            "infer.py, which takes several --model_dir"
        )
    keys, others = (set(c.projections()) for c in (concept, first))
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
    """The first of ``<new2>``, ``<new3>``, ... that is not taken, for ``<new1>``; ``<cat2>`` for ``<cat>``.

    Args:
        taken: in lower case.
    """
    match = re.fullmatch(r"(.*?)(\d*)(>?)", token)
    assert match is not None
    number = int(match[2] or 1)
    while token.lower() in taken:
        number += 1
        token = f"{match[1]}{number}{match[3]}"
    check_token_name(token)
    return token


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
        classes = rf"\b({any_of(phrases_of)})\b"
        # Two tokens may be of one class: each gets its turn in every caption.
        for turn in range(max(map(len, phrases_of.values()))):
            chosen = {words: phrases[turn % len(phrases)] for words, phrases in phrases_of.items()}
            named = [_put_in(chosen, classes, caption) for caption in captions]
            prompts += [prompt for prompt, caption in zip(named, captions, strict=True) if prompt != caption]
    return prompts


def _put_in(phrases: Mapping[str, str], pattern: str, caption: str) -> str:
    return re.sub(pattern, lambda match: phrases[match[0]], caption)
