"""retrieve.py from the question to the finished folder."""

from __future__ import annotations

import base64
import json

import pytest
from PIL import Image

import retrieve
from custom_diffusion.command_line import save_config
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.data.images import find_class_images
from tests.retrieval_images import drawing, encoded
from tests.retrieval_web import (
    GOOD,
    check_mixture,
    free_port,
    left_out,
    lists,
    run,
    serve_good,
    serve_mixture,
    serving,
    tree,
)


@pytest.fixture
def web():
    yield from serving()


def test_a_reply_with_everything_that_can_be_wrong(web, tmp_path):
    serve_mixture(web)
    result = run(tmp_path, "--class_prompt", "cat", "--url", web.url, "--num_class_images", 20, "--timeout", 1.5)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "real_reg/samples_cat"
    check_mixture(folder, 20)
    with Image.open(folder / "contact_sheet.jpg") as sheet:
        assert sheet.size == (1280, 256)
    assert "clip-retrieval service at" in result.stdout.splitlines()[0]
    # A JPEG of a good size is kept byte for byte.
    assert (tmp_path / lists(folder)[2][0]).read_bytes() == web.pages["/good/0.jpg"]


def test_fewer_than_asked_keeps_them_and_tells_why(web, tmp_path):
    serve_mixture(web)
    result = run(tmp_path, "--class_prompt", "cat", "--url", web.url, "--num_class_images", 30, "--timeout", 1.5)
    assert result.returncode == 1
    check_mixture(tmp_path / "real_reg/samples_cat", GOOD)
    assert result.stderr.splitlines()[-1].startswith(f"error: {GOOD} of the 30 images of 'cat' found")
    assert left_out(result) == {
        "HTTP status 404": 1,
        "no answer": 2,
        "no image": 2,
        "broken image": 1,
        "too many bytes": 1,
        "too slow": 2,
        "too many pixels": 1,
        "too small": 1,
        "the same address again": 1,
        "near-duplicate": 1,
        "too many redirects": 1,
        "no valid http(s) address": 4,
        "inside a private network": 3,
        "neither address nor image": 5,
    }


def test_finished_it_does_nothing_and_says_so(web, tmp_path):
    serve_good(web, 5)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 5, "--url", web.url]
    assert run(tmp_path, *arguments).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cats").rglob("*") if path.is_file()}
    web.requests.clear()
    result = run(tmp_path, *arguments)
    assert result.returncode == 0 and "finished already: 5 images of 'cat'" in result.stdout
    assert not web.requests
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cats").rglob("*") if path.is_file()}
    # Even where no service answers any more.
    assert run(tmp_path, *arguments[:-1], f"http://127.0.0.1:{free_port()}").returncode == 0


def test_training_reads_the_result(web, tmp_path):
    serve_good(web, 5)
    folder = tmp_path / "cats"
    run(tmp_path, "--class_prompt", "cat", "--class_data_dir", folder, "--num_class_images", 5, "--url", web.url)
    concept = ConceptEntry(class_prompt="cat", class_data_dir=str(folder))
    pairs = find_class_images([concept], 5, real_prior=True)
    assert pairs == [(folder / f"images/{row}.jpg", f"cat number {row}") for row in range(5)]


