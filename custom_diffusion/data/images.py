"""Finding the instance images and the class images of a run."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from PIL import Image

from custom_diffusion.data.captions import find_captions, is_caption_file
from custom_diffusion.data.class_image_folders import RECORD_NAME, ClassImageFolder, distinct_folders
from custom_diffusion.data.class_lists import read_lists
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.data.masks import FOLDER_NAME, find_mask_files
from custom_diffusion.errors import UserError
from custom_diffusion.images import readable_images
from custom_diffusion.text import some

logger = logging.getLogger("custom_diffusion")

UNREADABLE, NO_IMAGE = "no readable image", "no image"
MOST_NAMES = 10  # of one kind in a message


def find_instance_images(concepts: Sequence[ConceptEntry], with_masks: bool = False) -> list[tuple[Path, str]]:
    """All instance images with their prompts, in the order of their names.

    An image's own caption (see :func:`captions.find_captions`) is its prompt, and the concept's instance prompt where
    it has none. Says what of the folders is left out.

    Args:
        concepts: each with ``instance_folder`` and ``instance_prompt``.
        with_masks: the masks of :func:`masks.find_mask_files` are used, so they are not said to be left out.

    Raises:
        UserError: for a folder without a readable image, and captions that cannot be read.
    """
    pairs = []
    left_out = LeftOut()
    for concept in concepts:
        folder = concept.instance_folder
        images = find_images(folder, left_out)
        if not images:
            raise UserError(f"there is no readable image in {str(folder)!r} (instance_data_dir)")
        masks, of_no_image = find_mask_files(folder, images)
        if masks and not with_masks:
            logger.info(f"{len(masks)} of {len(images)} images in {folder} have a mask, which --masked_loss would use")
        if with_masks:
            left_out.take_back([folder / FOLDER_NAME, *masks.values()])
            left_out.add("masks of no image", of_no_image)
        captions, unused = find_captions(folder, images)
        left_out.add("texts of no image", unused)
        pairs += [(path, captions.get(path, concept.instance_prompt)) for path in images]
        if captions:
            logger.info(f"{len(captions)} of {len(images)} images in {folder} have a caption of their own")
    left_out.say()
    return pairs


def find_cutmix_images(folder: str | None) -> list[tuple[Path, str]]:
    """The images of ``--cutmix_data_dir`` with their captions (see :func:`captions.find_captions`); none without it.

    Raises:
        UserError: for a folder without a readable image, and for images without a caption.
    """
    if folder is None:
        return []
    left_out = LeftOut()
    images = find_images(Path(folder), left_out) if Path(folder).is_dir() else []
    if not images:
        raise UserError(f"there is no readable image in {folder!r} (--cutmix_data_dir)")
    captions, unused = find_captions(Path(folder), images)
    left_out.add("texts of no image", unused)
    left_out.say()
    without = [path for path in images if not captions.get(path)]
    if without:
        raise UserError(
            f"--cutmix_data_dir: no caption says what is in {some(without, MOST_NAMES)}: write it into a text file "
            f"beside the image, such as {without[0].with_suffix('.txt').name}"
        )
    return [(path, captions[path]) for path in images]


def find_class_images(
    concepts: Sequence[ConceptEntry], num_class_images: int, real_prior: bool
) -> list[tuple[Path, str]]:
    """The class images with their prompts: at most ``num_class_images`` per folder, which concepts may share.

    Raises:
        UserError: where a concept has too few real class images; the message holds the command that gets them.
    """
    pairs = []
    left_out = LeftOut()
    for folder in distinct_folders(concept.class_folder for concept in concepts):
        if not real_prior:
            images = find_images(folder.path, left_out, most=num_class_images)
            pairs += [(path, folder.class_prompt) for path in images]
            texts = [path for path in sorted(folder.path.iterdir()) if is_caption_file(path)]
            left_out.add("texts, since class images have the class prompt", texts)
            continue
        command = _retrieve_command(folder, num_class_images)
        captions = dict(read_lists(folder.path, f"get real class images with: {command}"))
        images, bad = _readable(list(captions), num_class_images)
        left_out.add_unreadable(bad)
        if len(images) < num_class_images:
            raise UserError(
                f"{str(folder.path)!r} has {len(images)} readable class images of the {num_class_images} wanted; "
                f"get them with: {command}"
            )
        pairs += [(path, captions[path]) for path in images]
    left_out.say()
    return pairs


class LeftOut:
    """What of the folders of images is not trained on, said once."""

    def __init__(self) -> None:
        self._paths: dict[str, list[Path]] = {}

    def add(self, reason: str, paths: Sequence[Path]) -> None:
        """Note files or folders for the one message."""
        self._paths.setdefault(reason, []).extend(paths)

    def take_back(self, paths: Collection[Path]) -> None:
        """Forget files or folders that are used after all."""
        for noted in self._paths.values():
            noted[:] = [path for path in noted if path not in paths]

    def add_unreadable(self, paths: Sequence[Path]) -> None:
        """Note files that cannot be read: those that should be images are not hidden among others."""
        endings = Image.registered_extensions()
        self.add(UNREADABLE, [path for path in paths if path.suffix.lower() in endings])
        self.add(NO_IMAGE, [path for path in paths if path.suffix.lower() not in endings])

    def say(self) -> None:
        """Warn, if there is anything."""
        parts = []
        for reason, paths in self._paths.items():
            names = [f"{path}/" if path.is_dir() else path for path in paths]
            parts += [f"{reason}: {some(names, MOST_NAMES)}"] if names else []
        if parts:
            logger.warning(f"left out, {'; '.join(parts)}")


def find_images(folder: Path, left_out: LeftOut, most: int | None = None) -> list[Path]:
    """The readable images of a folder, in the order of their names.

    Args:
        left_out: takes what is not an image of its own: files that Pillow does not read, masks that other trainers
            keep beside their images, and folders.
        most: how many are needed; no more are looked at than that takes.
    """
    entries = sorted(folder.iterdir())
    left_out.add("folders", [path for path in entries if path.is_dir() and not path.name.startswith(".")])
    files = [path for path in entries if not path.is_dir() and not is_caption_file(path) and path.name != RECORD_NAME]
    stems = {path.stem for path in files}
    masks = [path for path in files if _is_mask(path.stem, stems)]
    left_out.add("masks", masks)
    good, bad = _readable([path for path in files if path not in masks], most)
    left_out.add_unreadable(bad)
    return good


def _is_mask(stem: str, stems: Collection[str]) -> bool:
    """Whether a file belongs to the image of another stem, as OneTrainer's ``1-masklabel.png`` to ``1.jpg``."""
    if stem.lower().endswith(("-masklabel", "-condlabel")):
        return True
    return stem.lower().endswith(("-mask", "_mask", ".mask")) and stem[: -len("-mask")] in stems


def _readable(paths: Sequence[Path], most: int | None) -> tuple[list[Path], list[Path]]:
    """The first images of these that can be read, at most so many, and the files before them that cannot."""
    good: list[Path] = []
    bad: list[Path] = []
    # In portions: replacements for broken ones are found without decoding thousands that are not needed.
    portion = len(paths) if most is None else most
    while paths and (most is None or len(good) < most):
        readable, unreadable = readable_images(paths[:portion])
        good, bad, paths = good + readable, bad + unreadable, paths[portion:]
    return good[:most], bad


def _retrieve_command(folder: ClassImageFolder, num_class_images: int) -> str:
    command = ["python", "retrieve.py", "--class_prompt", folder.class_prompt]
    return shlex.join([*command, "--class_data_dir", str(folder.path), "--num_class_images", str(num_class_images)])
