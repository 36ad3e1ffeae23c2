"""The words of a concept's prompts: its class, its size, and another concept beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from custom_diffusion.concept.files import Concept

# Before the prompts of images that the augmentation made much smaller, or larger (paper, appendix; the example).
SMALL_WORDS = ("a far away ", "very small ")
LARGE_WORDS = ("zoomed in ", "close up ")
_CLASS = r"\s+([^,.;:!?<>\"`$\\\x00-\x1f\x7f-\x9f]+)"


def replace_words(text: str, replacements: Mapping[str, str]) -> str:
    """A text with words replaced, all at once, in upper or lower case alike, as tokenizers read them."""
    by_lower = {word.lower(): replacement for word, replacement in replacements.items()}
    if not by_lower:
        return text
    return re.sub(any_of(by_lower), lambda match: by_lower[match[0].lower()], text, flags=re.IGNORECASE)


def any_of(words: Iterable[str]) -> str:
    """A pattern that matches the words, the longest first: "cat face" has "cat" in it."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def class_words(concept: Concept) -> dict[str, str]:
    """Modifier token to the words that follow it in the instance prompts of the card: its class, ``cat``.

    Tokens that no prompt of the card has are left out. Cards come from anyone, and these words go into commands and
    prompts: they end at punctuation, and at what a shell or a terminal would not take for text.
    """
    words = {}
    for token in concept.tokens:
        match = re.search(re.escape(token) + _CLASS, concept.instance_prompt or "", re.IGNORECASE)
        if match is not None:
            words[token] = match[1].strip()
    return words


def side_by_side(left: str, right: str) -> str:
    """A prompt for two images beside each other: that they are a "photo of" something is said once.

    "photo of a <new1> cat" and "photo of a <new2> plant" give "photo of a <new1> cat next to a <new2> plant".
    """
    opening = re.match(r"(an? )?\w+ of ", right)
    if opening and left.startswith(opening[0]):
        right = right.removeprefix(opening[0])
    return f"{left} next to {right}"