def test_deleted_images_are_replaced_by_others(web, tmp_path):
    serve_good(web, 9)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 5, "--url", web.url]
    run(tmp_path, *arguments)
    (tmp_path / "cats/images/1.jpg").unlink()
    (tmp_path / "cats/images/4.jpg").unlink()
    result = run(tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    captions, _, images = lists(tmp_path / "cats")
    assert captions == [f"cat number {row}" for row in (0, 2, 3, 5, 6)]
    assert images == [f"cats/images/{row}.jpg" for row in (0, 2, 3, 5, 6)]


def test_several_classes_from_a_concepts_file(web, tmp_path):
    for row in range(4):
        web.pages[f"/{row}.jpg"] = encoded(drawing(row))

    def knn(handler):
        first = 2 if json.loads(handler.body)["text"] == "wooden pot" else 0
        handler.json([{"url": f"{web.url}/{row}.jpg", "id": row} for row in (first, first + 1)])

    web.pages["/knn-service"] = knn
    concepts = [
        {"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "class_data_dir": "./real/cat"},
        {"class_prompt": "wooden pot"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(concepts))
    result = run(tmp_path, "--concepts_list", "list.json", "--num_class_images", 2, "--url", web.url)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "real/cat/config.yaml").read_text().startswith("num_class_images: 2\nconcepts_list: list.json\n")
    assert lists(tmp_path / "real/cat")[0] == ["cat", "cat"]
    assert lists(tmp_path / "real_reg/samples_wooden_pot")[1] == [f"{web.url}/2.jpg", f"{web.url}/3.jpg"]


def test_a_run_is_repeated_by_the_file_it_leaves(web, tmp_path):
    serve_good(web, 6)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 4, "--url", web.url]
    arguments += ["--max_size", 260, "--private_host", "one.example", "--private_host", "two.example"]
    arguments += ["--deduplicate", "False", "--contact", "me@example.org"]
    assert run(tmp_path, *arguments).returncode == 0
    whole = tree(tmp_path / "cats")
    (tmp_path / "again").mkdir()
    result = run(tmp_path / "again", "--config", tmp_path / "cats/config.yaml")
    assert result.returncode == 0, result.stderr
    assert tree(tmp_path / "again/cats") == whole
    # In place, where all else was removed, too.
    for name in whole.keys() - {"config.yaml"}:
        (tmp_path / "cats" / name).unlink()
    assert run(tmp_path, "--config", "cats/config.yaml").returncode == 0
    assert tree(tmp_path / "cats") == whole
    result = run(tmp_path, "--config", "cats/config.yaml", "--class_data_dir", "two", "--num_class_images", 2)
    assert result.returncode == 0 and len(lists(tmp_path / "two")[0]) == 2, "the command line wins"


def test_the_file_has_every_flag_but_no_secret(tmp_path):
    told = ["--class_prompt", "cat", "--url", "https://me:pass@localhost:1", "--contact", "me@example.org"]
    for more in ([], ["--private_host", "a", "--private_host", "b", "--deduplicate=False", "--aesthetic_score=3"]):
        args = retrieve.parse_args([*told, *more])
        save_config(args, tmp_path / "config.yaml")
        text = (tmp_path / "config.yaml").read_text()
        assert "pass" not in text and "example.org" not in text
        again = retrieve.parse_args(["--config", str(tmp_path / "config.yaml")])
        different = {name: getattr(again, name) for name, value in vars(args).items() if getattr(again, name) != value}
        config = str(tmp_path / "config.yaml")
        assert different == {"url": "https://localhost:1", "contact": "", "config": config}


def test_a_password_goes_to_the_service_and_nowhere_else(web, tmp_path):
    asked = []

    def knn(handler):
        asked.append(handler.headers["Authorization"])
        entries = [{"id": row, "image": base64.b64encode(encoded(drawing(row))).decode()} for row in range(2)]
        handler.json(entries)

    web.pages["/knn-service"] = knn
    url = web.url.replace("//", "//me:p%40ss@")
    result = run(tmp_path, "--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 2, "--url", url)
    assert result.returncode == 0, result.stderr
    assert set(asked) == {"Basic " + base64.b64encode(b"me:p@ss").decode()}
    everything = b"".join(tree(tmp_path / "cats").values()) + result.stdout.encode() + result.stderr.encode()
    assert b"p%40ss" not in everything and b"p@ss" not in everything


def test_nobody_takes_the_file_for_an_image_or_a_list(web, tmp_path):
    serve_good(web, 5)
    arguments = ["--class_prompt", "cat", "--class_data_dir", "cats", "--num_class_images", 3, "--url", web.url]
    assert run(tmp_path, *arguments).returncode == 0
    saved = (tmp_path / "cats/config.yaml").read_bytes()
    # As a folder that the example has filled, which is told from a foreign one by what is in it.
    (tmp_path / "cats/sources.jsonl").unlink()
    arguments[5] = 4
    assert run(tmp_path, *arguments).returncode == 0
    assert lists(tmp_path / "cats")[0] == [f"cat number {row}" for row in range(4)]
    assert (tmp_path / "cats/config.yaml").read_bytes() == saved.replace(b"images: 3", b"images: 4")
    # As images of one's own.
    result = run(tmp_path, "--class_prompt", "cat", "--path", "cats", "--words", "", "--class_data_dir", "copy")
    assert result.returncode == 1 and "4 of the 200 images" in result.stderr
    # As class images of training.
    concept = ConceptEntry(class_prompt="cat", class_data_dir=str(tmp_path / "cats"))
    assert [path.suffix for path, _ in find_class_images([concept], 4, real_prior=True)] == [".jpg"] * 4


def test_a_run_that_finds_nothing_leaves_no_file(web, tmp_path):
    serve_good(web, 0)
    assert run(tmp_path, "--class_prompt", "cat", "--url", web.url).returncode == 1
    assert not list(tmp_path.iterdir())
