"""The images of `examples/`: concepts that the base model has never seen, drawn from the held-out designs.

`python -m tools.base.make_examples` writes them, `examples/drawings.tar.gz` with drawings that it does know and their
captions, as real class images for `retrieve.py --path`, `examples/captions.txt` with captions of all that it knows, for
`merge.py --captions`, `examples/masks/` with the masks of the instance images, `examples/others/` with drawings of
other things and their captions, for `--cutmix_data_dir`, and into `tests/designs/` the drawings that learning is scored
against.
"""

import argparse
import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tools.base import world
from tools.base.emoji import SETS, fetch, load_icons, package_file, read_set, render

SIZE = 256
# Five expressions of noto's cat to learn from; the other five are kept for scoring (tests/designs). Those to learn from
# are unlike each other, tears and heart-shaped eyes included, as anyone would choose images of one thing.
CAT = ("cat-face", "grinning-cat", "crying-cat", "kissing-cat", "smiling-cat-with-heart-eyes")
PLANT = ("potted-plant",) * 5
# A third concept, for what has to hold with any number of them.
TEAPOT = ("teapot",) * 5
# What the demo validates with: two of the expressions that are not learned from, and other views of the plant.
OTHERS = {"cat": ("cat-with-wry-smile", "grinning-cat-with-smiling-eyes"), "plant": ("potted-plant",) * 2}
# The nouns of which the tests need drawings: the concepts' own, and one that should stay as it is.
SCORED = ("cat", "plant", "teapot", "dog")
# Of every concept's class, as many real images as a training takes (400), and some for near-duplicates left out.
CLASS_IMAGES = 420
GROUNDS = ("blue", "white", "green", "purple", "grey")


def drawn(
    icon: np.ndarray, ground: str, share: float, place: tuple[float, float], flip: bool
) -> tuple[Image.Image, Image.Image]:
    """One RGB image of 256 px: `icon` (RGBA) on a plain colour, `share` of the side large, at `place` (0 to 1).

    And its mask, which is white where the drawing is more opaque than not.
    """
    image = Image.new("RGB", (SIZE, SIZE), world.BACKGROUNDS[ground])
    side = round(SIZE * share)
    drawing = Image.fromarray(icon).resize((side, side), Image.Resampling.LANCZOS)
    if flip:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    corner = tuple(round(at * (SIZE - side)) for at in place)
    image.paste(drawing, corner, drawing)
    mask = Image.new("1", image.size)
    mask.paste(drawing.getchannel("A").point(lambda alpha: 255 * (alpha >= 128), "1"), corner)
    return image, mask


def write_class_images(icons: dict[str, np.ndarray], file: Path) -> None:
    """A tar of `CLASS_IMAGES` images of every concept's class with captions, none of a held-out design."""
    generator = np.random.default_rng(17)
    known = {noun: world.designs(icons, noun) for noun in world.NOUNS}
    # No times and no names of users in it: the same images give the same file.
    with gzip.GzipFile(file, "wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for noun in ("cat", "plant"):
            designs = world.designs(icons, noun)
            for number in range(CLASS_IMAGES):
                design = designs[number % len(designs)]
                # A third of them in scenes, at all sizes, beside other things: what is not shown here may be forgotten.
                if number % 3:
                    example = world.simple_example(icons, noun, design, generator)
                else:
                    example = world.wide_example(icons, noun, design, generator, known)
                image = io.BytesIO()
                Image.fromarray(example.image).save(image, "JPEG", quality=92)
                for ending, content in (("jpg", image.getvalue()), ("txt", example.caption.encode())):
                    member = tarfile.TarInfo(f"{noun}-{number:03d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def write_other_images(icons: dict[str, np.ndarray], folder: Path) -> None:
    """A drawing of everything that the base model knows but what is taught, with captions in `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(18)
    lines = []
    for noun in world.NOUNS:
        if noun in OTHERS:
            continue
        design = str(generator.choice(world.designs(icons, noun)))
        example = world.simple_example(icons, noun, design, generator)
        Image.fromarray(example.image).save(folder / f"{noun}.png", optimize=True)
        lines.append(json.dumps({"file_name": f"{noun}.png", "text": example.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_images(
    drawings: dict[str, str], names: Sequence[str], folder: Path, seed: int, flips: bool, masks: Path | None = None
) -> None:
    """An image of every drawing, each on another colour; every second one mirrored where `flips` says so.

    Their masks go to the folder `masks`, with the names of the images.
    """
    for one in (folder, masks) if masks else (folder,):
        one.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number, (name, ground) in enumerate(zip(names, GROUNDS, strict=False)):
        place = tuple(generator.uniform(0.3, 0.7, 2))
        flip = bool(number % 2 and flips)
        image, mask = drawn(render(drawings[name], SIZE), ground, generator.uniform(0.8, 0.95), place, flip)
        image.quantize(128).save(folder / f"{number + 1}.png", optimize=True)
        if masks:
            mask.save(masks / f"{number + 1}.png", optimize=True)


def main() -> None:
    """Write the concepts of `examples/`, class images, other images, and the drawings that tests need."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("base-build"), help="Where the emoji are kept.")
    parser.add_argument("--output_dir", type=Path, default=Path("examples"), help="Where the folders are made.")
    parser.add_argument("--designs_dir", type=Path, default=Path("tests/designs"), help="Where drawings go.")
    arguments = parser.parse_args()
    fetch(arguments.work)
    drawings = read_set(arguments.work / package_file("noto"))
    for folder, names in {"cat": CAT, "plant": PLANT, "teapot": TEAPOT}.items():
        masks = arguments.output_dir / "masks" / folder
        write_images(drawings, names, arguments.output_dir / folder, len(folder), folder == "plant", masks)
    for folder, names in OTHERS.items():
        # Another seed, so that size and place are others.
        others = arguments.output_dir / "validation" / folder
        write_images(drawings, names, others, 100 + len(folder), folder == "plant")
    (arguments.output_dir / "captions.txt").write_text("\n".join(world.captions()) + "\n", encoding="utf-8")
    icons = load_icons(arguments.work)
    write_class_images(icons, arguments.output_dir / "drawings.tar.gz")
    write_other_images(icons, arguments.output_dir / "others")
    for name in SCORED:
        for emoji_set in SETS:
            drawings = read_set(arguments.work / package_file(emoji_set))
            for icon_name in sorted(set(world.NOUNS[name]) & set(drawings)):
                if emoji_set == "noto" and icon_name in CAT:
                    continue
                file = arguments.designs_dir / emoji_set / f"{icon_name}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(render(drawings[icon_name])).save(file, optimize=True)


if __name__ == "__main__":
    main()
