"""The folder of a class: what is taken over, what is left alone, and its lists."""

from __future__ import annotations

import subprocess
import sys

import pytest

from custom_diffusion.data.class_lists import read_lists
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.data.images import find_class_images
from custom_diffusion.errors import UserError
from custom_diffusion.images import load_image
from tests.retrieval_images import jpeg
from tests.retrieval_web import SCRIPT, lists, run, serve_good, serving


@pytest.fixture
def web():
    yield from serving()


def test_what_the_example_has_retrieved_is_taken_over(web, tmp_path):
    serve_good(web, 8)
    folder = tmp_path / "cats"
    (folder / "images").mkdir(parents=True)
    for row in range(3):
        (folder / f"images/{row}.jpg").write_bytes(jpeg(row) if row != 1 else b"<html>not found</html>")
    (folder / "images/3.jpg").write_bytes(b"on no list")
    (folder / "caption.txt").write_text("old 0\nold 1\nold 2\n")
    (folder / "urls.txt").write_text("".join(f"{web.url}/good/{row}.jpg\n" for row in range(3)))
    (folder / "images.txt").write_text("".join(f"elsewhere/cats/images/{row}.jpg\n" for row in range(3)))
    run(tmp_path, "--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 5, "--url", web.url)
    captions, _, images = lists(folder)
    assert captions == ["old 0", "old 2", "cat number 1", "cat number 3", "cat number 4"]
    assert (folder / "images/1.jpg").read_bytes() == b"<html>not found</html>"
    assert (folder / "images/3.jpg").read_bytes() == b"on no list"
    assert all(load_image(tmp_path / image) for image in images)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images/a.jpg": b"mine"}, "missing or do not belong together"),
        ({"images.txt": b"a\nb\n", "urls.txt": b"a\n", "caption.txt": b"a\n"}, "missing or do not belong together"),
        ({"sources.jsonl": b'{"file": "../../x.jpg"}\n'}, "line 1 is broken"),
        ({"images": b"a file"}, "cannot be written to"),
        ({"config.yaml": b"class_prompt: cat  # mine\n"}, "'cats/config.yaml' would be replaced"),
        (
            {"sources.jsonl": b'{"file":"0.jpg","caption":"","url":"","class_prompt":"dog","fingerprint":"0"}\n'},
            "holds images of 'dog'",
        ),
    ],
)
def test_foreign_folders_are_left_alone(web, tmp_path, content, message):
    serve_good(web, 3)
    folder = tmp_path / "cats"
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    result = run(tmp_path, "--class_prompt", "cat", "--class_data_dir", "cats", "--url", web.url)
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert {name: (folder / name).read_bytes() for name in content} == content
    assert not web.requests


# --- lists that an editor has saved ----------------------------------------------------------------

BOM = b"\xef\xbb\xbf"
ODD_CAPTIONS = ["cat one\u2028still one", "cat\x0btwo", "", "cat\x85 four\x1c", "the last cat"]


def write_lists(folder, change):
    """Lists of images as diffusers' example leaves them, changed by an editor."""
    (folder / "images").mkdir(parents=True)
    for row in range(5):
        (folder / f"images/{row}.jpg").write_bytes(jpeg(row))
    content = {
        "caption.txt": ODD_CAPTIONS,
        "urls.txt": [f"http://x/{row}" for row in range(5)],
        "images.txt": [f"cats/images/{row}.jpg" for row in range(5)],
    }
    for name, rows in content.items():
        (folder / name).write_bytes(change("".join(f"{row}\n" for row in rows).encode()))


CHANGES = {
    "nothing": lambda data: data,
    "byte order mark": lambda data: BOM + data,
    "Windows": lambda data: BOM + data.replace(b"\n", b"\r\n"),
    "no last line break": lambda data: data[:-1],
    "one more line break": lambda data: data + b"\n",
}


@pytest.mark.parametrize("change", CHANGES)
def test_captions_stay_with_their_images_whatever_an_editor_does(tmp_path, change):
    write_lists(tmp_path / "cats", CHANGES[change])
    pairs = read_lists(tmp_path / "cats", "advice")
    assert pairs == [(tmp_path / f"cats/images/{row}.jpg", caption) for row, caption in enumerate(ODD_CAPTIONS)]
    concept = ConceptEntry(class_prompt="cat", class_data_dir=str(tmp_path / "cats"))
    assert find_class_images([concept], 5, real_prior=True) == pairs
    # As a folder of the example that is taken over: each caption on one line, and none is empty.
    result = run(tmp_path, "--class_prompt", "cat", "--path", "cats/images", "--class_data_dir", "cats",
                 "--num_class_images", 5)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert lists(tmp_path / "cats")[0] == ["cat one still one", "cat two", "cat", "cat four", "the last cat"]


