"""Checking images, and telling near-duplicates from others."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from custom_diffusion.retrieval import class_folder
from custom_diffusion.retrieval.checking import check_image
from custom_diffusion.retrieval.fingerprints import Fingerprint, SeenImages, difference
from custom_diffusion.retrieval.sources import Refused
from tests import retrieval_images
from tests.retrieval_images import drawing, encoded, jpeg, variants
from tests.retrieval_web import left_out, lines, lists, run


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_every_mode_becomes_a_jpeg(mode):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(drawing(1).convert("L"), dtype=np.uint16) * 257)
    else:
        image = drawing(1).convert(mode)
    data = encoded(image, "TIFF" if mode in ("CMYK", "LA") else "PNG")
    result = check_image(data, 256, 1024, 1e8)
    with Image.open(io.BytesIO(result.jpeg)) as opened:
        assert opened.format == "JPEG" and opened.size == (320, 300)
    shown = drawing(1).convert(mode if mode == "1" else "L").convert("L")
    with Image.open(io.BytesIO(result.jpeg)) as opened:
        off = np.asarray(opened.convert("L"), dtype=float) - np.asarray(shown, dtype=float)
    assert abs(off).mean() < 12


def test_large_images_become_smaller():
    result = check_image(encoded(drawing(1, (2400, 1800))), 256, 600, 1e8)
    with Image.open(io.BytesIO(result.jpeg)) as opened:
        assert opened.size == (800, 600)
    same = check_image(encoded(drawing(1, (2400, 1800))), 256, 0, 1e8)
    assert same.jpeg == encoded(drawing(1, (2400, 1800)))


def test_nothing_but_formats_of_the_web_is_opened():
    # Pillow would start Ghostscript for this one.
    with pytest.raises(Refused, match="no image"):
        check_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n", 256, 1024, 1e8)


# --- near-duplicates -------------------------------------------------------------------------------

KINDS = {
    "sketches": retrieval_images.sketches,
    "faint sketches": retrieval_images.faint_sketches,
    "shapes": retrieval_images.shapes,
    "shapes of one place, size and colour": retrieval_images.centred_shapes,
    "letters": retrieval_images.letters,
    "textures": retrieval_images.textures,
    "gradients": retrieval_images.gradients,
    "photographs": retrieval_images.photographs,
    "designs": retrieval_images.designs,
}


QUICK = ("sketches", "shapes of one place, size and colour", "photographs")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in KINDS]
)
def kind(request):
    """Images of one kind with their fingerprints."""
    images = KINDS[request.param]()
    return request.param, images, [Fingerprint.of(image) for image in images]


def test_different_images_are_no_near_duplicates(kind):
    name, images, fingerprints = kind
    seen, kept = SeenImages(), 0
    for fingerprint in fingerprints:
        if not seen.has_near_duplicate(fingerprint):
            seen.add(fingerprint)
            kept += 1
    # Two pairs of the designs look the same: a set has the same drawing under two names.
    assert kept == len(images) - (2 if name == "designs" else 0)


def test_saved_again_resized_and_cropped_ones_are_near_duplicates(kind):
    _, images, fingerprints = kind
    for number in range(0, len(images), max(4, len(images) // 5)):
        for name, image in variants(images[number]).items():
            again = Fingerprint.of(image)
            for first, second in ((fingerprints[number], again), (again, fingerprints[number])):
                seen = SeenImages()
                seen.add(first)
                assert seen.has_near_duplicate(second), (number, name, difference(first, second))


def test_a_large_crop_a_mirror_and_another_colour_are_other_images():
    image = retrieval_images.photographs(1)[0]
    red, green, blue = image.split()
    others = [
        retrieval_images.cropped(image, 0.1, 0.1, 0.1, 0.1),
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        Image.merge("RGB", (blue, green, red)),
        Image.eval(image, lambda value: 255 - value),
    ]
    assert all(difference(Fingerprint.of(image), Fingerprint.of(other)) > 1 for other in others)


def test_plain_images_are_the_same_by_their_colour_only():
    marks = [Fingerprint.of(Image.new("RGB", (300, 300), colour)) for colour in ("white", "white", "red", "#fff4ff")]
    assert difference(marks[0], marks[1]) < 0.01
    assert difference(marks[0], marks[2]) > 1 and difference(marks[0], marks[3]) > 1


def test_twenty_drawings_and_their_copies_are_twenty_images(tmp_path):
    (tmp_path / "mine").mkdir()
    drawings = [*retrieval_images.sketches(10), *retrieval_images.shapes(10)]
    for number, image in enumerate(drawings):
        for copy, same in enumerate([image, *list(variants(image).values())[::5]]):
            (tmp_path / f"mine/cat {number:02d}-{copy}.png").write_bytes(encoded(same, "PNG"))
    arguments = ["--class_prompt", "cat", "--path", "mine", "--class_data_dir"]
    result = run(tmp_path, *arguments, "out")
    assert len(lists(tmp_path / "out")[0]) == 20 and left_out(result) == {"near-duplicate": 60}
    result = run(tmp_path, *arguments, "all", "--near_duplicate_tolerance", 0)
    assert len(lists(tmp_path / "all")[0]) == 80 and not left_out(result)


def test_the_tolerance_says_how_much_may_differ(tmp_path):
    image = drawing(0)
    files = {
        "cat1.png": encoded(image, "PNG"),
        "cat2.png": encoded(image, "PNG"),
        "cat3.jpg": encoded(image, quality=60),
        "cat4.png": encoded(retrieval_images.cropped(image, 0.06, 0.06, 0, 0), "PNG"),
        "cat5.png": encoded(drawing(1), "PNG"),
    }
    (tmp_path / "mine").mkdir()
    for name, data in files.items():
        (tmp_path / "mine" / name).write_bytes(data)
    kept = {}
    for tolerance in (0, 1, 4, 1000):
        arguments = ["--class_prompt", "cat", "--path", "mine", "--near_duplicate_tolerance", tolerance]
        run(tmp_path, *arguments, "--class_data_dir", f"out{tolerance}")
        kept[tolerance] = [url[-5] for url in lists(tmp_path / f"out{tolerance}")[1]]
    # Exact copies, the same again, more of the same, and everything.
    assert kept == {0: ["1", "3", "4", "5"], 1: ["1", "4", "5"], 4: ["1", "5"], 1000: ["1"]}


def old_record(number, fingerprint, caption="old"):
    return {"file": f"{number}.jpg", "caption": caption, "url": f"http://x/{number}", "class_prompt": "cat",
            "fingerprint": f"{fingerprint.bits:064x}"}  # fmt: skip


@pytest.mark.parametrize("is_deleted", [False, True])
def test_records_of_older_versions_are_of_use(tmp_path, is_deleted):
    """They have 256 bits and no small version; of images that were deleted, there is nothing else."""
    images = tmp_path / "cats/images"
    images.mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    records = []
    for number in range(3):
        records.append(old_record(number, Fingerprint.of(drawing(number))))
        if not is_deleted:
            (images / f"{number}.jpg").write_bytes(jpeg(number))
        (tmp_path / f"mine/cat{number}.jpg").write_bytes(encoded(drawing(number, (500, 470)), quality=60))
    (tmp_path / "mine/cat3.jpg").write_bytes(jpeg(3))
    (tmp_path / "cats/sources.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    before = lines(tmp_path / "cats/sources.jsonl")
    result = run(tmp_path, "--class_prompt", "cat", "--path", "mine", "--class_data_dir", "cats")
    assert left_out(result) == {"near-duplicate": 3}
    assert lists(tmp_path / "cats")[0] == (["cat"] if is_deleted else ["old", "old", "old", "cat"])
    assert lines(tmp_path / "cats/sources.jsonl")[:3] == before
    # What is written now can be read by the older version: it wants a number in this field.
    assert int(json.loads(lines(tmp_path / "cats/sources.jsonl")[3])["fingerprint"], 16).bit_length() <= 256


def test_drawings_that_were_deleted_by_an_older_version_do_not_keep_others_away(tmp_path):
    sketches = retrieval_images.sketches(8)
    (tmp_path / "cats/images").mkdir(parents=True)
    records = [old_record(number, Fingerprint.of(image)) for number, image in enumerate(sketches[:4])]
    (tmp_path / "cats/sources.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "mine").mkdir()
    for number, image in enumerate(sketches):
        (tmp_path / f"mine/cat{number}.png").write_bytes(encoded(image, "PNG"))
    result = run(tmp_path, "--class_prompt", "cat", "--path", "mine", "--class_data_dir", "cats")
    assert left_out(result) == {"near-duplicate": 4}


def test_a_run_that_continues_knows_what_it_has_seen(tmp_path):
    (tmp_path / "mine").mkdir()
    for number in range(3):
        (tmp_path / f"mine/cat{number}.png").write_bytes(encoded(drawing(number), "PNG"))
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats"]
    run(tmp_path, *arguments, "--path", "mine")
    (tmp_path / "cats/images/1.jpg").unlink()
    (tmp_path / "again").mkdir()
    for number in range(4):
        (tmp_path / f"again/cat{number}.jpg").write_bytes(encoded(drawing(number, (640, 600)), quality=70))
    result = run(tmp_path, *arguments, "--path", "again")
    assert left_out(result) == {"near-duplicate": 3}
    assert len(lists(tmp_path / "cats")[0]) == 3


def test_a_broken_thumbnail_is_a_broken_line(tmp_path):
    record = old_record(0, Fingerprint.of(drawing(0))) | {"thumbnail": "no base64!"}
    (tmp_path / "cats/images").mkdir(parents=True)
    (tmp_path / "cats/sources.jsonl").write_bytes(class_folder.journal_line(record))
    (tmp_path / "mine").mkdir()
    result = run(tmp_path, "--class_prompt", "cat", "--path", "mine", "--class_data_dir", "cats")
    assert result.returncode == 1 and "line 1 is broken" in result.stderr
