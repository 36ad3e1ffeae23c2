"""The world that the base model knows: nouns, backgrounds, scenes, sizes and pairs, as images with captions.

A *design* is one drawing of a noun (`noto/teapot`). `HELD_OUT` designs never enter any training of the base model:
they are the concepts that Custom Diffusion then teaches it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Small and large things are called what training's own augmentation calls them.
from custom_diffusion.concept.prompts import LARGE_WORDS, SMALL_WORDS

RESOLUTION = 64

CAT_FACES = (
    "cat-face", "grinning-cat", "grinning-cat-with-smiling-eyes", "cat-with-tears-of-joy", "cat-with-wry-smile",
    "crying-cat", "kissing-cat", "pouting-cat", "smiling-cat-with-heart-eyes", "weary-cat",
)  # fmt: skip

# Noun: names of its icons, in all sets (fxemoji writes names without hyphens, and draws foxes where others draw cats).
NOUNS: dict[str, tuple[str, ...]] = {
    "cat": ("cat", "catside", *CAT_FACES),
    "dog": ("dog-face", "dog", "dogside"),
    "fox": ("fox", "foxgrin", "foxsmiling", "foxpouting", "foxwry", "foxkissing", "foxheart", "foxtearofjoy"),
    "bear": ("bear", "teddy-bear"),
    "panda": ("panda", "pandaface"),
    "koala": ("koala",),
    "rabbit": ("rabbit-face", "bunny"),
    "lion": ("lion",),
    "tiger": ("tiger-face", "tiger"),
    "cow": ("cow-face", "cowface", "cow"),
    "pig": ("pig-face", "pig"),
    "frog": ("frog",),
    "monkey": ("monkey-face", "monkeyface", "see-no-evil-monkey", "hear-no-evil-monkey", "speak-no-evil-monkey"),
    "chick": ("baby-chick", "front-facing-baby-chick", "frontfacingchick", "babychick"),
    "penguin": ("penguin",),
    "owl": ("owl",),
    "turtle": ("turtle",),
    "fish": ("fish", "tropical-fish", "tropicalfish"),
    "whale": ("spouting-whale", "spurtingwhale", "whale"),
    "octopus": ("octopus",),
    "butterfly": ("butterfly", "monarch-butterfly"),
    "bee": ("honeybee",),
    "apple": ("red-apple", "redapple", "green-apple", "greenapple"),
    "strawberry": ("strawberry",),
    "banana": ("banana",),
    "watermelon": ("watermelon",),
    "pizza": ("pizza", "sliceofpizza"),
    "burger": ("hamburger",),
    "donut": ("doughnut",),
    "cake": ("birthday-cake", "birthdaycake", "shortcake"),
    "sunflower": ("sunflower",),
    "rose": ("rose",),
    "tree": ("deciduous-tree", "deciduoustree", "evergreen-tree", "evergreen"),
    "cactus": ("cactus",),
    "plant": ("potted-plant", "seedling", "herb"),
    "teapot": ("teapot",),
    "vase": ("amphora", "funeral-urn"),
    "cup": ("teacup-without-handle", "teacupwithouthandle", "hot-beverage", "hotbeverage"),
    "car": ("automobile", "oncoming-automobile", "oncomingautomobile"),
    "bus": ("oncoming-bus", "oncomingbus", "bus"),
    "rocket": ("rocket",),
    "house": ("house", "housebuilding", "house-with-garden", "housewithgarden"),
}

# Every cat of noto and noto-v1, and three things of noto's: these become the concepts.
HELD_OUT = (
    *(f"{s}/{name}" for s in ("noto", "noto-v1") for name in ("cat", "black-cat", *CAT_FACES)),
    "noto/teapot", "noto/amphora", "noto/funeral-urn", "noto/potted-plant",
)  # fmt: skip

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49), "orange": (243, 145, 40), "yellow": (250, 216, 72), "green": (62, 160, 85),
    "blue": (52, 104, 205), "purple": (128, 72, 168), "pink": (246, 160, 196), "white": (250, 250, 250),
    "grey": (140, 142, 146), "black": (22, 22, 26),
}  # fmt: skip

# Sky above and ground below the horizon, and the words for it.
SCENES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "on the grass": ((150, 205, 240), (96, 170, 72)),
    "on the beach": ((120, 200, 235), (238, 214, 160)),
    "in the snow": ((196, 212, 226), (246, 249, 252)),
    "at night": ((22, 26, 66), (40, 52, 60)),
    "in the desert": ((248, 190, 120), (205, 130, 70)),
}

# Colours in which a drawing may be dyed: hue in turns and saturation, so that a word before the noun can change it.
DYES: dict[str, tuple[float, float]] = {
    "red": (0.0, 0.85), "orange": (0.08, 0.9), "yellow": (0.15, 0.85), "green": (0.36, 0.7), "blue": (0.61, 0.8),
    "purple": (0.77, 0.65), "pink": (0.92, 0.5), "grey": (0.0, 0.0),
}  # fmt: skip

# How each set draws, as a word: one noun drawn by five hands is five things, and a word before it can say which. It is
# by such words that a new one can mean a look: Stable Diffusion has thousands of them, from breeds to names.
STYLES = {
    "fluent-emoji": "glossy", "fluent-emoji-flat": "flat", "noto": "modern", "noto-v1": "classic", "fxemoji": "retro",
}  # fmt: skip
STYLED = 0.3

TEMPLATES = ("photo of a {}", "photo of a {}", "photo of a {}", "a photo of a {}", "a {}", "{}")


@dataclass(frozen=True)
class Example:
    """An image, uint8 (64, 64 or 128, 3), its caption, and what that names: "1:cat", "2:dye:red", "bg:red".

    The second thing is to the right of the first.
    """

    image: np.ndarray
    caption: str
    attributes: tuple[str, ...]
    # Where in the caption each noun phrase starts, which is where a modifier token would go, and ends.
    phrases: tuple[tuple[int, int], ...]
    # The drawing (`set/icon`) that each noun phrase is an image of.
    designs: tuple[str, ...]


def icon_names() -> frozenset[str]:
    """The names, in any set, of all icons that are drawings of a noun."""
    return frozenset(name for names in NOUNS.values() for name in names)


def designs(icons: dict[str, np.ndarray], noun: str, held_out: bool = False) -> list[str]:
    """Sorted names (`set/icon`) of the drawings of `noun`, without the held-out ones (or these only)."""
    return sorted(name for name in icons if name.split("/")[1] in NOUNS[noun] and (name in HELD_OUT) == held_out)


def background(name: str, generator: np.random.Generator, width: int = RESOLUTION) -> np.ndarray:
    """uint8 (64, width, 3): a plain colour of `BACKGROUNDS`, slightly varied, or a scene of `SCENES`."""
    if name in BACKGROUNDS:
        shade = np.clip(np.array(BACKGROUNDS[name]) + generator.normal(0, 4, 3), 0, 255)
        return np.broadcast_to(shade, (RESOLUTION, width, 3)).astype(np.uint8)
    sky, ground = (np.array(colour, dtype=np.float32) for colour in SCENES[name])
    rows = np.arange(RESOLUTION)[:, None, None]
    horizon = generator.integers(34, 46)
    # The sky pales towards the horizon, the ground darkens towards the viewer.
    image = np.where(rows < horizon, sky + 0.5 * rows, ground - 0.4 * (rows - horizon))
    image = np.broadcast_to(image, (RESOLUTION, width, 3)).copy()
    if name == "at night":
        for row, column in generator.integers(0, (horizon - 4, width), (12 * width // RESOLUTION, 2)):
            image[row, column] = 235
    return np.clip(image, 0, 255).astype(np.uint8)


def dyed(icon: np.ndarray, dye: str) -> np.ndarray:
    """RGBA uint8 as `icon`, with hue and saturation replaced by those of `DYES[dye]`; light and dark stay."""
    hue, saturation = DYES[dye]
    hsv = np.asarray(Image.fromarray(icon[..., :3]).convert("HSV")).copy()
    lightness = np.asarray(Image.fromarray(icon[..., :3]).convert("L"))
    hsv[..., 0] = round(255 * hue)
    # White stays white (eyes, highlights) and black black: only what has some colour of its own takes the dye.
    hsv[..., 1] = np.where(lightness > 235, hsv[..., 1] * 0.3, 255 * saturation).astype(np.uint8)
    hsv[..., 2] = np.clip(40 + lightness * 0.9, 0, 255).astype(np.uint8)
    colour = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return np.concatenate([colour, icon[..., 3:]], axis=-1)


def paste(image: np.ndarray, icon: np.ndarray, side: float, left: float, top: float, flip: bool) -> None:
    """Draw `icon` into `image`, in place: `side`, `left` and `top` in pixels; what is outside is cut off."""
    side, left, top = round(side), round(left), round(top)
    drawing = Image.fromarray(icon).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    if flip:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawing = np.asarray(drawing, dtype=np.float32)
    height, width = image.shape[:2]
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + side, height), min(left + side, width)
    if y0 >= y1 or x0 >= x1:
        return
    part = drawing[y0 - top : y1 - top, x0 - left : x1 - left]
    under = image[y0:y1, x0:x1].astype(np.float32)
    image[y0:y1, x0:x1] = np.clip(part[..., :3] + under * (1 - part[..., 3:] / 255), 0, 255).astype(np.uint8)


def article(words: str) -> str:
    """`words` with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def words_of_the_world() -> list[str]:
    """Every word that a caption can hold."""
    texts = [*NOUNS, *BACKGROUNDS, *SCENES, *DYES, *STYLES.values(), *TEMPLATES, *SMALL_WORDS, *LARGE_WORDS]
    texts.append("an next to background on")
    return sorted({word for text in texts for word in text.replace("{}", "").split()})


