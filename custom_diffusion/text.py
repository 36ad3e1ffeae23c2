"""Text from elsewhere, made fit for one line of a message or a file."""

from __future__ import annotations

import re
from collections.abc import Sequence

_JOINERS = "\u200c\u200d"


def one_line(text: str) -> str:
    """The text on one line, without anything that cannot be printed or written."""
    # Persian and emoji need the two joiners, which count as not printable.
    return " ".join("".join(letter if letter.isprintable() or letter in _JOINERS else " " for letter in text).split())


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line: the first that is not blank, or else the error's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def some(names: Sequence[object], most: int) -> str:
    """The first names, separated by commas, and how many more there are than ``most``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def slug(text: str, otherwise: str) -> str:
    """A text as part of a file's name: its letters a to z and digits, at most 60 characters.

    Args:
        otherwise: what stands for a text that has none of them.
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or otherwise
