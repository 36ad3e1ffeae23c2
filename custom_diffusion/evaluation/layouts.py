"""Folders of generated images: those of infer.py, of CustomConcept101 and of DreamBench++."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from custom_diffusion.errors import UserError
from custom_diffusion.files import read_text
from custom_diffusion.images import open_image, readable_images
from custom_diffusion.text import first_line

CONTACT_SHEET = "contact_sheet.png"
_ENDINGS = (".png", ".jpg", ".jpeg", ".tiff", ".webp")


@dataclass(frozen=True)
class GeneratedImage:
    """An image to evaluate.

    Attributes:
        path: of the image.
        prompt: that it was made from.
        targets: real images of its subject, where the layout has them.
    """

    path: Path
    prompt: str
    targets: tuple[Path, ...] = ()


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder by name, without a contact sheet.

    Raises:
        UserError: where there is no such folder, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {str(folder)!r}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.name != CONTACT_SHEET)
    good, bad = readable_images(paths)
    if bad:
        raise UserError(f"{str(bad[0])!r} is no readable image: remove it or make it again")
    return good


def find_generated(folder: Path) -> list[GeneratedImage]:
    """The generated images of a folder with their prompts.

    The layout is recognised: ``samples/`` beside ``prompts.json`` (``{stem: prompt}``) is CustomConcept101's;
    ``src_image/``, ``text/`` and ``tgt_image/`` with a folder for each subject are DreamBench++'s; anything else is a
    folder of PNG files whose metadata hold the prompt, as infer.py writes them.

    Raises:
        UserError: where there is no image, or one whose prompt is not known.
    """
    if (folder / "prompts.json").is_file():
        found = _customconcept101(folder)
    elif (folder / "tgt_image").is_dir():
        found = _dreambench(folder)
    else:
        found = [GeneratedImage(path, _prompt_in(path)) for path in images_in(folder)]
    if not found:
        raise UserError(f"there is no image in {str(folder)!r}: give a folder that infer.py has written (--images_dir)")
    return found


def _customconcept101(folder: Path) -> list[GeneratedImage]:
    try:
        prompts = json.loads(read_text(folder / "prompts.json"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(folder / 'prompts.json')!r} is no valid JSON: {error}") from error
    found = []
    for path in images_in(folder / "samples"):
        prompt = prompts.get(path.stem) if isinstance(prompts, dict) else None
        if not isinstance(prompt, str):
            raise UserError(f"{str(folder / 'prompts.json')!r} has no prompt for {path.stem!r}, an image in samples/")
        found.append(GeneratedImage(path, prompt))
    return found


def _dreambench(folder: Path) -> list[GeneratedImage]:
    found = []
    for subject in sorted(path for path in (folder / "tgt_image").iterdir() if path.is_dir()):
        targets = tuple(images_in(folder / "src_image" / subject.name))
        if not targets:
            raise UserError(f"there is no image in {str(folder / 'src_image' / subject.name)!r} to compare with")
        for path in images_in(subject):
            text = folder / "text" / subject.name / f"{path.stem}.txt"
            if not text.is_file():
                raise UserError(f"{str(path)!r} has no prompt: there is no {str(text)!r}")
            try:
                found.append(GeneratedImage(path, read_text(text).strip(), targets))
            except UnicodeDecodeError as error:
                raise UserError(f"{str(text)!r} is not UTF-8: save it as that") from error
    return found


def _prompt_in(path: Path) -> str:
    prompt = metadata_of(path).get("prompt")
    if not prompt:
        raise UserError(
            f"{str(path)!r} does not say what it shows: there is no prompt in its metadata, as infer.py writes it; "
            "put the images into samples/ and their prompts into prompts.json beside it"
        )
    return prompt


def metadata_of(path: Path) -> dict[str, str]:
    """The texts in a PNG's metadata; none for other files.

    Raises:
        UserError: for texts that cannot be read.
    """
    try:
        with open_image(path) as image:
            return dict(getattr(image, "text", {}))
    except Exception as error:  # Pillow raises nearly anything
        raise UserError(f"the metadata of {str(path)!r} cannot be read: {first_line(error)}") from error
