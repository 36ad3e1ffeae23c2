"""The folder of a class: what is taken over, what is left alone, and its lists."""

from __future__ import annotations

import pytest

from custom_diffusion.images import load_image
from tests.retrieval_images import jpeg
from tests.retrieval_web import lists, run, serve_good, serving


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
