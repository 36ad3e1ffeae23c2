"""At which words each concept of a run acts, with ``--token_gate``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from custom_diffusion.concept.gating import GatedWords, TokenGate, class_of, word_behind
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.errors import UserError

logger = logging.getLogger("custom_diffusion")


def build_gate(
    concepts: Sequence[ConceptEntry],
    instance_images: Sequence[tuple[Path, str]],
    tokens: Sequence[str],
    tokenizers: Mapping[str, CLIPTokenizer],
) -> TokenGate:
    """The gate of a run: each concept of the list has the modifier tokens of its prompts, and weights of its own.

    Args:
        instance_images: with their prompts.
        tokens: the modifier tokens.
        tokenizers: by the names of their text encoders; they know the modifier tokens.

    Raises:
        UserError: for a concept without a modifier token, and for a token that two concepts share.
    """
    words: dict[str, GatedWords] = {}
    tokenizer = next(iter(tokenizers.values()))
    for number, concept in enumerate(concepts, 1):
        prompts = [prompt for path, prompt in instance_images if path.parent == concept.instance_folder]
        prompts = list(dict.fromkeys([concept.instance_prompt, *prompts]))
        present = set[int]().union(*tokenizer(prompts, verbose=False).input_ids)
        own = tuple(token for token in tokens if tokenizer.convert_tokens_to_ids(token) in present)
        if not own:
            raise UserError(
                f"--token_gate: no prompt of concept {number} has a modifier token ({', '.join(tokens)}), so nothing "
                "would be learned for it"
            )
        for token in own:
            if token in words:
                raise UserError(f"--token_gate: two concepts have {token!r}; give each a modifier token of its own")
            words[token] = GatedWords(own, _classes(concept, prompts, own))
        _warn_of_classes(words[own[0]], prompts, tokenizer)
    gates = list(dict.fromkeys(words.values()))
    for gate in gates:
        logger.info(f"gated: {gate}")
    return TokenGate(tokenizer, gates)


def _warn_of_classes(words: GatedWords, prompts: Sequence[str], tokenizer: CLIPTokenizer) -> None:
    """Warn where no prompt has the class words right after a modifier token, so that they would never be gated."""
    modifiers = {tokenizer.convert_tokens_to_ids(token) for token in words.tokens}
    ids = tokenizer(prompts, verbose=False).input_ids
    bare = sum(number in modifiers for row in ids for number in row)
    gate = TokenGate(tokenizer, [words])
    if words.classes and sum(int(gate.mask(torch.tensor([row])).sum()) for row in ids) == bare:
        behind = next((word for p in prompts for t in words.tokens if (word := word_behind(p, t)) is not None), None)
        advice = f"; give --class_prompt={behind!r} if that is the class" if behind else ""
        logger.warning(
            f"--token_gate: {' or '.join(words.classes)!r} never follows {' or '.join(words.tokens)} in the prompts, "
            f"so only the new word itself is gated{advice}"
        )


def _classes(concept: ConceptEntry, prompts: Sequence[str], tokens: Sequence[str]) -> tuple[str, ...]:
    """The class words of a concept: its class prompt, or else the word that follows in its first prompt with a token.

    Without either, any word that follows.
    """
    known = class_of(concept.class_prompt)
    if known:
        return (known,)
    for prompt in prompts:
        words = dict.fromkeys(word for token in tokens if (word := word_behind(prompt, token)) is not None)
        if words:
            return tuple(words)
    return ()
