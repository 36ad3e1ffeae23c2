"""A user's own images, in a folder or a tar."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import re
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from custom_diffusion.retrieval import archives
from custom_diffusion.retrieval.checking import check_image
from custom_diffusion.retrieval.local_files import LocalFiles
from tests.retrieval_images import drawing, encoded, jpeg
from tests.retrieval_web import left_out, lists, run


def test_a_folder_is_searched_by_the_words_of_captions(tmp_path):
    images = tmp_path / "mine"
    (images / "cats").mkdir(parents=True)
    captions = ["A cat.", "two Cats\non a sofa", "a category", "a dog", None]
    for row, caption in enumerate(captions):
        (images / f"{row}.png").write_bytes(encoded(drawing(row), "PNG"))
        if caption:
            (images / f"{row}.txt").write_text(caption)
    (images / "4.json").write_text(json.dumps({"caption": "the cat 4", "url": "https://example.org/4"}))
    (images / "cats/5.jpg").write_bytes(jpeg(5))
    (images / "cats/broken.jpg").write_bytes(jpeg(6)[:500])
    result = run(tmp_path, "--class_prompt", "photo of a cat", "--path", "mine", "--class_data_dir", "out")
    assert result.returncode == 1
    assert "4 of the 200" in result.stderr and re.search(r"2  caption without the words", result.stdout)
    captions, urls, _ = lists(tmp_path / "out")
    assert captions == ["A cat.", "two Cats on a sofa", "the cat 4", "photo of a cat"]
    assert urls[0].startswith("file:///") and urls[2] == "https://example.org/4"
    result = run(
        tmp_path, "--class_prompt", "animal", "--path", "mine", "--words", "", "--num_class_images", 6,
        "--class_data_dir", "all",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_tars_of_img2dataset_are_read(tmp_path):
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / f"shards/{shard:05d}.tar", "w") as tar:
            for row in range(3):
                key = f"{shard:05d}{row:04d}"
                told = {"caption": "unused", "url": f"https://example.org/{shard}/{row}"}
                for ending, data in (
                    ("jpg", jpeg(10 * shard + row)),
                    ("json", json.dumps(told).encode()),
                    ("txt", f"cat {shard} {row}".encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    result = run(tmp_path, "--class_prompt", "cat", "--path", "shards", "--num_class_images", 6)
    assert result.returncode == 0, result.stderr
    captions, urls, _ = lists(tmp_path / "real_reg/samples_cat")
    assert captions == [f"cat {shard} {row}" for shard in range(2) for row in range(3)]
    assert urls[4] == "https://example.org/1/1"
    data = (tmp_path / "shards/00000.tar").read_bytes()
    (tmp_path / "broken.tar").write_bytes(data[: len(data) // 2])
    result = run(tmp_path, "--class_prompt", "cat", "--path", "broken.tar", "--class_data_dir", "b")
    assert result.returncode == 1 and "broken tar" in result.stderr.splitlines()[-1]


def test_names_in_a_tar_are_no_paths(tmp_path):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        member = tarfile.TarInfo("../../../cat.jpg")
        member.size = len(jpeg(0))
        tar.addfile(member, io.BytesIO(jpeg(0)))
        link = tarfile.TarInfo("cat2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    (tmp_path / "work").mkdir()
    result = run(tmp_path / "work", "--class_prompt", "cat", "--path", "../evil.tar", "--class_data_dir", "out")
    assert result.stderr.splitlines()[-1].startswith("error: 1 of the 200 images of 'cat' found, and there are no more")
    assert [path.name for path in tmp_path.rglob("*.jpg") if path.name != "contact_sheet.jpg"] == ["0.jpg"]


# --- nothing vanishes uncounted --------------------------------------------------------------------

# Odd names of images, each with the caption that belongs to it; None where the words of the path have to do.
SAMPLES = {
    "cat/plain.jpg": "a cat, plain",
    "cat/0001.0.jpg": "a cat, both of 0001",
    "cat/0001.1.jpg": "a cat, both of 0001",
    "cat/b.c.d.png": "a cat with dots",
    "cat/same.jpg": "a cat, same stem",
    "cat/same.png": "a cat, same stem",
    "cat/UPPER.JPG": "a cat in capitals",
    "cat/deep/er/x.jpeg": "a cat, deep",
    "cat/with space and ü.jpg": "a cat with a space",
    "cat/of json.webp": "a cat of JSON",
    "cat/no caption.jpg": None,
    "cat/without_ending": "a cat without an ending",
    "cat/photo.jpg.bak": None,
    "cat/ending.jfif": None,
}

# What is an image and left out, and why.
LEFT_OUT = {
    "cat/.hidden.jpg": "hidden file",
    "cat/._plain.jpg": "hidden file",
    "cat/.cache/thumb.jpg": "hidden file",
    "__MACOSX/cat/plain.jpg": "hidden file",
    "cat/large.bmp": "too many bytes",
    "cat/phone.heic": "image of a kind that is not read",
    "cat/logo.svg": "image of a kind that is not read",
    "cat/dog.jpg": "caption without the words",
    "cat/empty.jpg": "no image",
    "cat/broken.png": "broken image",
    "cat/more.zip": "archive that is not read",
}

TEXTS = {
    "cat/plain.txt": b"\xef\xbb\xbfa cat, plain\r\n",
    "cat/0001.txt": b"a cat, both of 0001",
    "cat/b.c.d.txt": b"a cat with dots",
    "cat/b.c.txt": b"a dog",
    "cat/same.txt": b"a cat, same stem",
    "cat/UPPER.TXT": b"a cat in capitals",
    "cat/deep/er/x.txt": b"a cat, deep",
    "cat/with space and ü.txt": b"a cat with a space",
    "cat/of json.json": json.dumps({"caption": ["a dog", "a cat of JSON"]}).encode(),
    "cat/without_ending.txt": b"a cat without an ending",
    "cat/dog.txt": b"a dog",
    "cat/orphan.txt": b"a cat without an image",
    "cat/0001.cls": b"3",
    "cat/notes.pdf": b"%PDF-1.4",
}


def odd_files():
    """All of these files with their content."""
    files = dict(TEXTS)
    for number, name in enumerate(SAMPLES):
        kind = {"png": "PNG", "webp": "WEBP"}.get(name.rpartition(".")[2], "JPEG")
        files[name] = encoded(drawing(number), kind)
    for number, name in enumerate(LEFT_OUT, 100):
        files[name] = encoded(drawing(number))
    files["cat/large.bmp"] = encoded(drawing(200, (700, 700)), "BMP")
    files["cat/empty.jpg"], files["cat/broken.png"] = b"", encoded(drawing(201), "PNG")[:5000]
    return files


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def add(tar, name, data=b"", kind=tarfile.REGTYPE, linkname=""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, linkname
    tar.addfile(member, io.BytesIO(data))


def write_tar(path, files, mode="w", shuffled=False):
    names = list(files)
    if shuffled:
        random.Random(0).shuffle(names)
    with tarfile.open(path, mode) as tar:
        for name in names:
            add(tar, f"./{name}", files[name])


def retrieve_all(tmp_path, path, *more):
    """Every image of a path with its caption, and what was left out."""
    folder = f"out_{path}".replace(".", "_")
    result = run(
        tmp_path, "--class_prompt", "cat", "--path", path, "--class_data_dir", folder, "--max_megabytes", 1, *more
    )
    captions, _, images = lists(tmp_path / folder)
    found = sorted(((tmp_path / image).read_bytes(), caption) for image, caption in zip(images, captions, strict=True))
    return found, left_out(result)


@pytest.mark.parametrize("form", ["folder", "t.tar", "shuffled.tar", "t.tar.gz", "t.tar.bz2", "t.tar.xz", "nested"])
def test_folder_and_tar_give_the_same_images_and_captions(tmp_path, form):
    files = odd_files()
    if form == "folder":
        write_folder(tmp_path / form, files)
    elif form == "nested":
        (tmp_path / form).mkdir()
        write_tar(tmp_path / "inner.tar", files)
        write_tar(tmp_path / "nested/outer.tar", {"inner.tar": (tmp_path / "inner.tar").read_bytes()})
    else:
        write_tar(tmp_path / form, files, f"w:{form.rpartition('.')[2]}".removesuffix(":tar"), form == "shuffled.tar")
    found, reasons = retrieve_all(tmp_path, form)
    assert sorted(caption for _, caption in found) == sorted(caption or "cat" for caption in SAMPLES.values())
    right = {check_image(files[name], 1, 0, 1e8).jpeg: caption or "cat" for name, caption in SAMPLES.items()}
    assert dict(found) == right
    assert reasons == dict(Counter(LEFT_OUT.values()))
    # All that is an image, and the archive that may hold some, is kept or counted.
    assert len(found) + sum(reasons.values()) == len(SAMPLES) + len(LEFT_OUT)


def test_two_images_of_one_sample_are_both_kept_though_they_share_an_address(tmp_path):
    files = {
        "cat.0.jpg": jpeg(0),
        "cat.1.jpg": jpeg(1),
        "cat.json": json.dumps({"caption": "a cat", "url": "https://example.org/cat"}).encode(),
    }
    write_folder(tmp_path / "mine", files)
    write_tar(tmp_path / "t.tar", files)
    for path in ("mine", "t.tar"):
        assert retrieve_all(tmp_path, path) == (sorted([(jpeg(0), "a cat"), (jpeg(1), "a cat")]), {})
    assert lists(tmp_path / "out_mine")[1] == ["https://example.org/cat", "https://example.org/cat#cat.1.jpg"]


def test_links_are_followed_or_counted(tmp_path):
    write_folder(tmp_path / "mine", {"cat/a.jpg": jpeg(0), "cat/b.jpg": jpeg(1)})
    write_folder(tmp_path / "elsewhere", {"c.jpg": jpeg(2)})
    (tmp_path / "mine/cat/link.jpg").symlink_to("a.jpg")
    (tmp_path / "mine/cat/nowhere.jpg").symlink_to("gone.jpg")
    (tmp_path / "mine/cat/itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "mine/cat_again").symlink_to("cat")
    (tmp_path / "mine/cat_elsewhere").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine/around").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "mine/cat/pipe.jpg")
    found, reasons = retrieve_all(tmp_path, "mine")
    assert [data for data, _ in found] == sorted([jpeg(0), jpeg(1), jpeg(2)])
    assert reasons == {
        "the same address again": 1,
        "link that leads nowhere": 2,
        "no regular file": 1,
        "link to a folder around this one": 1,
    }


def test_links_in_a_tar_lead_to_its_own_files_only(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add(tar, "cat/a.jpg", jpeg(0))
        add(tar, "cat/hard.jpg", kind=tarfile.LNKTYPE, linkname="cat/a.jpg")
        add(tar, "cat/soft.jpg", kind=tarfile.SYMTYPE, linkname="../cat/a.jpg")
        add(tar, "cat/outside.jpg", kind=tarfile.SYMTYPE, linkname="/etc/hostname")
        add(tar, "cat/loop.jpg", kind=tarfile.SYMTYPE, linkname="loop.jpg")
        add(tar, "cat/pipe.jpg", kind=tarfile.FIFOTYPE)
    found, reasons = retrieve_all(tmp_path, "t.tar")
    assert [data for data, _ in found] == [jpeg(0)]
    assert reasons == {"near-duplicate": 2, "link that leads nowhere": 2, "no regular file": 1}


def test_of_one_name_in_a_tar_the_last_file_counts_as_when_it_is_extracted(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add(tar, "cat.jpg", jpeg(0))
        add(tar, "cat.txt", b"an old cat")
        add(tar, "./cat.jpg", jpeg(1))
        add(tar, "cat.txt", b"a new cat")
    assert retrieve_all(tmp_path, "t.tar") == ([(jpeg(1), "a new cat")], {"replaced by a later file of the tar": 1})


def test_tars_behind_each_other_in_one_file_are_all_read(tmp_path):
    write_tar(tmp_path / "a.tar", {"cat1.jpg": jpeg(0)})
    write_tar(tmp_path / "b.tar", {"cat2.jpg": jpeg(1)})
    (tmp_path / "both.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    found, reasons = retrieve_all(tmp_path, "both.tar")
    assert [data for data, _ in found] == sorted([jpeg(0), jpeg(1)]) and not reasons


@pytest.mark.parametrize("damage", ["cut short", "a header", "no tar", "compressed and cut short", "empty"])
def test_a_broken_tar_in_a_folder_is_counted_and_the_rest_is_read(tmp_path, damage):
    (tmp_path / "mine").mkdir()
    write_folder(tmp_path / "mine", {"cat_a.jpg": jpeg(0), "cat_z.jpg": jpeg(1)})
    write_tar(tmp_path / "whole.tar", {"cat1.jpg": jpeg(2), "cat2.jpg": jpeg(3)})
    data = bytearray((tmp_path / "whole.tar").read_bytes())
    second = data.index(b"./cat2.jpg")
    kept = [jpeg(0), jpeg(1)]
    if damage == "cut short":
        data, kept = data[: second + 600], [*kept, jpeg(2)]
    elif damage == "a header":
        data[second : second + 512] = b"x" * 512
        kept.append(jpeg(2))
    elif damage == "compressed and cut short":
        data = gzip.compress(data)[:-9000]
    else:
        data = b"this is no tar at all " * 100 if damage == "no tar" else b""
    (tmp_path / "mine/cats.tar").write_bytes(data)
    result = run(tmp_path, "--class_prompt", "cat", "--path", "mine", "--class_data_dir", "out")
    _, _, images = lists(tmp_path / "out")
    found = {(tmp_path / image).read_bytes() for image in images}
    assert found >= set(kept) and len(found) <= 4
    assert left_out(result)["broken tar"] == 1 and "mine/cats.tar is a broken tar" in result.stderr
    # Alone, it is what is wrong.
    result = run(tmp_path, "--class_prompt", "cat", "--path", "mine/cats.tar", "--class_data_dir", "alone")
    assert result.returncode == 1 and "is a broken tar" in result.stderr.splitlines()[-1]


def test_no_room_to_unpack_is_one_clear_line(tmp_path, monkeypatch):
    write_tar(tmp_path / "t.tar.gz", {"cat.jpg": jpeg(0)}, "w:gz")
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    result = run(tmp_path, "--class_prompt", "cat", "--path", "t.tar.gz")
    assert result.returncode == 1 and "there is no room" in result.stderr.splitlines()[-1]
    # What it says to do instead.
    (tmp_path / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "t.tar.gz", "-C", tmp_path / "unpacked"], check=True)
    assert run(tmp_path, "--class_prompt", "cat", "--path", "unpacked", "--num_class_images", 1).returncode == 0


def test_what_cannot_be_read_is_counted(tmp_path, monkeypatch):
    write_folder(tmp_path / "mine", {"cat1.jpg": jpeg(0), "cat2.jpg": jpeg(1), "locked/cat3.jpg": jpeg(2)})
    opened, listed = Path.open, Path.iterdir

    def refuse(path, *arguments):
        if path.name in ("cat1.jpg", "locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return (opened if arguments else listed)(path, *arguments)

    # Whoever runs the tests as root may read everything.
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "iterdir", refuse)
    found = list((source := LocalFiles(str(tmp_path / "mine"))).candidates("cat", 9))
    assert [candidate.image for candidate in found] == [jpeg(1)]
    assert source.left_out == {"cannot be read": 1, "folder that cannot be read": 1}


def test_images_that_were_deleted_are_counted_when_they_are_found_again(tmp_path):
    write_folder(tmp_path / "mine", {f"cat{row}.jpg": jpeg(row) for row in range(3)})
    retrieve_all(tmp_path, "mine")
    (tmp_path / "out_mine/images/1.jpg").unlink()
    found, reasons = retrieve_all(tmp_path, "mine")
    assert len(found) == 2 and reasons == {"deleted from images/ before": 1}


@pytest.mark.parametrize("nested", [False, True])
def test_a_tar_whose_headers_are_no_numbers_is_broken_and_no_more(tmp_path, nested):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "0.jpg", jpeg(0))
        sparse = tarfile.TarInfo("1.jpg")
        sparse.pax_headers = {"GNU.sparse.map": "x", "GNU.sparse.size": "10"}
        archive.addfile(sparse)
    name = "mine/x.tar" if nested else "x.tar"
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(file.getvalue())
    path = "mine" if nested else "x.tar"
    result = run(tmp_path, "--class_prompt", "cat", "--path", path, "--num_class_images", 2, "--words", "")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "x.tar" in result.stderr and "is a broken tar" in result.stderr
    assert len(lists(tmp_path / "real_reg/samples_cat")[0]) == 1
