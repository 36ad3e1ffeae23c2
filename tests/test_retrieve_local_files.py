"""A user's own images, in a folder or a tar."""

from __future__ import annotations

import io
import json
import re
import tarfile

from tests.retrieval_images import drawing, encoded, jpeg
from tests.retrieval_web import lists, run


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
