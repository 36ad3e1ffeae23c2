"""Concepts, images and prompts: finding them, reading them as people see them, making samples of them."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import re
import shlex
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from huggingface_hub.constants import HF_HOME
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from concept import is_hub_id
from images import UserError, first_line, load_image, readable_images

logger = logging.getLogger("custom_diffusion")

# Before the prompts of images that the augmentation made much smaller, or larger (paper, appendix; the example).
SMALL_WORDS = ("a far away ", "very small ")
LARGE_WORDS = ("zoomed in ", "close up ")
CAPTION_COLUMNS = ("text", "caption", "prompt")  # of an image folder's metadata, the first that there is


# --- concepts ------------------------------------------------------------------------------------


def read_concepts(args: argparse.Namespace) -> list[dict[str, str]]:
    """The concepts to learn, from ``--concepts_list`` or from the flags of a single one.

    Returns:
        One dictionary per concept with ``instance_prompt`` and ``instance_data_dir``, and with prior preservation
        ``class_prompt`` and ``class_data_dir``.

    Raises:
        UserError: for a list that is missing, broken or incomplete, and for instance folders that are not there.
    """
    needed = ["instance_prompt", "instance_data_dir"]
    needed += ["class_prompt", "class_data_dir"] * args.with_prior_preservation
    if args.concepts_list is None:
        concepts = [{key: getattr(args, key) for key in needed}]
    else:
        concepts = _read_json(args.concepts_list)
        if not isinstance(concepts, list) or not concepts or not all(isinstance(entry, dict) for entry in concepts):
            raise UserError(
                f"{args.concepts_list} must hold a list of concepts, each an object with {', '.join(needed)}"
            )
        for number, concept in enumerate(concepts, 1):
            for key in needed:
                if not isinstance(concept.get(key), str) or not concept[key]:
                    raise UserError(f"{args.concepts_list}: concept {number} has no text for {key!r}")
    for concept in concepts:
        for key in needed:
            if not concept[key].isprintable():
                raise UserError(f"{key} {concept[key]!r} holds line breaks or characters that are no text")
        name = concept["instance_data_dir"]
        if not Path(name).is_dir():
            if not is_hub_id(name.split("@")[0]):
                raise UserError(f"there is no folder {name!r} (instance_data_dir)")
            concept["instance_data_dir"] = str(dataset_folder(name, Path(HF_HOME, "custom-diffusion")))
    return concepts


def _read_json(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--concepts_list {path!r} cannot be read: {error.strerror}") from error
    except ValueError as error:  # broken JSON and text that is not UTF-8
        raise UserError(f"--concepts_list {path!r} is no valid JSON: {error}") from error


# --- images ------------------------------------------------------------------------------------


def find_instance_images(concepts: Sequence[dict[str, str]], tokens: Sequence[str] = ()) -> list[tuple[Path, str]]:
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
        folder = Path(concept["instance_data_dir"])
        files = sorted(path for path in folder.iterdir() if path.is_file())
        captions, caption_files = find_captions(folder, files)
        good, bad = readable_images([path for path in files if path not in caption_files])
        if not good:
            raise UserError(f"there is no readable image in {str(folder)!r} (instance_data_dir)")
        own = [token for token in tokens if token in concept["instance_prompt"]]
        without = [
            path.name for path in good if own and path in captions and not any(token in captions[path] for token in own)
        ]
        if without:
            raise UserError(
                f"in {str(folder)!r} the captions of {', '.join(without)} do not hold {' or '.join(own)}: "
                f"write it into them, as in {concept['instance_prompt']!r}, or take these captions away"
            )
        pairs += [(path, captions.get(path, concept["instance_prompt"])) for path in good]
        left_out += bad
        if captions:
            count = sum(path in captions for path in good)
            logger.info(f"{count} of {len(good)} images in {folder} have a caption of their own")
    if left_out:
        logger.warning(f"left out, no readable image: {', '.join(map(str, left_out))}")
    return pairs


def dataset_folder(name: str, cache: Path) -> Path:
    """Bring the images of a Hugging Face dataset into a folder, with their captions beside them.

    Args:
        name: the dataset's id on the Hub, ``owner/name`` or ``owner/name@revision``; its split ``train`` is taken.
        cache: where the folder is made; one that is there from an earlier run is used again.

    Raises:
        UserError: where the package ``datasets`` or the dataset is missing, or it has no images.
    """
    folder = cache / name.replace("/", "--")
    if folder.is_dir():
        return folder
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"there is no folder {name!r} (instance_data_dir); to take it for a dataset on the Hub, "
            "pip install -r requirements-datasets.txt"
        ) from error
    repository, _, revision = name.partition("@")
    try:
        rows = datasets.load_dataset(repository, split="train", revision=revision or None)
    except Exception as error:  # datasets, the Hub client and pyarrow raise their own errors
        reason = first_line(error)
        raise UserError(
            f"there is no folder {name!r} (instance_data_dir), and no such dataset with a split 'train' on the Hub: "
            f"{reason}"
        ) from error
    image = next((column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise UserError(
            f"the dataset {name!r} (instance_data_dir) has no column of images: {', '.join(rows.features)}"
        )
    caption = next((column for column in CAPTION_COLUMNS if column in rows.features), None)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix="."))
    for number, row in enumerate(rows):
        row[image].save(temporary / f"{number:05d}.png")
        if caption is not None and row[caption]:
            (temporary / f"{number:05d}.txt").write_text(str(row[caption]), encoding="utf-8")
    # Under its name only when it is complete; another process of the same run may have been first.
    try:
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():
            raise
    return folder


def find_captions(folder: Path, files: Sequence[Path]) -> tuple[dict[Path, str], set[Path]]:
    """Captions of single images: ``photo.txt`` beside ``photo.jpg``, or a Hugging Face image folder's metadata.

    That is ``metadata.jsonl`` or ``metadata.csv`` with ``file_name`` and one of ``text``, ``caption`` and ``prompt``;
    a text file of its own comes before it. Line breaks become spaces, an empty caption is none.

    Returns:
        Image to caption, and the files that were read for it.

    Raises:
        UserError: for files that cannot be read, and metadata about images that are not there.
    """
    captions: dict[Path, str] = {}
    read: set[Path] = set()
    stems = {path.stem: path for path in files if path.suffix.lower() not in (".txt", ".jsonl", ".csv")}
    for path in files:
        if path.name in ("metadata.jsonl", "metadata.csv"):
            read.add(path)
            for name, caption in _read_metadata(path):
                if folder / name not in files:
                    raise UserError(f"{str(path)!r} has a caption for {name!r}, which is not in the folder")
                captions[folder / name] = caption
    for path in files:
        if path.suffix.lower() == ".txt" and path.stem in stems:
            read.add(path)
            captions[stems[path.stem]] = _read_text(path)
    captions = {path: " ".join(caption.split()) for path, caption in captions.items()}
    return {path: caption for path, caption in captions.items() if caption}, read


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _read_metadata(path: Path) -> list[tuple[str, str]]:
    text = _read_text(path)
    try:
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines(keepends=True)))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{str(path)!r} cannot be read: {error}") from error
    pairs = []
    for number, row in enumerate(rows, 1):
        column = next((name for name in CAPTION_COLUMNS if isinstance(row, dict) and row.get(name) is not None), None)
        if column is None or not isinstance(row.get("file_name"), str) or not isinstance(row[column], str):
            raise UserError(f"{str(path)!r}: entry {number} needs file_name and one of {', '.join(CAPTION_COLUMNS)}")
        pairs.append((row["file_name"], row[column]))
    return pairs


def find_class_images(
    concepts: Sequence[dict[str, str]], num_class_images: int, real_prior: bool
) -> list[tuple[Path, str]]:
    """The class images with their prompts: at most ``num_class_images`` per concept.

    Raises:
        UserError: where a concept has too few real class images; the message holds the command that gets them.
    """
    pairs, left_out = [], []
    for concept in concepts:
        folder = Path(concept["class_data_dir"])
        if real_prior:
            captions = dict(_retrieved_images(folder, _retrieve_command(concept, num_class_images)))
        else:
            captions = {path: concept["class_prompt"] for path in sorted(folder.iterdir()) if path.is_file()}
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


def _retrieve_command(concept: dict[str, str], num_class_images: int) -> str:
    command = ["python", "retrieve.py", "--class_prompt", concept["class_prompt"]]
    return shlex.join(
        [*command, "--class_data_dir", concept["class_data_dir"], "--num_class_images", str(num_class_images)]
    )


def _retrieved_images(folder: Path, command: str) -> list[tuple[Path, str]]:
    """Paths and captions as retrieve.py leaves them: line k of images.txt belongs to line k of caption.txt."""
    lines = {}
    for name in ("images.txt", "caption.txt"):
        try:
            # Not splitlines(): it also breaks at characters that captions of the web do hold, such as U+2028.
            lines[name] = (folder / name).read_bytes().decode().removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{str(folder / name)!r} cannot be read; get real class images with: {command}") from error
    if len(lines["images.txt"]) != len(lines["caption.txt"]):
        raise UserError(
            f"in {str(folder)!r} images.txt has {len(lines['images.txt'])} lines and caption.txt has "
            f"{len(lines['caption.txt'])}: captions would go to the wrong images; get them anew with: {command}"
        )
    pairs = zip(lines["images.txt"], lines["caption.txt"], strict=True)
    return [
        (_retrieved_path(folder, name.rstrip("\r")), caption.rstrip("\r")) for name, caption in pairs if name.strip()
    ]


def _retrieved_path(folder: Path, name: str) -> Path:
    # images.txt holds paths as seen from where retrieve.py ran; a folder that was moved still has its images/.
    path = Path(name)
    return path if path.is_file() else folder / "images" / path.name


# --- samples -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """How an image is shown: all that decides its pixels.

    Attributes:
        path: of the image.
        flip: whether it is mirrored.
        scale: side in pixels of an instance image's centre square; None for a class image, which is cropped to a
            square of its shorter side and fills the canvas.
        top, left: where it lies on the canvas, or is cropped, in parts of the room that there is: at least 0, below 1.
    """

    path: Path
    flip: bool
    scale: int | None
    top: float
    left: float


@dataclass(frozen=True)
class Sample:
    """What an item of the stream is made of.

    Attributes:
        instance: one view, or two that are beside each other, the left one first.
        class_image: alike; empty without prior preservation.
    """

    instance: tuple[View, ...]
    instance_prompt: str
    class_image: tuple[View, ...]
    class_prompt: str
    noise_seed: int


class CustomDiffusionDataset(Dataset):
    """Instance images (and class images beside them) with their prompts, augmented and tokenised.

    The dataset is an endless stream: item p is sample ``p % len(self)`` of epoch ``p // len(self)``. What it looks
    like depends on seed, epoch and sample alone, not on workers, processes or restarts, so that a resumed run and
    a run on several devices see what a single uninterrupted one sees.

    Args:
        instance_images: paths and prompts, as :func:`find_instance_images` gives them.
        class_images: alike, as :func:`find_class_images` gives them; none without prior preservation.
        tokenizer: knows the modifier tokens.
        size: side of the images in pixels.
        mask_size: side of the latents, ``size`` divided by the VAE's factor.
        center_crop: crop class images at the centre rather than at random.
        hflip: mirror half of the images.
        aug: the resize augmentation of the paper's appendix, with its prompt words.
        seed: seed of the order and of every sample.
        variants: how many augmentations of each instance image there are to draw from; a class image then has one
            random crop, and another when it is mirrored. None: no two samples are alike.
        cutmix_probability: share of the steps that show two concepts, or class images of two, beside each other, with
            a prompt that names both (after the Cut-Mix of SVDiff, Han et al. 2023). There both are cropped into one
            square; here they stay whole, in an image twice as wide. Concepts are told apart by their folders.
        samples_per_step: how many samples, of all processes, make a step: they are all pairs or none, so that a batch
            has one shape.
        padding_mode: what surrounds an image that the augmentation made smaller: "constant", grey, which the mask
            leaves out; or "edge", its outermost pixels continued, which the mask takes in.

    Attributes:
        posteriors: what :func:`caching.encode_views` gives; samples then have posteriors in place of pixels.
        text_features: what :func:`caching.encode_captions` gives, for ``"instance"`` or ``"class"`` prompts; samples
            then have these in place of their ids.
    """

    def __init__(
        self,
        instance_images: Sequence[tuple[Path, str]],
        class_images: Sequence[tuple[Path, str]],
        tokenizer: CLIPTokenizer,
        size: int = 512,
        mask_size: int = 64,
        center_crop: bool = False,
        hflip: bool = False,
        aug: bool = True,
        seed: int = 42,
        variants: int | None = None,
        cutmix_probability: float = 0.0,
        samples_per_step: int = 1,
        padding_mode: str = "constant",
    ) -> None:
        self.tokenizer = tokenizer
        self.size = size
        self.mask_size = mask_size
        self.center_crop = center_crop
        self.flip_probability = 0.5 if hflip else 0.0
        self.aug = aug
        self.seed = seed
        self.variants = variants
        self.cutmix_probability = cutmix_probability
        self.samples_per_step = samples_per_step
        self.padding_mode = padding_mode
        self.instance_images = instance_images
        self.class_images = class_images
        self._instances_elsewhere = numbers_elsewhere(instance_images)
        self._class_images_elsewhere = numbers_elsewhere(class_images)
        self.posteriors: dict[View, Tensor] = {}
        self.text_features: dict[str, dict[str, Tensor]] = {}
        self._order_of: tuple[int, np.ndarray] | None = None
        self._last_image: tuple[Path, Image.Image] | None = None
        self._ids_of: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return max(len(self.instance_images), len(self.class_images))

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self)))
        return self._order_of[1]

    def draw(self, position: int) -> Sample:
        """Decide what an item is made of; no image is read for it."""
        epoch, sample = divmod(position, len(self))
        index = int(self._order(epoch)[sample])
        random = np.random.default_rng((self.seed, epoch, index))
        noise_seed = int(random.integers(2**63))
        if self._shows_pair(position):
            return self._draw_pair(index, random, noise_seed)
        # The class image first: it is then the same with and without variants, where it has but one crop.
        class_image, class_prompt = (), ""
        if self.class_images:
            number = index % len(self.class_images)
            class_image, class_prompt = (self._draw_class_image(number, random),), self.class_images[number][1]
        number = index % len(self.instance_images)
        if self._has_variants():
            random = np.random.default_rng((self.seed, number, int(random.integers(self.variants)), 1))
        instance, prompt = self._draw_instance(number, random)
        return Sample((instance,), prompt, class_image, class_prompt, noise_seed)

    def _has_variants(self) -> bool:
        """Whether there is so much to draw for an instance image that it is drawn from a limited number."""
        return self.variants is not None and self.aug

    def _shows_pair(self, position: int) -> bool:
        if not self.cutmix_probability:
            return False
        # Not from the sample's own numbers: the samples of a step decide alike, and without pairs nothing changes.
        step = position // self.samples_per_step
        return bool(np.random.default_rng((self.seed, step, 3)).random() < self.cutmix_probability)

    def _draw_instance(self, number: int, random: np.random.Generator) -> tuple[View, str]:
        path, prompt = self.instance_images[number]
        flip = random.random() < self.flip_probability
        scale, words = self._draw_scale(random)
        # Where there is no room, there is but one view of the image.
        top, left = (0.0, 0.0) if scale == self.size else map(float, random.random(2))
        return View(path, flip, scale, top, left), words + prompt

    def _draw_whole_instance(self, number: int, random: np.random.Generator) -> View:
        return View(self.instance_images[number][0], random.random() < self.flip_probability, self.size, 0.0, 0.0)

    def _draw_class_image(self, number: int, random: np.random.Generator) -> View:
        flip, place = random.random() < self.flip_probability, random.random(2)
        if self.variants is not None:
            place = np.random.default_rng((self.seed, number, flip, 2)).random(2)
        top, left = (0.5, 0.5) if self.center_crop else map(float, place)
        return View(self.class_images[number][0], flip, None, top, left)

    def _draw_pair(self, index: int, random: np.random.Generator, noise_seed: int) -> Sample:
        drawn: list[Any] = []
        for images, elsewhere, draw_view in (
            (self.instance_images, self._instances_elsewhere, self._draw_whole_instance),
            (self.class_images, self._class_images_elsewhere, self._draw_class_image),
        ):
            if not images:
                drawn += [(), ""]
                continue
            one = index % len(images)
            others = elsewhere[images[one][0].parent]
            pair = random.permutation([one, others[int(random.integers(len(others)))]]).tolist()
            drawn += [tuple(draw_view(number, random) for number in pair)]
            drawn += [side_by_side(*(images[number][1] for number in pair))]
        return Sample(*drawn, noise_seed)

    def _draw_scale(self, random: np.random.Generator) -> tuple[int, str]:
        """Side of the image in pixels, and the words that say so in the prompt (paper, appendix; the example)."""
        if not self.aug:
            return self.size, ""
        if random.random() < 0.66:
            scale = int(random.integers(self.size // 3, self.size + 1))
        else:
            scale = int(random.integers(int(1.2 * self.size), max(int(1.4 * self.size), int(1.2 * self.size) + 1)))
        if scale < 0.6 * self.size:
            return scale, str(random.choice(SMALL_WORDS))
        if scale > self.size:
            return scale, str(random.choice(LARGE_WORDS))
        return scale, ""

    def drawn(self, positions: Iterable[int]) -> tuple[list[View], dict[str, list[str]]]:
        """What these items show.

        Returns:
            Their different views, and their different ``"instance"`` and ``"class"`` prompts.
        """
        views: dict[View, None] = {}
        prompts: dict[str, dict[str, None]] = {"instance": {}, "class": {}}
        most = self._most_views()
        for position in positions:
            sample = self.draw(position)
            views |= dict.fromkeys((*sample.instance, *sample.class_image))
            prompts["instance"].setdefault(sample.instance_prompt)
            if sample.class_image:
                prompts["class"].setdefault(sample.class_prompt)
            # A long run need not be walked through: after a while it shows nothing new.
            if len(views) == most:
                break
        return list(views), {kind: list(found) for kind, found in prompts.items()}

    def _most_views(self) -> float:
        """How many views there can be, with all that prompts say about them."""
        if self.cutmix_probability:
            return math.inf  # prompts of pairs go on being new when no view is
        flips = 2 if self.flip_probability else 1
        class_image = flips if self.variants or self.center_crop or not self.class_images else math.inf
        instance = self.variants if self._has_variants() else math.inf if self.aug else flips
        return len(self.instance_images) * instance + len(self.class_images) * class_image

    def __getitem__(self, position: int) -> dict[str, Any]:
        """One item of the stream.

        Returns:
            ``instance_images`` (3, size, size) in [-1, 1], as :meth:`render` gives them; ``instance_mask``
            (mask_size, mask_size), 1 where the loss counts (:meth:`mask`); ``instance_prompt_ids``
            (model_max_length,); with prior preservation ``class_images``, ``class_mask`` (all ones) and
            ``class_prompt_ids`` alike; ``noise_seed``, from which :func:`collate_fn` draws noise and timesteps.
            Where the images are encoded already, ``instance_posterior`` (2, C, mask_size, mask_size) and
            ``class_posterior`` take the place of the images; where the captions are, ``instance_text`` and
            ``class_text`` (model_max_length, text width) that of the ids. Two images beside each other are twice
            as wide, and so are their masks and posteriors.
        """
        sample = self.draw(position)
        example: dict[str, Any] = {"noise_seed": sample.noise_seed}
        for kind, views, prompt in (
            ("instance", sample.instance, sample.instance_prompt),
            ("class", sample.class_image, sample.class_prompt),
        ):
            if not views:
                continue
            name, show = ("posterior", self.posteriors.__getitem__) if self.posteriors else ("images", self.render)
            example[f"{kind}_{name}"] = torch.cat([show(view) for view in views], dim=-1)
            example[f"{kind}_mask"] = torch.cat([self.mask(view) for view in views], dim=-1)
            if kind in self.text_features:
                example[f"{kind}_text"] = self.text_features[kind][prompt]
            else:
                example[f"{kind}_prompt_ids"] = self.tokenize(prompt)
        return example

    def render(self, view: View) -> Tensor:
        """The pixels of a view, (3, size, size) in [-1, 1].

        An instance image's centre square is laid on a canvas, or cropped to the canvas. The example squashes the
        whole image into the square; the authors' code keeps its proportions, and so does this.
        """
        image = self._image(view)
        if view.scale is None:
            # Cropped before it is resized: a panorama would otherwise become gigabytes first.
            width, height = image.size
            side = min(width, height)
            top, left = _offset(view.top, height - side), _offset(view.left, width - side)
            image = TF.crop(image, top, left, side, side)
            return _to_tensor(image.resize((self.size, self.size), Image.Resampling.BILINEAR))
        pixels = _centre_square(image, view.scale)
        top, left = self._place(view)
        room = self.size - view.scale
        if room <= 0:
            return pixels[:, top : top + self.size, left : left + self.size]
        return TF.pad(pixels, [left, top, room - left, room - top], padding_mode=self.padding_mode)

    def _image(self, view: View) -> Image.Image:
        # Where views are encoded, those of an image follow each other: it is decoded once then.
        if self._last_image is None or self._last_image[0] != view.path:
            self._last_image = (view.path, load_image(view.path))
        image = self._last_image[1]
        return ImageOps.mirror(image) if view.flip else image

    def mask(self, view: View) -> Tensor:
        """Which latents count: (mask_size, mask_size), 1 inside the image and 0 outside."""
        factor = self.size // self.mask_size
        mask = torch.zeros(self.mask_size, self.mask_size)
        if view.scale is None or view.scale >= self.size or self.padding_mode == "edge":
            return torch.ones(self.mask_size, self.mask_size)
        top, left = self._place(view)
        mask[slice(*_cells_inside(top, view.scale, factor)), slice(*_cells_inside(left, view.scale, factor))] = 1.0
        return mask

    def _place(self, view: View) -> tuple[int, int]:
        room = abs(view.scale - self.size)
        return _offset(view.top, room), _offset(view.left, room)

    def tokenize(self, prompt: str) -> Tensor:
        """The ids of a prompt, cut and padded to (model_max_length,)."""
        if prompt not in self._ids_of:
            self._ids_of[prompt] = self.tokenizer(
                prompt,
                truncation=True,
                padding="max_length",
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids[0]
        return self._ids_of[prompt]


def numbers_elsewhere(images: Sequence[tuple[Path, str]]) -> dict[Path, list[int]]:
    """For each folder, the numbers of the images in other folders; of all images where there is but one folder."""
    folders = [path.parent for path, _ in images]
    everywhere = list(range(len(folders)))
    return {
        folder: [number for number in everywhere if folders[number] != folder] or everywhere
        for folder in dict.fromkeys(folders)
    }


def side_by_side(left: str, right: str) -> str:
    """A prompt for two images beside each other: that they are a "photo of" something is said once.

    "photo of a <new1> cat" and "photo of a <new2> plant" give "photo of a <new1> cat next to a <new2> plant".
    """
    opening = re.match(r"(an? )?\w+ of ", right)
    if opening and left.startswith(opening[0]):
        right = right.removeprefix(opening[0])
    return f"{left} next to {right}"


def _centre_square(image: Image.Image, side: int) -> Tensor:
    square = TF.center_crop(image, [min(image.size)] * 2)
    return _to_tensor(square.resize((side, side), Image.Resampling.BILINEAR))


def _offset(part: float, room: int) -> int:
    return int(part * (room + 1))


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, height, width) in [-1, 1]."""
    return TF.pil_to_tensor(image).float() / 127.5 - 1.0


