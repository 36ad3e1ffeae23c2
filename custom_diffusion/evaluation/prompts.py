"""The prompts that a concept is evaluated on, and the words in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from custom_diffusion.concept.prompts import replace_words
from custom_diffusion.errors import UserError
from custom_diffusion.files import read_text

# Those that come with the package: 20 each, for every kind of subject.
OWN_PROMPTS = {"objects": "objects.txt", "living": "living_things.txt"}

# What a modifier token looks like where no concept says it.
_IN_BRACKETS = re.compile(r"<[^<>\s]+>")
_GAP = re.compile(r"\{(\d*)\}")


def own_prompts(kind: str) -> list[str]:
    """The prompts of the package, with ``{}`` for the concept.

    Args:
        kind: a key of :data:`OWN_PROMPTS`.
    """
    return _lines(Path(__file__).with_name(OWN_PROMPTS[kind]))


def read_prompts(path: str, classes: Sequence[str]) -> list[str]:
    """The prompts of a text file with one per line, or of CustomConcept101's ``dataset.json`` for the same class.

    ``dataset.json`` and ``dataset_multiconcept.json`` name a file of prompts for each concept or pair; it is looked
    for beside them.

    Args:
        classes: of the concepts, in their order.

    Raises:
        UserError: for a file that cannot be read, has no prompt, or none for these classes.
    """
    try:
        if Path(path).suffix != ".json":
            prompts = _lines(Path(path))
        else:
            named = Path(_file_of_dataset(path, classes))
            if named.is_absolute() or ".." in named.parts:
                raise UserError(f"--prompts_file {path!r} names {str(named)!r}, which is not beside it: refused")
            prompts = _lines(Path(path).parent / named)
    except OSError as error:
        raise UserError(f"--prompts_file: {error.filename!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts_file {path!r} is no text: {error.reason}") from error
    if not prompts:
        raise UserError(f"--prompts_file {path!r} has no prompt: write one per line, with {{}} for the concept")
    return prompts


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _file_of_dataset(path: str, classes: Sequence[str]) -> str:
    try:
        entries = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--prompts_file {path!r} is no valid JSON: {error}") from error
    for entry in entries if isinstance(entries, list) else ():
        parts = entry if isinstance(entry, list) else [entry]
        named = [part.get("class_prompt") for part in parts if isinstance(part, dict) and "class_prompt" in part]
        files = _files_of(parts, "prompt_filename" if len(named) == 1 else "prompt_filename_compose")
        if named == list(classes) and files:
            return files[0]
    raise UserError(
        f"--prompts_file {path!r} has no prompts for {' and '.join(classes) or 'a concept without a class'}: "
        "give the class as it stands there with --class_prompt, or a text file of prompts"
    )


def _files_of(parts: Sequence[Any], key: str) -> list[str]:
    return [part[key] for part in parts if isinstance(part, dict) and isinstance(part.get(key), str)]


def fill_in(prompt: str, phrases: Sequence[str]) -> str:
    """A prompt about these concepts.

    ``{0}``, ``{1}`` stand for one concept each, ``{}`` for all of them. A prompt without any is left as it is.

    Args:
        phrases: such as ``["<new1> cat", "<new2> plant"]``.

    Raises:
        UserError: for a ``{2}`` where there are two concepts.
    """

    def phrase(match: re.Match[str]) -> str:
        if not match[1]:
            return " and a ".join(phrases)
        if int(match[1]) >= len(phrases):
            raise UserError(f"the prompt {prompt!r} has {match[0]}, and there are only {len(phrases)} concepts")
        return phrases[int(match[1])]

    return _GAP.sub(phrase, prompt)


def without_tokens(prompt: str, tokens: Sequence[str] | None) -> str:
    """A prompt without the modifier tokens: "a cat in the snow" of "a <new1> cat in the snow".

    Args:
        tokens: those to leave out; None for all that stands in angle brackets.
    """
    text = _IN_BRACKETS.sub(" ", prompt) if tokens is None else replace_words(prompt, dict.fromkeys(tokens, " "))
    return re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))


def phrases_of(tokens: Sequence[str], classes: Mapping[str, str]) -> list[str]:
    """What the concepts are called in prompts: token and class, or the token alone where no class is known."""
    return [f"{token} {classes.get(token, '')}".strip() for token in tokens]
