"""Image files: whatever is in them, their pixels are read as people see them."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from custom_diffusion.images import contact_sheet, load_image, readable_images
from custom_diffusion.report.thumbnails import Thumbnails
from custom_diffusion.retrieval.checking import check_image
from tests import colour_profiles as profiles

# pytest shows what images.py silences.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


# --- as people see them ---------------------------------------------------------------------------


def test_phone_photographs_come_out_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), RED)
    image.paste(BLUE, (0, 0, 10, 10))  # blue left, red right
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "phone.png", exif=exif)
    upright = load_image(tmp_path / "phone.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == BLUE
    assert upright.getpixel((5, 17)) == RED


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "logo.png")
    assert load_image(tmp_path / "logo.png").getpixel((1, 1)) == (0, 0, 0)
    assert load_image(tmp_path / "logo.png").getpixel((6, 1)) == WHITE


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), WHITE).convert(mode).save(tmp_path / "image.tiff")
    image = load_image(tmp_path / "image.tiff")
    assert (image.mode, image.getpixel((3, 3))) == ("RGB", WHITE)


def test_sixteen_bit_greys_keep_their_brightness(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "scan.png")
    read = np.asarray(load_image(tmp_path / "scan.png"))[..., 0].ravel().astype(int)
    assert np.abs(read - np.arange(256)).max() <= 1


# --- colours -------------------------------------------------------------------------------------

DISPLAY_P3 = profiles.rgb_profile(profiles.DISPLAY_P3, profiles.srgb_curve())
PROFILES = {
    "RGB": [DISPLAY_P3, profiles.rgb_profile(profiles.ADOBE_RGB, profiles.gamma_curve(2.2))],
    "L": [profiles.grey_profile(1.0), profiles.grey_profile(2.2)],
    "CMYK": [profiles.cmyk_profile()],
}


KINDS = {"RGB": "PNG TIFF WEBP JPEG AVIF", "L": "PNG JPEG TIFF", "CMYK": "TIFF JPEG"}


def all_colours(mode: str) -> Image.Image:
    """An image of 64 x 64 pixels with colours from all over the space."""
    channels = Image.new(mode, (1, 1)).getbands()
    values = np.random.default_rng(0).integers(256, size=(64, 64, len(channels)), dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(values[..., number]) for number in range(len(channels))])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def encoded(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


def as_viewer_shows(image: Image.Image, profile: bytes) -> np.ndarray:
    """What littleCMS makes of it."""
    srgb = ImageCms.createProfile("sRGB")
    return pixels(ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB"))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for mode, kinds in KINDS.items() for kind in kinds.split()],
)
def test_colours_of_a_profile_are_shown(mode: str, kind: str) -> None:
    image = all_colours(mode)
    for profile in PROFILES[mode]:
        file = encoded(image, kind, icc_profile=profile, lossless=True)
        with Image.open(file) as stored:
            expected = as_viewer_shows(stored.convert(mode), profile)
            assert np.abs(expected - pixels(stored.convert("RGB"))).max() > 8, "the profile makes a difference"
        read = load_image(file)
        assert np.abs(pixels(read) - expected).max() <= 2
        # Saved again, it must not be converted twice.
        assert np.array_equal(pixels(load_image(encoded(read, "PNG"))), pixels(read))


def test_display_p3_by_hand() -> None:
    """Not by littleCMS: through XYZ, with the curve and the primaries of the two standards."""
    image = all_colours("RGB")
    light = pixels(image) / 255
    light = np.where(light <= 0.04045, light / 12.92, ((light + 0.055) / 1.055) ** 2.4)
    light = light @ np.array(profiles.DISPLAY_P3) @ np.linalg.inv(np.array(profiles.SRGB))
    light = light.clip(0, 1)
    expected = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(pixels(load_image(encoded(image, "PNG", icc_profile=DISPLAY_P3))) - expected).max() <= 2


def test_transparency_and_palettes_keep_their_colours() -> None:
    image = all_colours("RGB")
    expected = as_viewer_shows(image, DISPLAY_P3)
    image.putalpha(Image.fromarray(np.tile(np.uint8([0, 255]), (64, 32))))
    read = pixels(load_image(encoded(image, "PNG", icc_profile=DISPLAY_P3)))
    assert np.array_equal(read[:, 1::2], expected[:, 1::2])
    assert (read[:, ::2] == 255).all(), "what is transparent is white"

    palette = all_colours("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    expected = as_viewer_shows(palette.convert("RGB"), DISPLAY_P3)
    assert np.array_equal(pixels(load_image(encoded(palette, "PNG", icc_profile=DISPLAY_P3))), expected)
    palette.info["transparency"] = 7
    seen = np.asarray(palette) != 7
    assert np.array_equal(pixels(load_image(encoded(palette, "PNG", icc_profile=DISPLAY_P3)))[seen], expected[seen])


def test_greys_of_sixteen_bits_and_greys_with_transparency() -> None:
    profile = profiles.grey_profile(1.0)
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    expected = as_viewer_shows(ramp, profile)
    sixteen = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
    for image in (sixteen, Image.merge("LA", [ramp, Image.new("L", ramp.size, 255)])):
        assert np.abs(pixels(load_image(encoded(image, "PNG", icc_profile=profile))) - expected).max() <= 2


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        profiles.rgb_profile(profiles.SRGB, profiles.srgb_curve()),
        b"no profile",
        DISPLAY_P3[:300],
        DISPLAY_P3[:128],
        DISPLAY_P3.replace(b"rXYZ", b"xXYZ"),
        DISPLAY_P3.replace(b"mntrRGB ", b"mntr\xff\xff\xff\xff"),
        profiles.cmyk_profile(),
        profiles.grey_profile(1.0),
        bytes(5000),
    ],
)
def test_srgb_and_profiles_that_say_nothing_change_no_bit(profile: bytes) -> None:
    for mode in ("RGB", "RGBA", "P"):
        image = all_colours("RGB").convert(mode)
        assert (
            load_image(encoded(image, "PNG", icc_profile=profile)).tobytes()
            == load_image(encoded(image, "PNG")).tobytes()
        )


# --- metadata ------------------------------------------------------------------------------------

UPRIGHT = Image.fromarray(np.stack([np.add.outer(np.arange(16) * 8, np.arange(24) * 5)] * 3, axis=-1).astype(np.uint8))
TURNED = UPRIGHT.transpose(Image.Transpose.ROTATE_90)
IN_ANY_DIRECTION = [TURNED, *(TURNED.transpose(way) for way in Image.Transpose)]


def exif(orientation: int | None = 6) -> bytes:
    """What a phone writes: 6 says "show it rotated by 90 degrees clockwise"."""
    tags = Image.Exif()
    for tag, value in {0x10F: "Maker", 0x110: "Model", 0x112: orientation, 0x11A: 72.0, 0x132: "2020:01:01"}.items():
        if value is not None:
            tags[tag] = value
    tags.get_ifd(0x8769).update({0x9000: b"0230", 0x829A: 0.01, 0x9286: b"ASCII\0\0\0hi", 0xA002: 24})
    tags.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return tags.tobytes()


def photograph(kind: str, described_by: bytes | None = None) -> bytes:
    """`TURNED`, as a phone stores it."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a cat")
    text.add_text("Comment", "a cat " * 20, zip=True)
    text.add_itxt("Description", "été", "fr", "x", zip=True)
    options = {"PNG": {"pnginfo": text}, "JPEG": {"comment": b"a cat", "xmp": b"<x/>"}, "WEBP": {"lossless": True}}
    options |= {"MPO": {"save_all": True, "append_images": [TURNED]}}
    return encoded(TURNED, kind, exif=described_by or exif(), quality=95, **options.get(kind, {})).getvalue()