def _cells_inside(start: int, length: int, factor: int) -> tuple[int, int]:
    """First and last + 1 of the latents that see only image, in one dimension.

    One latent on either side is left out as in the example, because it also sees the canvas. Where an image is so
    small that nothing would remain, its middle latent stays: an empty mask would make the loss 0 / 0.
    """
    first, end = start // factor + 1, (start + length) // factor - 1
    if first >= end:
        first = (start + length // 2) // factor
        end = first + 1
    return first, end


def collate_fn(
    examples: Sequence[dict[str, Any]], with_prior_preservation: bool, latent_channels: int, num_train_timesteps: int
) -> dict[str, Tensor]:
    """Batch samples, instance images first and class images behind them, with what diffusion draws for each.

    Noise and timesteps are drawn here, on the CPU and from each sample's own seed: they are then the same on every
    device, for any split of the batch over processes, and after every restart, and cost the training loop nothing.

    Returns:
        ``pixel_values`` (N, 3, size, size) or, of samples that are encoded already, ``posterior``
        (N, 2, latent_channels, mask_size, mask_size); ``mask`` (N, 1, mask_size, mask_size); ``noise`` and
        ``posterior_noise`` (N, latent_channels, mask_size, mask_size), ``timesteps`` (N,), where N is the number of
        examples, doubled with prior preservation. ``input_ids`` (M, length) of the first M captions, and
        ``text_features`` (N - M, length, text width) of the others; either is absent where it would be empty.
    """
    kinds = ["instance", "class"] if with_prior_preservation else ["instance"]
    generators = [torch.Generator().manual_seed(example["noise_seed"]) for example in examples]
    batch: defaultdict[str, list[Tensor]] = defaultdict(list)
    names = {
        "images": "pixel_values",
        "posterior": "posterior",
        "prompt_ids": "input_ids",
        "text": "text_features",
    }
    for kind in kinds:
        for example, generator in zip(examples, generators, strict=True):
            for key, name in names.items():
                if f"{kind}_{key}" in example:
                    batch[name].append(example[f"{kind}_{key}"])
            mask = example[f"{kind}_mask"]
            batch["mask"].append(mask.unsqueeze(0))
            shape = (latent_channels, *mask.shape)
            batch["noise"].append(torch.randn(shape, generator=generator))
            batch["posterior_noise"].append(torch.randn(shape, generator=generator))
            batch["timesteps"].append(torch.randint(num_train_timesteps, (), generator=generator))
    return {name: torch.stack(values) for name, values in batch.items()}


def position_batches(first: int, count: int, batch_size: int, process: int, num_processes: int) -> list[range]:
    """Which items of the stream this process takes: batches ``first`` to ``first + count - 1`` of its own.

    All processes together walk through the stream without gap or overlap, so two with a batch of one see what one
    with a batch of two sees.
    """
    starts = ((batch * num_processes + process) * batch_size for batch in range(first, first + count))
    return [range(start, start + batch_size) for start in starts]
