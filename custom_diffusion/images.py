"""Image files, without torch: retrieve.py, which needs no more than this, is then ready at once."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from custom_diffusion.colours import to_srgb
from custom_diffusion.files import write_whole
from custom_diffusion.image_metadata import SIGNATURE_BYTES, can_strip, upright, upright_size, without_metadata
from custom_diffusion.text import first_line

# Pillow's warnings about metadata name no file, and nothing depends on it.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def load_image(
    source: str | os.PathLike | IO[bytes], least_side: int | None = None, background: str | None = "white"
) -> Image.Image:
    """Open an image as people see it: upright, in sRGB, transparency on white, any mode as 8-bit RGB.

    Whatever is wrong with its metadata, an image whose pixels can be decoded is read; broken colour profiles and
    orientations are ignored.

    Args:
        source: path of the file, or the open file.
        least_side: a JPEG may come out smaller than it is, which is several times faster, but not below this many
            pixels.
        background: what transparent parts are laid on; None to show the colours that transparency hides.

    Raises:
        OSError: for files that cannot be read, or are no (whole) image; for pipes and devices, unread.
        Image.DecompressionBombError: for images too large to decode.
    """
    image = _load(source, least_side)
    if image.mode == "RGBA" and background is not None:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_alpha(source: str | os.PathLike | IO[bytes]) -> Image.Image | None:
    """How opaque an image is, upright and in the mode L: 0 where it is transparent, 255 where it is opaque.

    None where it is opaque everywhere.

    Raises:
        OSError, Image.DecompressionBombError: as :func:`load_image` does.
    """
    image = _load(source, None)
    if image.mode != "RGBA":
        return None
    alpha = image.getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _load(source: str | os.PathLike | IO[bytes], least_side: int | None) -> Image.Image:
    """The image in the mode RGBA where it has transparency, else RGB."""
    if isinstance(source, str | os.PathLike) and _is_endless(Path(source)):
        raise OSError(f"{os.fspath(source)!r} is no file")
    try:
        return _decode(source, least_side)
    except (Image.DecompressionBombError, MemoryError):
        raise
    except Exception as error:  # broken files make Pillow raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        broken = error if isinstance(error, OSError) else OSError(f"no readable image: {first_line(error)}")
    # Anything may lie beside images, a film or a model of many GB too: it is read whole only if it begins as they do.
    if can_strip(_content(source, SIGNATURE_BYTES)):
        for content in without_metadata(_content(source)):
            with contextlib.suppress(Exception):
                return _decode(io.BytesIO(content), least_side)
    raise broken


def _is_endless(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device: reading one may never end."""
    return path.exists() and not (path.is_file() or path.is_dir())


def image_size(source: str | os.PathLike) -> tuple[int, int]:
    """Width and height in pixels of what :func:`load_image` gives, mostly without decoding it.

    Raises:
        OSError, Image.DecompressionBombError: as :func:`load_image` does.
    """
    try:
        with open_image(source) as opened:
            return upright_size(opened)
    except Exception:  # broken metadata makes Pillow raise nearly anything, and the pixels may be whole
        return load_image(source).size


def open_image(source: str | os.PathLike | IO[bytes], formats: Sequence[str] | None = None) -> Image.Image:
    """Open an encoded image without decoding it, as ``Image.open`` does, but never PostScript.

    That is a program: Pillow gives it to Ghostscript, whatever the file is called and whoever made it.

    Args:
        formats: Pillow's names of those that may be opened, all others if None.

    Raises:
        Exception: what ``Image.open`` raises.
    """
    Image.init()
    return Image.open(source, formats=[name for name in formats or list(Image.OPEN) if name != "EPS"])


def open_damaged_image(content: bytes, formats: Sequence[str]) -> Image.Image:
    """As :func:`open_image`, but also where the image's metadata is broken.

    Raises:
        Exception: what ``Image.open`` raises.
    """
    try:
        return open_image(io.BytesIO(content), formats)
    except Image.DecompressionBombError:
        raise
    except Exception:  # broken files make Pillow raise nearly anything
        for stripped in without_metadata(content):
            with contextlib.suppress(Exception):
                return open_image(io.BytesIO(stripped), formats)
        raise


