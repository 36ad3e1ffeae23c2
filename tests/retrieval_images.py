"""Images for the tests of retrieval: drawings and textures that differ, and what the web makes of an image."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from custom_diffusion.images import load_image

DESIGNS = Path(__file__).parent / "designs"


def drawing(number: int, size: tuple[int, int] = (320, 300)) -> Image.Image:
    """A texture that no other number gives."""
    cells = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(number: int) -> bytes:
    """The encoded drawing of a number, as a page of a web serves it."""
    return encoded(drawing(number))


def _sketch(number: int) -> Image.Image:
    """A line of pencil on white."""
    random_ = random.Random(number)
    image = Image.new("RGB", (400, 400), "white")
    points = [(random_.uniform(120, 280), random_.uniform(120, 280))]
    for _ in range(random_.randint(3, 10)):
        points.append(tuple(min(max(at + random_.uniform(-120, 120), 20), 380) for at in points[-1]))
    ImageDraw.Draw(image).line(points, fill="black", width=random_.choice([1, 2, 3, 4]))
    return image


def _shape(number: int) -> Image.Image:
    """A simple shape on white, of its own kind, place, size and colour."""
    random_ = random.Random(1000 + number)
    image = Image.new("RGB", (400, 400), "white")
    draw = ImageDraw.Draw(image)
    colour = tuple(random_.randrange(220) for _ in range(3))
    x, y, reach = random_.uniform(140, 260), random_.uniform(140, 260), random_.uniform(40, 120)
    box = (x - reach, y - reach, x + reach, y + reach)
    if number % 5 == 0:
        draw.ellipse(box, fill=colour)
    elif number % 5 == 1:
        draw.rectangle(box, fill=colour)
    elif number % 5 == 2:
        draw.regular_polygon((x, y, reach), 3, fill=colour)
    elif number % 5 == 3:
        draw.regular_polygon((x, y, reach), random_.randint(5, 8), random_.randrange(90), fill=colour)
    else:
        draw.ellipse(box, outline=colour, width=random_.choice([2, 4, 10]))
    return image


def _centred(number: int) -> Image.Image:
    """A shape of the same place, size and colour as that of any other number."""
    image = Image.new("RGB", (400, 400), "white")
    draw = ImageDraw.Draw(image)
    box, grey = (80, 80, 320, 320), (40, 40, 40)
    if number == 0:
        draw.ellipse(box, fill=grey)
    elif number == 1:
        draw.rectangle(box, fill=grey)
    elif number == 2:
        draw.rounded_rectangle(box, 40, fill=grey)
    elif number <= 7:
        draw.regular_polygon((200, 200, 132), number, fill=grey)
    elif number == 8:
        draw.ellipse(box, outline=grey, width=6)
    elif number == 9:
        draw.rectangle(box, outline=grey, width=6)
    elif number == 10:
        draw.line((80, 200, 320, 200), fill=grey, width=20)
        draw.line((200, 80, 200, 320), fill=grey, width=20)
    elif number == 11:
        draw.pieslice(box, 0, 270, fill=grey)
    else:
        draw.ellipse(box, fill=((220, 30, 30), (30, 30, 220), (20, 140, 20), (250, 150, 20))[number - 12])
    return image


def _letter(number: int) -> Image.Image:
    image = Image.new("RGB", (400, 400), "white")
    font = ImageFont.load_default(300)
    ImageDraw.Draw(image).text((200, 200), "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[number], fill="black", font=font, anchor="mm")
    return image


def _gradient(number: int) -> Image.Image:
    random_ = np.random.default_rng(500 + number)
    down, across = np.mgrid[0:300, 0:400] / 300
    channels = [
        (across * random_.uniform(-1, 1) + down * random_.uniform(-1, 1)) * 100 + random_.uniform(90, 160)
        for _ in range(3)
    ]
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def _photograph(number: int) -> Image.Image:
    """What has light and detail at all sizes, as photographs have: noise of a 1/f spectrum."""
    random_ = np.random.default_rng(number)
    frequencies = np.fft.fftfreq(256)[:, None] ** 2 + np.fft.fftfreq(256)[None] ** 2
    frequencies[0, 0] = 1
    noise = random_.normal(size=(256, 256, 3))
    channels = [np.fft.ifft2(np.fft.fft2(noise[..., one]) / frequencies**0.6).real for one in range(3)]
    pixels = np.stack(channels, -1)
    pixels = (pixels - pixels.mean()) / pixels.std() * 45 + 128
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((400, 400), Image.Resampling.BICUBIC)


def designs() -> list[Image.Image]:
    """Real drawings, of which two pairs look the same."""
    return [load_image(path).resize((400, 400), Image.Resampling.LANCZOS) for path in sorted(DESIGNS.glob("*/*.png"))]


def sketches(count: int = 20) -> list[Image.Image]:
    return [_sketch(number) for number in range(count)]


def faint_sketches(count: int = 12) -> list[Image.Image]:
    return [image.point(lambda value: 255 - (255 - value) // 4) for image in sketches(count)]


def shapes(count: int = 20) -> list[Image.Image]:
    return [_shape(number) for number in range(count)]


def centred_shapes() -> list[Image.Image]:
    return [_centred(number) for number in range(16)]


def letters() -> list[Image.Image]:
    return [_letter(number) for number in range(26)]


def textures(count: int = 12) -> list[Image.Image]:
    return [drawing(number, (400, 380)) for number in range(count)]


def gradients(count: int = 6) -> list[Image.Image]:
    return [_gradient(number) for number in range(count)]


def photographs(count: int = 8) -> list[Image.Image]:
    return [_photograph(number) for number in range(count)]


# What is cropped off: parts of the width and height at the left, top, right and bottom.
CROPS = {
    "all around": (0.03, 0.03, 0.03, 0.03),
    "left": (0.03, 0, 0, 0),
    "left and top": (0.03, 0.03, 0, 0),
    "right and bottom": (0, 0, 0.03, 0.03),
    "left and right": (0.03, 0, 0.03, 0),
    "top and bottom": (0, 0.03, 0, 0.03),
    "half as much": (0.015, 0.015, 0.015, 0.015),
}


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = image.size
    return image.crop((round(width * left), round(height * top), width - round(width * right),
                       height - round(height * bottom)))  # fmt: skip


def variants(image: Image.Image) -> dict[str, Image.Image]:
    """What else the web has of an image: saved again, resized and slightly cropped."""
    width, height = image.size
    smaller = (round(width * 0.75), round(height * 0.75))
    found = {
        "JPEG 60": _again(image),
        "JPEG 30": _again(image, quality=30),
        "WebP": _again(image, "WEBP", quality=60),
        "smaller": image.resize((width * 2 // 3, height * 2 // 3), Image.Resampling.BICUBIC),
        "larger": image.resize((width * 2, height * 2), Image.Resampling.NEAREST),
    }
    for name, crop in CROPS.items():
        found[f"cropped {name}"] = _again(cropped(image, *crop), quality=75)
    everything = cropped(image, *CROPS["all around"]).resize(smaller, Image.Resampling.BILINEAR)
    found["everything"] = _again(everything)
    corner = cropped(image, *CROPS["left and top"]).resize(smaller, Image.Resampling.BILINEAR)
    return found | {"corner": _again(corner)}


def _again(image: Image.Image, kind: str = "JPEG", quality: int = 60) -> Image.Image:
    return load_image(io.BytesIO(encoded(image, kind, quality=quality)))
