"""Finding the instance images and the class images of a run."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from custom_diffusion.data.captions import find_captions
from custom_diffusion.data.class_lists import read_lists
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.errors import UserError
from custom_diffusion.images import readable_images

logger = logging.getLogger("custom_diffusion")


def find_instance_images(concepts: Sequence[ConceptEntry], tokens: Sequence[str] = ()) -> list[tuple[Path, str]]:
    """All instance images with their prompts, in the order of their names.

    An image's own caption (see :func:`find_captions`) is its prompt, and the concept's instance prompt where it has
    none.

    Args:
        concepts: each with ``instance_data_dir`` and ``instance_prompt``.
        tokens: the modifier tokens; a caption must hold one of those that its concept's prompt has.

    Raises:
        UserError: for a folder without a readable image, and captions that cannot be read or hold no token.
    """
    pairs, left_out = [], []
    for concept in concepts:
        folder = concept.instance_folder
        files = sorted(path for path in folder.iterdir() if path.is_file())
        captions, caption_files = find_captions(folder, files)
        good, bad = readable_images([path for path in files if path not in caption_files])
        if not good:
            raise UserError(f"there is no readable image in {str(folder)!r} (instance_data_dir)")
        own = [token for token in tokens if token in concept.instance_prompt]
        without = [
            path.name for path in good if own and path in captions and not any(token in captions[path] for token in own)
        ]
        if without:
            raise UserError(
                f"in {str(folder)!r} the captions of {', '.join(without)} do not hold {' or '.join(own)}: "
                f"write it into them, as in {concept.instance_prompt!r}, or take these captions away"
            )
        pairs += [(path, captions.get(path, concept.instance_prompt)) for path in good]
        left_out += bad
        if captions:
            count = sum(path in captions for path in good)
            logger.info(f"{count} of {len(good)} images in {folder} have a caption of their own")
    if left_out:
        logger.warning(f"left out, no readable image: {', '.join(map(str, left_out))}")
    return pairs


def find_class_images(
    concepts: Sequence[ConceptEntry], num_class_images: int, real_prior: bool
) -> list[tuple[Path, str]]:
    """The class images with their prompts: at most ``num_class_images`` per concept.

    Raises:
        UserError: where a concept has too few real class images; the message holds the command that gets them.
    """
    pairs, left_out = [], []
    for concept in concepts:
        folder = concept.class_folder
        if real_prior:
            advice = f"get real class images with: {_retrieve_command(concept, num_class_images)}"
            captions = dict(read_lists(folder, advice))
        else:
            captions = {path: concept.class_prompt for path in sorted(folder.iterdir()) if path.is_file()}
        good, bad, paths = [], [], list(captions)
        # In portions: replacements for broken ones are found without decoding thousands that are not needed.
        while paths and len(good) < num_class_images:
            readable, unreadable = readable_images(paths[:num_class_images])
            good, bad, paths = good + readable, bad + unreadable, paths[num_class_images:]
        if real_prior and len(good) < num_class_images:
            raise UserError(
                f"{str(folder)!r} has {len(good)} readable class images of the {num_class_images} wanted; "
                f"get them with: {_retrieve_command(concept, num_class_images)}"
            )
        pairs += [(path, captions[path]) for path in good[:num_class_images]]
        left_out += bad
    if left_out:
        logger.warning(f"left out, no readable image: {', '.join(map(str, left_out))}")
    return pairs


def _retrieve_command(concept: ConceptEntry, num_class_images: int) -> str:
    command = ["python", "retrieve.py", "--class_prompt", concept.class_prompt]
    return shlex.join(
        [*command, "--class_data_dir", concept.class_data_dir, "--num_class_images", str(num_class_images)]
    )