def _content(source: str | os.PathLike | IO[bytes], most: int = -1) -> bytes:
    """The first bytes of a file, or all of them."""
    if isinstance(source, str | os.PathLike):
        with Path(source).open("rb") as file:
            return file.read(most)
    source.seek(0)
    return source.read(most)


def _decode(source: str | os.PathLike | IO[bytes], least_side: int | None) -> Image.Image:
    with open_image(source) as opened:
        if least_side is not None:
            opened.draft("RGB", (least_side, least_side))
        opened.load()
        image = upright(opened)
        if image.mode.startswith("I") or image.mode == "F":
            # 16-bit and float greys: Pillow would clip at 255 and leave a white image.
            grey = np.asarray(image, dtype=np.float32)
            full_scale = 65535 if grey.max() > 255 else 255
            image = Image.fromarray((grey * (255 / full_scale)).clip(0, 255).astype(np.uint8))
        image = to_srgb(image, opened.info.get("icc_profile"))
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    # Whoever saves the image would otherwise write it beside pixels that it no longer fits.
    image.info.pop("icc_profile", None)
    return image


def readable_images(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split files into those that are images and those that are not (or are broken).

    Every file is decoded whole: a truncated photograph shows itself only then, and would stop the run much later.
    """

    def is_readable(path: Path) -> bool:
        try:
            load_image(path)
        except (OSError, Image.DecompressionBombError):
            return False
        return True

    with ThreadPoolExecutor() as pool:
        verdicts = list(pool.map(is_readable, paths))
    good = [path for path, verdict in zip(paths, verdicts, strict=True) if verdict]
    bad = [path for path, verdict in zip(paths, verdicts, strict=True) if not verdict]
    return good, bad


def contained(image: Image.Image, side: int) -> Image.Image:
    """The image in its own shape with ``side`` pixels on its longer side, and at least one on the other."""
    scale = side / max(image.size)
    return image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)


def contact_sheet(rows: Sequence[Sequence[Path]], labels: Sequence[str] | None = None, side: int = 256) -> Image.Image:
    """All images small on one.

    Args:
        rows: the images' paths; rows may differ in length.
        labels: a text above each row.
        side: the longest side of an image in pixels.
    """
    band = 24 if labels else 0
    sheet = Image.new("RGB", (side * max(map(len, rows)), (side + band) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)

    def thumbnail(path: Path) -> Image.Image:
        return contained(load_image(path, least_side=side), side)

    with ThreadPoolExecutor() as pool:
        thumbnails = pool.map(thumbnail, [path for paths in rows for path in paths])
        for row, paths in enumerate(rows):
            top = row * (side + band)
            if labels:
                draw.text((4, top + 2), labels[row], fill="black", font=ImageFont.load_default(16))
            for column in range(len(paths)):
                sheet.paste(next(thumbnails), (column * side, top + band))
    return sheet


def write_image(path: str | os.PathLike, image: Image.Image, kind: str, **options: Any) -> None:
    """Write an image whole or not at all.

    Args:
        kind: ``PNG`` or ``JPEG``.
        options: what Pillow's ``save`` takes for it.
    """
    # Encoded first: Pillow writes into a real file by itself, and does not notice when the disk is full.
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def write_generated(
    path: str | os.PathLike, image: Image.Image, prompt: str, seed: int, settings: Mapping[str, object]
) -> None:
    """Write a PNG that says in its metadata how it was made: ``prompt``, ``seed`` and ``settings`` (JSON)."""
    metadata = PngImagePlugin.PngInfo()
    metadata.add_itxt("prompt", prompt)
    metadata.add_text("seed", str(seed))
    metadata.add_itxt("settings", json.dumps(dict(settings)))
    write_image(path, image, "PNG", pnginfo=metadata)
