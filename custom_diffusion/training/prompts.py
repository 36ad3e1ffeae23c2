"""What the text encoders read of a run's prompts: whether every new word reaches them, and what is cut off."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import CLIPTokenizer

from custom_diffusion.command_line import one_or_several
from custom_diffusion.concept.prompts import LARGE_WORDS, SMALL_WORDS
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.errors import UserError
from custom_diffusion.models.vocabulary import fold
from custom_diffusion.text import some
from custom_diffusion.training.tokens import ModifierTokens

logger = logging.getLogger("custom_diffusion")


@dataclass(frozen=True)
class Reading:
    """What the text encoders read of a text.

    Attributes:
        named: the modifier tokens that stand in it as letters.
        found: those that every tokenizer finds in it.
        kept: those that are still there after the text is cut to the encoders' length.
        is_cut: whether it is longer than one of the encoders reads.
    """

    named: frozenset[str]
    found: frozenset[str]
    kept: frozenset[str]
    is_cut: bool


class Reader:
    """Reads texts as the text encoders do.

    Args:
        tokenizers: by the names of their text encoders; they know the modifier tokens.
        modifier_tokens: see :func:`tokens.add_modifier_tokens`.
    """

    def __init__(self, tokenizers: Mapping[str, CLIPTokenizer], modifier_tokens: ModifierTokens) -> None:
        self.tokenizers = tokenizers
        self.modifier_tokens = modifier_tokens
        # How many tokens of a text count, without start and end.
        self.room = min(one.model_max_length - one.num_special_tokens_to_add() for one in tokenizers.values())
        self.read = cache(self._read)

    def _read(self, text: str) -> Reading:
        found, kept = [frozenset(self.modifier_tokens.tokens)] * 2
        named, is_cut = frozenset[str](), False
        for name, tokenizer in self.tokenizers.items():
            whole = tokenizer(text, verbose=False).input_ids
            cut = tokenizer(text, truncation=True, max_length=tokenizer.model_max_length).input_ids
            found &= self._tokens_among(name, whole)
            kept &= self._tokens_among(name, cut)
            named |= self._named(text, tokenizer)
            is_cut |= len(whole) > len(cut)
        return Reading(named, found, kept, is_cut)

    def _tokens_among(self, encoder: str, ids: Iterable[int]) -> frozenset[str]:
        present = set(ids)
        pairs = zip(self.modifier_tokens.tokens, self.modifier_tokens.ids.get(encoder, ()), strict=True)
        return frozenset(token for token, number in pairs if number in present)

    def _named(self, text: str, tokenizer: CLIPTokenizer) -> frozenset[str]:
        words = {fold(token, tokenizer): token for token in self.modifier_tokens.tokens}
        if not words:
            return frozenset()
        # Longer ones first, as tokenizers look for them: "<new1>b" does not name "<new1>" where both are tokens.
        pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
        return frozenset(words[match] for match in re.findall(pattern, fold(text, tokenizer)))

    def longest_words(self) -> str:
        """Those of the augmentation's words that take the most room before a prompt."""
        one = next(iter(self.tokenizers.values()))
        return max((*SMALL_WORDS, *LARGE_WORDS), key=lambda words: len(one(words).input_ids))


def check_prompts(
    args: argparse.Namespace,
    concepts: Sequence[ConceptEntry],
    instance_images: Sequence[tuple[Path, str]],
    class_images: Sequence[tuple[Path, str]],
    others: Sequence[tuple[Path, str]],
    tokenizers: Mapping[str, CLIPTokenizer],
    modifier_tokens: ModifierTokens,
) -> None:
    """Make sure that the text encoders read every new word that a prompt names, and say what else they do not read.

    Args:
        concepts: with prior preservation, each with ``class_prompt``.
        instance_images, class_images: paths and prompts.
        others: alike, the images of ``--cutmix_data_dir``.
        tokenizers: by the names of their text encoders; they know the modifier tokens.

    Raises:
        UserError: for a token that no instance prompt has, or that is not read where it stands; for captions without
            a token of their concept; and as :func:`check_cutmix` does.
    """
    reader = Reader(tokenizers, modifier_tokens)
    words = "" if args.noaug else reader.longest_words()
    _check_tokens_are_named(concepts, reader)
    _check_captions(concepts, instance_images, reader)
    names = {prompt: f"the caption of {str(path)!r}" for path, prompt in reversed(instance_images)}
    names |= {concept.instance_prompt: f"the instance prompt {concept.instance_prompt!r}" for concept in concepts}
    for prompt, name in names.items():
        _check_nothing_is_lost(prompt, name, reader, words)
    validation_prompts = one_or_several(args.validation_prompt)
    for prompt in validation_prompts:
        _check_nothing_is_lost(prompt, f"--validation_prompt {prompt!r}", reader)
    check_cutmix(args, instance_images, others, tokenizers, reader)

    class_texts = {text: f"the caption of {str(path)!r}" for path, text in reversed(class_images)}
    if args.with_prior_preservation and not args.real_prior:
        class_texts = {one.class_prompt: f"the class prompt {one.class_prompt!r}" for one in concepts}
    cut = [name for prompt, name in names.items() if reader.read(words + prompt).is_cut]
    cut += [name for text, name in class_texts.items() if reader.read(text).is_cut]
    if any(reader.read(prompt).is_cut for prompt in validation_prompts):
        cut.append("--validation_prompt")
    if cut:
        logger.warning(f"the text encoder reads {reader.room} tokens of a text, and cuts {some(cut, 3)}")
    with_tokens = [name for text, name in class_texts.items() if reader.read(text).found]
    if with_tokens:
        logger.warning(f"class images will train the modifier tokens too, which stand in {some(with_tokens, 3)}")