@pytest.mark.parametrize("change", CHANGES)
def test_the_records_stay_what_they_are_whatever_an_editor_does(tmp_path, web, change):
    serve_good(web, 4)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--url", web.url, "--num_class_images"]
    run(tmp_path, *arguments, 3)
    path = tmp_path / "cats/sources.jsonl"
    path.write_bytes(CHANGES[change](path.read_bytes()))
    result = run(tmp_path, *arguments, 4)
    assert result.returncode == 0, result.stderr
    assert lists(tmp_path / "cats")[0] == [f"cat number {row}" for row in range(4)]


def test_only_blank_lines_at_the_end_are_forgiven(tmp_path):
    write_lists(tmp_path / "cats", lambda data: data)
    path = tmp_path / "cats/caption.txt"
    path.write_bytes(path.read_bytes() + b"one more\n")
    with pytest.raises(UserError, match=r"images\.txt has 5 lines and caption\.txt has 6: .*; the advice"):
        read_lists(tmp_path / "cats", "the advice")
    path.write_bytes(b"\xc3\x28")  # no UTF-8
    with pytest.raises(UserError, match="cannot be read; the advice"):
        read_lists(tmp_path / "cats", "the advice")


def test_reading_the_lists_needs_no_torch():
    code = "import sys, custom_diffusion.data.class_lists as lists; print('torch' in sys.modules, bool(lists))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent, check=True)
    assert done.stdout == "False True\n"


def test_captions_that_someone_has_edited_stay(tmp_path, web):
    serve_good(web, 4)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--url", web.url, "--num_class_images"]
    run(tmp_path, *arguments, 3)
    captions = (tmp_path / "cats/caption.txt").read_text().splitlines()
    captions[1] = "my own words about a cat"
    (tmp_path / "cats/caption.txt").write_text("\n".join(captions) + "\n")
    for count in (3, 4):  # nothing to do, and one more
        assert run(tmp_path, *arguments, count).returncode == 0
        assert lists(tmp_path / "cats")[0][:3] == captions


def test_hidden_files_of_others_are_left_alone(tmp_path, web):
    serve_good(web, 1)
    (tmp_path / "cats/images").mkdir(parents=True)
    others = [tmp_path / "cats/.editor.tmp", tmp_path / "cats/images/.download.part"]
    for path in others:
        path.write_text("mine")
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--url", web.url, "--num_class_images", 1]
    run(tmp_path, *arguments)
    assert all(path.read_text() == "mine" for path in others)


def test_a_run_that_was_killed_between_two_lists_mixes_up_no_captions(tmp_path, web):
    serve_good(web, 4)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--url", web.url, "--num_class_images"]
    run(tmp_path, *arguments, 3)
    before = {name: (tmp_path / "cats" / name).read_bytes() for name in ("images.txt", "urls.txt")}
    (tmp_path / "cats/images/1.jpg").unlink()
    run(tmp_path, *arguments, 3)
    captions = lists(tmp_path / "cats")[0]
    captions[1] = "my own words"
    (tmp_path / "cats/caption.txt").write_text("\n".join(captions) + "\n")
    for name, content in before.items():
        (tmp_path / "cats" / name).write_bytes(content)
    assert run(tmp_path, *arguments, 3).returncode == 0
    found, _, names = lists(tmp_path / "cats")
    assert [name.split("/")[-1] for name in names] == ["0.jpg", "2.jpg", "3.jpg"]
    assert found == captions


def test_a_record_that_was_taken_out_is_no_reason_to_refuse(tmp_path, web):
    """As the message about a broken line of sources.jsonl advises."""
    serve_good(web, 4)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--url", web.url, "--num_class_images"]
    run(tmp_path, *arguments, 3)
    captions = lists(tmp_path / "cats")[0]
    rows = (tmp_path / "cats/sources.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cats/sources.jsonl").write_text(rows[0] + rows[2])
    assert run(tmp_path, *arguments, 2).returncode == 0
    assert lists(tmp_path / "cats")[0] == [captions[0], captions[2]]


@pytest.mark.parametrize("change", ["a line less", "Latin-1"])
def test_edited_captions_that_belong_to_no_image_are_not_lost(tmp_path, web, change):
    serve_good(web, 3)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--url", web.url, "--num_class_images", 3]
    run(tmp_path, *arguments)
    mine = (
        b"my own words\nand more\n" if change == "a line less" else "mein K\xe4tzchen\nzwei\ndrei\n".encode("latin-1")
    )
    (tmp_path / "cats/caption.txt").write_bytes(mine)
    result = run(tmp_path, *arguments)
    wanted = "holds captions of your own" if change == "a line less" else "is not UTF-8"
    assert result.returncode == 1 and wanted in result.stderr.splitlines()[-1]
    assert (tmp_path / "cats/caption.txt").read_bytes() == mine