def shows(image: Image.Image, *views: Image.Image) -> bool:
    """Whether it is one of these, but for what lossy formats change."""
    return any(view.size == image.size and np.abs(pixels(view) - pixels(image)).max() <= 12 for view in views)


def beside_the_pixels(kind: str, content: bytes) -> list[int]:
    """The places of all bytes of a file that are but metadata."""
    spans: list[tuple[int, int]] = []
    if kind == "PNG":
        spans = [(start, end) for name, start, end in png_chunks(content) if name.decode()[0].islower()]
    elif kind in ("JPEG", "MPO"):
        position = 2
        while content[position + 1] != 0xDA:
            end = position + 2 + struct.unpack_from(">H", content, position + 2)[0]
            spans += [(position + 4, end)] if content[position + 1] in (0xE1, 0xE2, 0xFE) else []
            position = end
    elif kind == "TIFF":
        (start,) = struct.unpack_from("<I", content, 4)
        entries = [start + 2 + 12 * number for number in range(struct.unpack_from("<H", content, start)[0])]
        needed = (*range(256, 260), 262, 273, *range(277, 280), 284)
        spans = [(at + 2, at + 12) for at in entries if struct.unpack_from("<H", content, at)[0] not in needed]
    else:
        start = content.index(exif()[6:14])
        spans = [(start, start + len(exif(None)) - 6)]  # an AVIF's orientation stands elsewhere
    return [place for start, end in spans for place in range(start, end)]