def _check_tokens_are_named(concepts: Sequence[ConceptEntry], reader: Reader) -> None:
    prompts = ", ".join(repr(concept.instance_prompt) for concept in concepts)
    found = [reader.read(concept.instance_prompt).found for concept in concepts]
    named = frozenset().union(*(reader.read(concept.instance_prompt).named for concept in concepts))
    for token in reader.modifier_tokens.tokens:
        if token not in named.union(*found):
            raise UserError(
                f"the modifier token {token!r} is in no instance prompt ({prompts}), so it would learn nothing"
            )
    for concept, its in zip(concepts, found, strict=True):
        if reader.modifier_tokens.tokens and not its:
            logger.warning(f"the instance prompt {concept.instance_prompt!r} has none of the modifier tokens")


def _check_captions(
    concepts: Sequence[ConceptEntry], instance_images: Sequence[tuple[Path, str]], reader: Reader
) -> None:
    """Make sure that each image's own caption has one of the tokens that its concept's prompt has."""
    prompts = {concept.instance_prompt for concept in concepts}
    for folder in {concept.instance_folder: None for concept in concepts}:
        its = [concept.instance_prompt for concept in concepts if concept.instance_folder == folder]
        own = frozenset().union(*(reader.read(prompt).found for prompt in its))
        captioned = [(path, text) for path, text in instance_images if path.parent == folder and text not in prompts]
        without = [path.name for path, text in captioned if own and not own & reader.read(text).found]
        if without:
            raise UserError(
                f"in {str(folder)!r} the captions of {', '.join(without)} do not hold {' or '.join(sorted(own))}: "
                f"write it into them, as in {its[0]!r}, or take these captions away"
            )


def _check_nothing_is_lost(prompt: str, name: str, reader: Reader, words: str = "") -> None:
    """Make sure that every token that a prompt names is read, also with words of the augmentation before it."""
    whole = reader.read(prompt)
    for token in sorted(whole.named - whole.found):
        raise UserError(f"the tokenizer does not find the modifier token {token!r} in {name}: take another token")
    for token in sorted(whole.found - reader.read(words + prompt).kept):
        before = f" (with {words.strip()!r} before them, as the augmentation writes)" if token in whole.kept else ""
        raise UserError(
            f"{token!r} comes after the first {reader.room} tokens of {name}{before}, which are all that the text "
            "encoder reads: shorten the text, or name the token earlier"
        )


def check_cutmix(
    args: argparse.Namespace,
    instance_images: Sequence[tuple[Path, str]],
    others: Sequence[tuple[Path, str]],
    tokenizers: Mapping[str, CLIPTokenizer],
    reader: Reader,
) -> None:
    """With ``--cutmix_probability``, make sure that there is something to show, and that its prompts fit into one.

    Raises:
        UserError: where all images are in one folder, and there are no others; where another image's caption has a
            modifier token; and where the words of the second thing could be cut off, which would teach it to those of
            the first.
    """
    if not args.cutmix_probability:
        return
    for path, caption in others:
        for token in sorted(reader.read(caption).found):
            raise UserError(
                f"--cutmix_data_dir: the caption of {str(path)!r} has the modifier token {token!r}, but is to show "
                "other things: take it out"
            )
    longest: dict[Path, tuple[int, str]] = {}
    for path, prompt in (*instance_images, *others):
        length = max(len(one(prompt, add_special_tokens=False, verbose=False).input_ids) for one in tokenizers.values())
        longest[path.parent] = max(longest.get(path.parent, (0, "")), (length, prompt))
    if len(longest) < 2:
        raise UserError(
            f"--cutmix_probability shows one concept beside another, and {args.concepts_list!r} has images in one "
            "folder only: leave it out, or give each concept an instance_data_dir of its own"
        )
    (one, left), (other, right) = sorted(longest.values())[-2:]
    most = min(tokenizer.model_max_length for tokenizer in tokenizers.values())
    # With "next to" between them, and the start and end tokens.
    if one + other + 4 > most:
        raise UserError(
            f"--cutmix_probability joins two prompts, and {left!r} and {right!r} together are too long for the "
            f"{most} tokens of the text encoder: shorten them, or leave the flag out"
        )
