"""The words of captions and titles."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
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


_FILLERS = {"a", "an", "the", "of", "photo", "photograph", "picture", "image"}


def query_words(text: str) -> list[str]:
    """The words that a caption must hold, without those that say nothing about what is to be seen."""
    words = _words(text)
    return [word for word in words if word not in _FILLERS] or words


def has_words(caption: str, words: Iterable[str]) -> bool:
    """Whether all words are in the caption, as whole words; "cat" also finds "cats"."""
    present = set(_words(caption))
    return all(word in present or (not word.isascii() and word in caption.lower()) for word in words)


def _words(text: str) -> list[str]:
    return [_singular(word) for word in re.findall(r"[^\W\d_]+|\d+", text.lower())]


def _singular(word: str) -> str:
    for ending, singular in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + singular
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
