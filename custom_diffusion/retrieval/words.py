"""The words of captions and titles."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from custom_diffusion.text import one_line


def text_or_empty(value: Any) -> str:
    """The value where it is text, and no text where it is anything else."""
    return value if isinstance(value, str) else ""


def plain_text(text: str) -> str:
    """The words of a piece of HTML, on one line."""
    return one_line(html.unescape(re.sub(r"<[^>]*>", " ", text)))


def caption_of_title(title: str, class_prompt: str) -> str:
    """A caption from a title: titles of the web may be file names, and often do not say what is to be seen."""
    title = one_line(title)
    if len(title) > 300:
        title = title[:300].rpartition(" ")[0] or title[:300]
    words = re.findall(r"[^\W\d_]+", title)
    is_file_name = not words or re.fullmatch(r"(?i)(img|dscn?|dsc|p|pict?|image|photo)?[\W_\d]*(\.\w{3,4})?", title)
    if is_file_name:
        return class_prompt
    return title if has_words(title, query_words(class_prompt)) else f"{class_prompt}, {title}"


# --- which words a caption holds -------------------------------------------------------------------

_FILLERS = {"a", "an", "the", "of", "photo", "photograph", "picture", "image"}


def query_words(text: str) -> list[str]:
    """The words that a caption must hold, without those that say nothing about what is to be seen."""
    words = _words(text)
    return [word for word in words if not singulars(word) & _FILLERS] or words


def has_words(caption: str, words: Iterable[str]) -> bool:
    """Whether all words are in the caption, as whole words; "cat" also finds "cats", and "people" a "person"."""
    present = {singular for word in _words(caption) for singular in singulars(word)}
    text = _normalised(caption)
    # Languages without spaces between words: any place will do.
    return all(singulars(word) & present or (not word.isascii() and word in text) for word in words)


def matching_caption(captions: Sequence[str], words: Sequence[str]) -> str | None:
    """The first caption that holds all words; None where none does."""
    return next((caption for caption in captions if has_words(caption, words)), None)


def _normalised(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+", _normalised(text))


# Plurals that follow no rule; also as the ends of longer words, such as "grandchildren" and "policemen".
_IRREGULAR = {
    "people": "person",
    "men": "man",
    "children": "child",
    "mice": "mouse",
    "lice": "louse",
    "dice": "die",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
    "eaux": "eau",
    "cacti": "cactus",
    "fungi": "fungus",
    "octopi": "octopus",
    "hippopotami": "hippopotamus",
    "alumni": "alumnus",
    "aquaria": "aquarium",
    "bacteria": "bacterium",
    "criteria": "criterion",
    "phenomena": "phenomenon",
    "larvae": "larva",
    "matrices": "matrix",
    "vertices": "vertex",
}

# What may stand at the end of a plural, and what may stand there in the singular. A word may be the plural of several:
# "axes" of "axe", "ax" and "axis". Those that are no words do no harm, as no caption holds them.
_ENDINGS = (
    ("ies", ("y", "ie")),
    ("ves", ("f", "fe", "ve")),
    ("oes", ("o", "oe")),
    ("ches", ("ch", "che")),
    ("shes", ("sh", "she")),
    ("xes", ("x", "xe", "xis")),
    ("zzes", ("z", "zz", "zze")),
    ("zes", ("z", "ze")),
    ("sses", ("s", "ss", "sse")),
    ("ses", ("s", "se", "sis")),
)


def singulars(word: str) -> set[str]:
    """The word, and all words that it may be the plural of: "knives" gives "knife", "knif" and "knive", too."""
    found = {word}
    for plural, singular in _IRREGULAR.items():
        if word.endswith(plural):
            found.add(word.removesuffix(plural) + singular)
    for plural, endings in _ENDINGS:
        if word.endswith(plural) and len(word) > len(plural) + 1:
            return found | {word.removesuffix(plural) + ending for ending in endings}
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        found.add(word[:-1])
    return found