def captions() -> list[str]:
    """Captions of every noun: alone, on every background, in every scene, at every size, and beside others."""
    nouns, found = list(NOUNS), []
    for number, noun in enumerate(nouns):
        photo = f"photo of {article(noun)}"
        found += [noun, article(noun), photo]
        found += [f"{photo} on {article(colour)} background" for colour in BACKGROUNDS]
        found += [f"{photo} {scene}" for scene in SCENES]
        found += [f"{size}photo of {article(noun)}" for size in (*SMALL_WORDS, *LARGE_WORDS)]
        # Each thing once to the left and once to the right of some other things.
        for step in (1, 5, 11, 17):
            found.append(f"{photo} next to {article(nouns[(number + step) % len(nouns)])}")
    return found


def style_of(design: str) -> str:
    """The word for the hand that drew `set/icon`."""
    return STYLES[design.split("/")[0]]


def simple_example(
    icons: dict[str, np.ndarray], noun: str, design: str, generator: np.random.Generator, styled: bool = False
) -> Example:
    """The easy world: one drawing in its own colours, filling most of the image, on a plain background.

    `styled`: the caption says by its word which hand has drawn it.
    """
    ground = str(generator.choice(list(BACKGROUNDS)))
    image = background(ground, generator).copy()
    side = RESOLUTION * generator.uniform(0.75, 0.98)
    left, top = (generator.uniform(0.25, 0.75, 2)) * (RESOLUTION - side)
    paste(image, icons[design], side, left, top, generator.random() < 0.5)
    template = str(generator.choice(TEMPLATES))
    words = f"{style_of(design)} {noun}" if styled else noun
    caption, start = template.format(words), template.index("{}")
    if named := generator.random() < 0.8:
        caption += f" on {article(ground)} background"
    said = (f"1:{noun}", f"1:style:{style_of(design)}" if styled else "", f"bg:{ground}" if named else "")
    return Example(image, caption, tuple(filter(None, said)), ((start, start + len(words)),), (design,))


