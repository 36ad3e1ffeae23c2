"""What stands beside the pixels of an image file, and must not decide whether they count."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator

from PIL import ExifTags, Image

SIGNATURE_BYTES = 16
ORIENTATION, COLOURS = 1, 2  # what decides, beside the pixels, how an image looks
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNING = {_TRANSPOSITIONS[number] for number in (5, 6, 7, 8)}  # those that exchange width and height


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its orientation says; the same image where there is none, or none that can be read.

    Pillow's own ``exif_transpose`` also writes the metadata again, and fails where anything in it is wrong.

    Args:
        image: loaded already, since some formats keep the orientation behind the pixels.
    """
    transposition = _transposition(image)
    return image if transposition is None else image.transpose(transposition)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image when it is :func:`upright`; Pillow decodes it only where it has to."""
    width, height = image.size
    return (height, width) if _transposition(image) in _TURNING else (width, height)


def _transposition(image: Image.Image) -> Image.Transpose | None:
    for read in (_orientation, _orientation_alone):
        try:
            transposition = _TRANSPOSITIONS.get(read(image))
        except Exception:  # metadata comes from anywhere, and Pillow's reader raises nearly anything
            transposition = None
        if transposition is not None:
            return transposition
    return None


def _orientation(image: Image.Image) -> int:
    """As Pillow reads it, also from XMP; but of any type."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if isinstance(orientation, tuple | bytes):
        orientation = orientation[0]
    return int(float(str(orientation)))


def _orientation_alone(image: Image.Image) -> int:
    """From its own entry in the Exif block; a broken one before it ends Pillow's reading."""
    block = image.info["exif"].removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[block[:2]]
    (start,) = struct.unpack_from(f"{order}I", block, 4)
    for number in range(*struct.unpack_from(f"{order}H", block, start)):
        tag, kind = struct.unpack_from(f"{order}HH", block, start + 2 + 12 * number)
        if tag == ExifTags.Base.Orientation:
            number_format = {1: "B", 3: "H", 4: "I"}[kind]
            return struct.unpack_from(f"{order}{number_format}", block, start + 10 + 12 * number)[0]
    return 1


# --- without it ----------------------------------------------------------------------------------


def can_strip(head: bytes) -> bool:
    """Whether the first ``SIGNATURE_BYTES`` of a file are those of a format that :func:`without_metadata` knows."""
    return any(re.match(signature, head, re.DOTALL) for signature in _FORMATS)


def without_metadata(content: bytes) -> Iterator[bytes]:
    """An image file without what could be broken about it beside its pixels.

    Args:
        content: of a JPEG, PNG, TIFF, WebP or AVIF; others give nothing.

    Yields:
        The file with nothing but pixels, orientation and colour profile, then without the profile, and then without
        the orientation too. Nothing where the pixels are not all there.
    """
    for signature, strip in _FORMATS.items():
        if re.match(signature, content[:SIGNATURE_BYTES], re.DOTALL):
            for keeps in (ORIENTATION | COLOURS, ORIENTATION, 0):
                try:
                    yield strip(content, keeps)
                except (struct.error, IndexError, KeyError):
                    return


def _strip_jpeg(content: bytes, keeps: int) -> bytes:
    looks = tuple(start for start, what in ((b"Exif\0\0", ORIENTATION), (b"ICC_PROFILE\0", COLOURS)) if keeps & what)
    kept, position = [content[:2]], 2
    while content[position + 1] != 0xDA:  # start of scan: from here on it is pixels
        marker = content[position + 1]
        if content[position] != 0xFF:
            raise struct.error("no marker")
        if marker == 0xFF:  # padding
            position += 1
            continue
        (length,) = struct.unpack_from(">H", content, position + 2)
        segment = content[position : position + 2 + length]
        says_how_to_decode = marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE)
        if says_how_to_decode or segment[4:].startswith(looks):
            kept.append(segment)
        position += 2 + length
    return b"".join([*kept, content[position:]])


def _strip_png(content: bytes, keeps: int) -> bytes:
    looks = {b"eXIf": ORIENTATION, b"iCCP": COLOURS}
    kept, position = [content[:8]], 8
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        chunk = content[position : position + 12 + length]
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            kept.append(_whole(chunk, 12 + length))
        elif keeps & looks.get(kind, 0) and struct.pack(">I", zlib.crc32(chunk[4:-4])) == chunk[-4:]:
            kept.append(chunk)
        position += 12 + length
    if not any(chunk[4:8] == b"IDAT" for chunk in kept):
        raise struct.error("no pixels")
    return b"".join([*kept, struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))])


def _strip_tiff(content: bytes, keeps: int) -> bytes:
    # What of a page says where its pixels are, and how they are stored.
    needed = {*range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, *range(320, 326), 338, 339, 347}
    needed |= {*range(529, 533)} | {tag for tag, what in ((274, ORIENTATION), (34675, COLOURS)) if keeps & what}
    order = {b"II": "<", b"MM": ">"}[content[:2]]
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    entries = [content[start + 2 + 12 * number : start + 14 + 12 * number] for number in range(count)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in needed]
    page = b"".join([struct.pack(f"{order}H", len(kept)), *kept, bytes(4)])  # and no page follows
    return content[:start] + page + content[start + len(page) :]


def _strip_webp(content: bytes, keeps: int) -> bytes:
    looks = {b"EXIF": (ORIENTATION, 0x08), b"ICCP": (COLOURS, 0x20)}
    flags = 0x12  # transparency and animation
    kept, position = [b"WEBP"], 12
    while position + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, position)
        length += length % 2
        chunk = content[position : position + 8 + length]
        what, flag = looks.get(kind, (0, 0))
        if kind in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(_whole(chunk, 8 + length))
        elif keeps & what and len(chunk) == 8 + length:
            kept.append(chunk)
            flags |= flag
        position += 8 + length
    # The first chunk says what follows.
    kept = [chunk[:8] + bytes([chunk[8] & flags]) + chunk[9:] if chunk[:4] == b"VP8X" else chunk for chunk in kept]
    return b"RIFF" + struct.pack("<I", sum(map(len, kept))) + b"".join(kept)


def _strip_avif(content: bytes, keeps: int) -> bytes:
    # Its boxes refer to each other by position. What Exif says about the orientation, other boxes say too, and an
    # item of a type that nobody knows is left alone.
    return content.replace(b"Exif", b"Skip", 1 if keeps else -1)


def _whole(chunk: bytes, length: int) -> bytes:
    if len(chunk) < length:
        raise struct.error("cut off")
    return chunk


_FORMATS: dict[bytes, Callable[[bytes, int], bytes]] = {
    rb"\xff\xd8\xff": _strip_jpeg,
    rb"\x89PNG\r\n\x1a\n": _strip_png,
    rb"II\*\0|MM\0\*": _strip_tiff,
    rb"RIFF....WEBP": _strip_webp,
    rb"....ftypavi[fs]": _strip_avif,
}