def png_chunks(content: bytes) -> list[tuple[bytes, int, int]]:
    """Name, first byte and last + 1 of all chunks."""
    found, position = [], 8
    while position < len(content):
        length, name = struct.unpack_from(">I4s", content, position)
        found.append((name, position + 8, position + 8 + length))
        position += 12 + length
    return found


def with_checksums(content: bytes) -> bytes:
    """A PNG that nobody can tell from one that was written so."""
    chunks = [(name, content[start:end]) for name, start, end in png_chunks(content)]
    return content[:8] + b"".join(png_chunk(name, data) for name, data in chunks)


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"])
def test_broken_metadata_costs_no_image(kind: str) -> None:
    whole, chance = photograph(kind), random.Random(1)
    assert shows(load_image(io.BytesIO(whole)), UPRIGHT)
    places, upright = beside_the_pixels(kind, whole), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.choice(places)] = chance.choice([0, 1, 255, chance.randrange(256)])
        image = load_image(io.BytesIO(with_checksums(damaged) if kind == "PNG" else damaged))
        assert shows(image, *IN_ANY_DIRECTION)
        upright += shows(image, UPRIGHT)
    assert upright > 90, "where the orientation can be read, it is followed"


def directory(*entries: tuple[int, int, int, bytes], count: int | None = None, behind: bytes = bytes(4)) -> bytes:
    """An Exif block of these entries (tag, type, count, value or its place)."""
    packed = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries) if count is None else count) + packed + behind


SIX = (0x112, 3, 1, b"\0\x06")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        directory((0x10F, 3, 1, b"\0\x09"), SIX),  # a number where text should be
        directory((0x10F, 5, 1, b"\0\0\0\x08"), SIX),
        directory(SIX, (0x11A, 2, 3, b"72"), (0x128, 2, 2, b"x")),  # text where numbers should be
        directory(SIX, (0x11A, 7, 4, b"\xff\xff\xff\xff")),
        directory((0x10F, 2, 0xFFFFFFFF, b"\0\0\0\x08"), SIX),  # huge, and nowhere
        directory((0x10F, 2, 5, b"\xff\xff\xff\xff"), SIX),
        directory((0x10F, 99, 5, b"\0\0\0\x08"), SIX),
        directory(SIX, (0x8769, 4, 1, b"\0\0\0\x08"), (0x8825, 4, 1, b"\xff\0\0\0")),  # around in a circle
        directory(SIX, count=2, behind=b""),  # cut off
        directory(SIX, behind=b"\0\0\0\x08"),
        directory((0x112, 4, 1, b"\0\0\0\x06")),  # of another type than it should be
        directory((0x112, 1, 1, b"\x06")),
        directory((0x112, 7, 1, b"\x06")),
        directory((0x112, 8, 1, b"\0\x06")),
        directory((0x112, 2, 2, b"6\0")),
        directory((0x112, 3, 2, b"\0\x06\0\0")),
    ],
)
def test_an_orientation_is_followed_whatever_stands_beside_it(block: bytes, kind: str) -> None:
    assert shows(load_image(io.BytesIO(photograph(kind, block))), UPRIGHT)