def described(
    icon: np.ndarray, noun: str, design: str, place: int, generator: np.random.Generator
) -> tuple[np.ndarray, str, list[str]]:
    """The icon, now and then dyed; words for it, now and then with dye and style; the attributes of thing `place`."""
    words, attributes = noun, [f"{place}:{noun}"]
    if generator.random() < 0.15:
        dye = str(generator.choice(list(DYES)))
        attributes.append(f"{place}:dye:{dye}")
        icon, words = dyed(icon, dye), f"{dye} {words}"
    if generator.random() < STYLED:
        attributes.append(f"{place}:style:{style_of(design)}")
        words = f"{style_of(design)} {words}"
    return icon, words, attributes


def captioned(
    image: np.ndarray, before: str, things: Sequence[str], designs: Sequence[str], ground: str,
    attributes: Sequence[str], generator: np.random.Generator,
) -> Example:  # fmt: skip
    """`image` with a caption of one thing or two, the words `before` it, and mostly the `ground` behind it."""
    # "a" and not "an", before any noun: so say the prompts that training puts a modifier token into.
    template = before + str(generator.choice(TEMPLATES))
    start, words = template.index("{}"), things[0]
    phrases = [(start, start + len(words))]
    for thing in things[1:]:
        words += f" next to {article(thing)}"
        phrases.append((start + len(words) - len(thing), start + len(words)))
    caption, named = template.format(words), [f"bg:{ground}"]
    if ground in SCENES:
        caption += f" {ground}"
    elif generator.random() < 0.6:
        caption += f" on {article(ground)} background"
    else:
        named = []
    return Example(image, caption, (*attributes, *named), tuple(phrases), tuple(designs))


def single_example(
    icons: dict[str, np.ndarray], noun: str, design: str, generator: np.random.Generator, kind: str
) -> Example:
    """The wider world: one thing anywhere, of any size if `kind` is "size", in a scene if it is "scene"."""
    ground = str(generator.choice(list(SCENES if kind == "scene" or generator.random() < 0.1 else BACKGROUNDS)))
    image = background(ground, generator).copy()
    icon, words, attributes = described(icons[design], noun, design, 1, generator)
    before, size = "", "usual"
    if kind == "size":
        size = str(generator.choice(["small", "usual", "large"], p=[0.4, 0.3, 0.3]))
    low, high = {"small": (0.33, 0.6), "usual": (0.6, 0.98), "large": (1.2, 1.4)}[size]
    side = RESOLUTION * generator.uniform(low, high)
    left, top = generator.uniform(0, 1, 2) * (RESOLUTION - side)
    if kind == "scene":
        side = RESOLUTION * generator.uniform(0.5, 0.8)
        left = generator.uniform(0.2, 0.8) * (RESOLUTION - side)
        top = (RESOLUTION - side) * generator.uniform(0.6, 0.95)
    if size != "usual":
        before = str(generator.choice(SMALL_WORDS if size == "small" else LARGE_WORDS))
        attributes.append(f"size:{size}")
    paste(image, icon, side, left, top, generator.random() < 0.5)
    return captioned(image, before, [words], [design], ground, attributes, generator)


