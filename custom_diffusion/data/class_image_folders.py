"""Folders of class images: which concepts share one, and of which prompt and base model the generated ones are."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from custom_diffusion.errors import UserError
from custom_diffusion.files import read_text, write_bytes

logger = logging.getLogger("custom_diffusion")

RECORD_NAME = "class_images.json"
# As :mod:`class_images` and diffusers' example name them: a number, and the SHA-1 of the pixels.
_GENERATED = re.compile(r"\d+-[0-9a-f]{40}\.jpg")


@dataclass(frozen=True)
class ClassImageFolder:
    """A folder of class images.

    Attributes:
        path: as it was typed first.
        class_prompt: of what it holds.
        series: how many folders of the run before it have the same class prompt. Images of different series have
            different noise.
    """

    path: Path
    class_prompt: str
    series: int = 0

    def generated(self) -> set[str]:
        """The names of the generated images in it; a user's own have other names."""
        if not self.path.is_dir():
            return set()
        return {path.name for path in self.path.iterdir() if _GENERATED.fullmatch(path.name)}

    def recorded(self) -> dict[str, str]:
        """For which ``class_prompt`` its images were generated, if it holds any and that is known.

        And by which ``base_model``, which earlier versions did not write down.

        Raises:
            UserError: for a record that is damaged.
        """
        record = self.path / RECORD_NAME
        if not record.is_file() or not self.generated():
            return {}
        try:
            content = json.loads(read_text(record))
            is_whole = isinstance(content["class_prompt"], str) and isinstance(content.get("base_model", ""), str)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise UserError(
                f"{str(record)!r} is damaged: remove it if the images beside it show {self.class_prompt!r}, "
                "or give another class_data_dir"
            )
        return content

    def record(self, base_model: str | None) -> None:
        """Leave a record of the class prompt, and of what generates the images, if that is known."""
        content = {"class_prompt": self.class_prompt} | ({"base_model": base_model} if base_model else {})
        write_bytes(self.path / RECORD_NAME, json.dumps(content).encode())


def distinct_folders(folders: Iterable[ClassImageFolder]) -> list[ClassImageFolder]:
    """The folders of several concepts, each once, and numbered among those of the same class prompt."""
    found: dict[Path, ClassImageFolder] = {}
    for folder in folders:
        place = folder.path.resolve()
        if place not in found:
            series = sum(other.class_prompt == folder.class_prompt for other in found.values())
            found[place] = replace(folder, series=series)
    return list(found.values())


def check_class_folders(folders: Sequence[ClassImageFolder]) -> None:
    """Make sure that no class image would be taken for one of another class.

    Args:
        folders: of all concepts; some may share one.

    Raises:
        UserError: for a folder of two class prompts, one with images that were generated for another class prompt,
            and one of real class images.
    """
    places = {folder.path.resolve(): folder for folder in reversed(folders)}
    for folder in folders:
        first = places[folder.path.resolve()].class_prompt
        if not _means(first, folder.class_prompt):
            raise UserError(
                f"{str(folder.path)!r} would hold class images of {first!r} and of {folder.class_prompt!r}: "
                "give each class prompt a class_data_dir of its own"
            )
    for folder in places.values():
        name, recorded = str(folder.path), folder.recorded().get("class_prompt")
        if (folder.path / "images.txt").exists():
            raise UserError(
                f"{name!r} holds real class images, as retrieve.py finds them: add --real_prior, "
                "or give another --class_data_dir for generated ones"
            )
        if recorded is not None and not _means(recorded, folder.class_prompt):
            raise UserError(
                f"{name!r} holds class images that were generated for {recorded!r}, not for {folder.class_prompt!r}: "
                f"give another --class_data_dir, or empty this one (if they do show {folder.class_prompt!r}, remove "
                f"its {RECORD_NAME})"
            )


def warn_of_twins(folders: Sequence[ClassImageFolder]) -> None:
    """Say where two folders hold the same generated images, as two runs of one seed make them."""
    for one, other in itertools.combinations(folders, 2):
        common = one.generated() & other.generated()
        if common:
            logger.warning(
                f"{len(common)} class images are both in {str(one.path)!r} and in {str(other.path)!r}: "
                "remove them from the latter, and others are generated in their place"
            )


def _means(one: str, other: str) -> bool:
    """Whether two prompts are the same for a tokenizer."""
    return one.casefold().split() == other.casefold().split()