@pytest.mark.parametrize(
    "block", [b"", b"Exif\0\0", directory((0x112, 3, 1, b"\0\x09")), directory((0x112, 2, 4, b"six"))]
)
def test_without_an_orientation_that_can_be_read_an_image_stays_as_it_is(block: bytes) -> None:
    assert shows(load_image(io.BytesIO(photograph("JPEG", block or b"MM"))), TURNED)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"a\0\x07" + zlib.compress(b"x")),  # an unknown way to compress
        png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))),  # more than Pillow takes
        png_chunk(b"iTXt", b"a\0\x01\0\0\0" + zlib.compress(bytes(2**21))),
        png_chunk(b"tEXt", b"transparency\0none"),
        png_chunk(b"tEXt", b"icc_profile\0none"),
        png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n8\nxyz"),
        png_chunk(b"gAMA", b"\0"),
        png_chunk(b"sRGB", b""),
        png_chunk(b"pHYs", b"\0\0"),
        png_chunk(b"cHRM", b"\0"),
        png_chunk(b"iCCP", b"a\0\x07"),
        png_chunk(b"iCCP", b"a"),
        png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**21))),
        png_chunk(b"acTL", b"\0"),
        png_chunk(b"tEXt", b"a\0b")[:-4] + b"junk",  # a wrong checksum
        png_chunk(b"teXt", b"a\0b")[:-4] + b"junk",
    ],
)
def test_a_wrong_chunk_costs_no_image(chunk: bytes) -> None:
    whole = photograph("PNG")
    pixels_at = whole.index(b"IDAT") - 4
    end_at = whole.index(b"IEND") - 4
    for at in (pixels_at, end_at):
        assert shows(load_image(io.BytesIO(whole[:at] + chunk + whole[at:])), UPRIGHT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_retrieval_takes_them_too(kind: str) -> None:
    whole, chance = photograph(kind), random.Random(2)
    places = beside_the_pixels(kind, whole)
    for number in range(40):
        damaged = bytearray(whole)
        for place in chance.sample(places, 3):
            damaged[place] ^= chance.randrange(1, 256)
        # Every other PNG has wrong checksums.
        content = with_checksums(damaged) if kind == "PNG" and number % 2 else bytes(damaged)
        checked = check_image(content, min_size=16, max_size=16 + number % 2, max_pixels=1e6)
        assert shows(load_image(io.BytesIO(checked.jpeg)), *IN_ANY_DIRECTION)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_cut_off_behind_the_pixels_costs_no_image_and_within_them_it_does(kind: str) -> None:
    whole = photograph(kind)
    behind = whole.index(b"EXIF") if kind == "WEBP" else whole.index(b"IDAT") + 4 + 4 + png_length(whole)
    for end in range(behind, len(whole)):
        assert shows(load_image(io.BytesIO(whole[:end])), *IN_ANY_DIRECTION)
    for end in range(8, behind - 16, 7):
        with pytest.raises(OSError, match=r".{10,}"):
            load_image(io.BytesIO(whole[:end]))


def png_length(content: bytes) -> int:
    (length,) = (end - start for name, start, end in png_chunks(content) if name == b"IDAT")
    return length


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff", b"II*\0", b"RIFF\0\0\0\0WEBP", b"\0\0\0\x1cftypavif", bytes(50)]
)
def test_what_is_no_image_is_one_error(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^[^\n]{10,}$"):
        load_image(io.BytesIO(content))
    (tmp_path / "image.png").write_bytes(content)
    assert readable_images([tmp_path / "image.png", tmp_path / "none.png", tmp_path])[0] == []


# --- what is no image ----------------------------------------------------------------------------


def test_postscript_is_never_handed_to_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise AssertionError("Ghostscript would run a stranger's program")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    assert readable_images([tmp_path / "a.jpg"]) == ([], [tmp_path / "a.jpg"])
    with pytest.raises(OSError):
        load_image(tmp_path / "a.jpg")


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    paths = [tmp_path / "pipe.jpg", tmp_path / "zeros.jpg"]
    assert readable_images(paths) == ([], paths)


def test_of_a_large_file_that_is_no_image_only_the_beginning_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = tmp_path / "film.mp4"
    with film.open("wb") as file:
        file.write(b"\0\0\0\x20ftypisom")
        file.truncate(2**40)  # a hole that takes no room
    assert readable_images([film]) == ([], [film])


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000)])
def test_however_long_an_image_is_it_keeps_a_pixel(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    Image.new("RGB", size, "red").save(path)
    assert Thumbnails(10**6).element(path, "long").startswith("<img")
    assert contact_sheet([[path]]).size == (256, 256)