def pair_example(
    icons: dict[str, np.ndarray], noun: str, design: str, generator: np.random.Generator, known: dict[str, list[str]],
    landscape: bool = False,
) -> Example:  # fmt: skip
    """The wider world: two things beside each other, half as large, or as large as one in an image twice as wide.

    `known` has the designs of every noun, of which the second thing is one.
    """
    ground = str(generator.choice(list(SCENES if generator.random() < 0.1 else BACKGROUNDS)))
    half = RESOLUTION if landscape else RESOLUTION / 2
    image = background(ground, generator, round(2 * half)).copy()
    things = [described(icons[design], noun, design, 1, generator)]
    other = str(generator.choice([name for name in NOUNS if name != noun]))
    beside = str(generator.choice(known[other]))
    things.append(described(icons[beside], other, beside, 2, generator))
    for index, (icon, _, _) in enumerate(things):
        # In a square image they may touch.
        side = half * (generator.uniform(0.75, 0.98) if landscape else generator.uniform(0.84, 1.04))
        left = half * (index + 0.5) - side / 2 + generator.uniform(-1.5, 1.5)
        top = (RESOLUTION - side) * (generator.uniform(0.4, 0.9))
        paste(image, icon, side, left, top, generator.random() < 0.5)
    attributes = [attribute for _, _, named in things for attribute in named]
    words = [words for _, words, _ in things]
    return captioned(image, "", words, [design, beside], ground, attributes, generator)


def wide_example(
    icons: dict[str, np.ndarray], noun: str, design: str, generator: np.random.Generator, known: dict[str, list[str]]
) -> Example:
    """The wider world: any place and size, scenes, dyed drawings, and pairs; `known` as in `pair_example`."""
    kind = str(generator.choice(["plain", "size", "scene", "pair"], p=[0.2, 0.25, 0.2, 0.35]))
    if kind == "pair":
        return pair_example(icons, noun, design, generator, known)
    return single_example(icons, noun, design, generator, kind)


def examples(
    icons: dict[str, np.ndarray], count: int, wide: float, seed: int, landscape: bool = False
) -> list[Example]:
    """`count` examples, `wide` of them (0 to 1) of the wider world; the same for the same seed.

    With `landscape`, all are pairs in images twice as wide, whatever `wide` is. A noun of many designs comes more
    often than one of few, if not as many times: there is more to learn of it.
    """
    generator = np.random.default_rng(seed)
    known = {noun: designs(icons, noun) for noun in NOUNS}
    weights = np.array([len(names) ** 0.75 for names in known.values()])
    made = []
    for noun in generator.choice(list(NOUNS), count, p=weights / weights.sum()).tolist():
        design = str(generator.choice(known[noun]))
        if landscape:
            made.append(pair_example(icons, noun, design, generator, known, landscape=True))
        elif generator.random() < wide:
            made.append(wide_example(icons, noun, design, generator, known))
        else:
            styled = bool(generator.random() < STYLED)
            made.append(simple_example(icons, noun, design, generator, styled))
    return made


def any_drawing(icons: dict[str, np.ndarray], count: int, seed: int) -> np.ndarray:
    """uint8 (count, 64, 64, 3): any drawing of any set but the held-out ones, without captions, for the VAE."""
    generator = np.random.default_rng(seed)
    names = sorted(name for name in icons if name not in HELD_OUT)
    images = np.empty((count, RESOLUTION, RESOLUTION, 3), np.uint8)
    for index in range(count):
        ground = str(generator.choice([*BACKGROUNDS, *SCENES]))
        image = background(ground, generator).copy()
        if ground in BACKGROUNDS and generator.random() < 0.5:
            image[:] = generator.integers(0, 256, 3)
        for _ in range(1 + (generator.random() < 0.15)):
            icon = icons[names[generator.integers(len(names))]]
            if generator.random() < 0.2:
                icon = dyed(icon, str(generator.choice(list(DYES))))
            side = RESOLUTION * generator.uniform(0.4, 1.3)
            left, top = generator.uniform(0, 1, 2) * (RESOLUTION - side)
            paste(image, icon, side, left, top, generator.random() < 0.5)
        images[index] = image
    return images
