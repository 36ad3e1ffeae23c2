"""Datasets of the Hugging Face Hub."""

from __future__ import annotations

import datetime
import re
import shlex
import sys

import pytest

from custom_diffusion.data.hub_datasets import dataset_folder, find_caption_column, find_image_column
from custom_diffusion.errors import UserError
from tests.retrieval_images import jpeg
from tests.retrieval_web import left_out, lists, run, serving

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def web():
    yield from serving()


def test_a_dataset_is_streamed(tmp_path):
    captions = ["a cat", "a dog", "cats"]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"image": {"bytes": jpeg(row), "path": None}, "text": text} for row, text in enumerate(captions)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "set/train.parquet")
    arguments = ["--class_prompt", "cat", "--source", "dataset", "--path", "set", "--num_class_images", 2]
    environment = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = run(tmp_path, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    captions, urls, images = lists(tmp_path / "real_reg/samples_cat")
    assert captions == ["a cat", "cats"] and urls[1] == "set#train/2"
    assert (tmp_path / images[1]).read_bytes() == jpeg(2)
    result = run(tmp_path, *arguments, "--caption_column", "words", "--class_data_dir", "x", **environment)
    assert result.returncode == 1 and "has the columns image, text, and no 'words'" in result.stderr.splitlines()[-1]


def write_dataset(folder, features, rows):
    folder.mkdir(exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(folder / "train.parquet")


def retrieve_dataset(tmp_path, monkeypatch, features, rows, *more):
    """The captions of the images that are kept, and what was left out."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    write_dataset(tmp_path / "set", features, rows)
    result = run(
        tmp_path, "--class_prompt", "cat", "--source", "dataset", "--path", "set", "--class_data_dir", "out", *more
    )
    kept = lists(tmp_path / "out")[0] if (tmp_path / "out/caption.txt").exists() else []
    assert "cannot be read" not in result.stderr.splitlines()[-1], result.stderr
    return kept, left_out(result)


def image(row):
    return {"bytes": jpeg(row), "path": None}


TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")
LABEL = datasets.ClassLabel(names=["dog", "tabby cat"])

# The type of the caption column; its values; the captions of those that match "cat"; and what was left out.
CAPTIONS = {
    "null": (TEXT, ["a cat", None, "", "a dog"], ["a cat"], {"no caption": 2, "caption without the words": 1}),
    "number": (NUMBER, [7, None], [], {"caption without the words": 1, "no caption": 1}),
    "list": (datasets.List(TEXT), [["a dog", "a cat"], ["a dog"], [], None, [None, "cats"]], ["a cat", "cats"],
             {"caption without the words": 1, "no caption": 2}),
    "list of lists": (datasets.List(datasets.List(TEXT)), [[["a dog"], ["a cat"]], [[]]], ["a cat"], {"no caption": 1}),
    "label": (LABEL, [0, 1, None, -1], ["tabby cat"], {"caption without the words": 1, "no caption": 2}),
    "labels": (datasets.List(LABEL), [[0, 1], [0]], ["tabby cat"], {"caption without the words": 1}),
    "dictionary": ({"raw": TEXT, "tokens": datasets.List(TEXT)},
                   [{"raw": "A cat sits.", "tokens": ["a", "cat", "sits"]}, {"raw": None, "tokens": None}],
                   ["A cat sits."], {"no caption": 1}),
    "languages": ({"de": TEXT, "en": TEXT}, [{"de": "eine Katze", "en": "a cat"}], ["a cat"], {}),
    "list of dictionaries": (datasets.List({"caption": TEXT, "id": NUMBER}),
                             [[{"caption": "a dog", "id": 1}, {"caption": "a cat", "id": 2}]], ["a cat"], {}),
    "bytes": (datasets.Value("binary"), [b"a cat", b"\xff"], ["a cat"], {"caption without the words": 1}),
    "truth": (datasets.Value("bool"), [True, False], [], {"caption without the words": 2}),
    "time": (datasets.Value("timestamp[s]"), [datetime.datetime(2024, 1, 1)], [], {"caption without the words": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_row_gives_an_image_or_a_counted_reason(tmp_path, monkeypatch, name):
    kind, values, captions, reasons = CAPTIONS[name]
    rows = [{"image": image(row), "caption": value} for row, value in enumerate(values)]
    found = retrieve_dataset(tmp_path, monkeypatch, {"image": datasets.Image(), "caption": kind}, rows)
    assert found == (captions, reasons)
    assert len(captions) + sum(reasons.values()) == len(values)


@pytest.mark.long
@pytest.mark.parametrize("name", CAPTIONS)
def test_without_words_every_row_gives_its_image(tmp_path, monkeypatch, name):
    kind, values, *_ = CAPTIONS[name]
    rows = [{"image": image(row), "caption": value} for row, value in enumerate(values)]
    features = {"image": datasets.Image(), "caption": kind}
    kept, reasons = retrieve_dataset(tmp_path, monkeypatch, features, rows, "--words", "")
    assert len(kept) == len(values) and not reasons and all(kept)


def test_whatever_an_image_column_holds(tmp_path, monkeypatch, web):
    for row in range(3):
        web.pages[f"/{row}.jpg"] = jpeg(row)
    (tmp_path / "beside.jpg").write_bytes(jpeg(9))
    addresses = [f"  {web.url}/0.jpg\n", f"{web.url}/1.jpg", "", None, "   ", "no address"]
    rows = [{"url": address, "text": "a cat"} for address in addresses]
    kept, reasons = retrieve_dataset(
        tmp_path, monkeypatch, {"url": TEXT, "text": TEXT}, rows, "--private_host", "127.0.0.1"
    )
    assert len(kept) == 2 and reasons == {"neither address nor image": 3, "no valid http(s) address": 1}
    # Trimmed also where they are written down.
    assert lists(tmp_path / "out")[1] == [f"{web.url}/0.jpg", f"{web.url}/1.jpg"]


@pytest.mark.parametrize(
    ("kind", "values", "kept", "reasons"),
    [
        (datasets.Image(), [image(0), None, image(1)], 2, {"neither address nor image": 1}),
        (datasets.Image(), [{"bytes": b"no image", "path": None}], 0, {"no image": 1}),
        (datasets.List(datasets.Image()), [[image(0), image(1)], [], None, [image(2)]], 3,
         {"neither address nor image": 2}),
        (datasets.Value("binary"), [jpeg(0), b"", None], 1, {"neither address nor image": 2}),
        (NUMBER, [1, None], 0, {"neither address nor image": 2}),
        (datasets.List(datasets.List(NUMBER)), [[[1, 2], [3, 4]], []], 0, {"neither address nor image": 2}),
        ({"url": TEXT, "width": NUMBER}, [{"url": None, "width": 1}], 0, {"neither address nor image": 1}),
    ],
)  # fmt: skip
def test_images_of_any_type_are_found_or_counted(tmp_path, monkeypatch, kind, values, kept, reasons):
    rows = [{"image": value, "text": f"cat {row}"} for row, value in enumerate(values)]
    captions, found = retrieve_dataset(tmp_path, monkeypatch, {"image": kind, "text": TEXT}, rows)
    assert len(captions) == kept and found == reasons


def test_images_behind_a_path_are_read_or_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "here.jpg").write_bytes(jpeg(0))
    (tmp_path / "set").mkdir()
    values = [{"bytes": None, "path": str(tmp_path / name)} for name in ("here.jpg", "gone.jpg")]
    table = pyarrow.table({"image": [*values, {"bytes": None, "path": None}], "text": ["a cat"] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "set/train.parquet")
    result = run(tmp_path, "--class_prompt", "cat", "--source", "dataset", "--path", "set", "--class_data_dir", "out")
    assert lists(tmp_path / "out")[1] == ["set#train/0"]
    assert left_out(result) == {"cannot be read": 1, "neither address nor image": 1}


def test_a_dataset_for_classification_is_searched_by_its_labels(tmp_path, monkeypatch):
    rows = [{"image": image(row), "label": row % 2} for row in range(4)]
    kept, _ = retrieve_dataset(tmp_path, monkeypatch, {"image": datasets.Image(), "label": LABEL}, rows)
    assert kept == ["tabby cat", "tabby cat"]


def test_no_caption_column_is_needed_without_words(tmp_path, monkeypatch):
    rows = [{"image": image(row), "width": 3} for row in range(2)]
    features = {"image": datasets.Image(), "width": NUMBER}
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    write_dataset(tmp_path / "set", features, rows)
    arguments = ["--class_prompt", "cat", "--source", "dataset", "--path", "set", "--num_class_images", 2]
    result = run(tmp_path, *arguments)
    error = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and "'set' has the columns image, width: name the one" in error
    # What it says to do instead.
    assert run(tmp_path, *arguments, *shlex.split(re.search(r"take all with (--words '')", error)[1])).returncode == 0
    assert lists(tmp_path / "real_reg/samples_cat")[0] == ["cat", "cat"]


def test_a_dataset_without_rows_is_no_traceback(tmp_path, monkeypatch):
    assert retrieve_dataset(tmp_path, monkeypatch, {"image": datasets.Image(), "text": TEXT}, []) == ([], {})


def test_training_and_retrieval_choose_the_same_columns():
    features = {
        "mask": datasets.Image(), "Image": datasets.Image(), "url": TEXT, "title": TEXT, "Caption": TEXT, "text": TEXT,
    }  # fmt: skip
    assert find_image_column(features, datasets) == "Image" and find_caption_column(features) == "text"
    del features["Image"], features["text"]
    assert find_image_column(features, datasets) == "mask" and find_caption_column(features) == "Caption"
    assert find_image_column({"url": TEXT}, datasets) == "url" and find_caption_column({"url": TEXT}) is None


def test_instance_images_from_rows_without_image_or_caption(tmp_path, monkeypatch):
    rows = [
        {"image": image(0), "captions": ["a <new1> cat", "other"]},
        {"image": None, "captions": ["gone"]},
        {"image": image(1), "captions": None},
    ]
    features = {"image": datasets.Image(), "captions": datasets.List(TEXT)}
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    folder = dataset_folder("someone/cats", tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00000.txt", "00002.png"]
    assert (folder / "00000.txt").read_text() == "a <new1> cat"
    data = datasets.Dataset.from_list([rows[1]], features=datasets.Features(features))
    with pytest.raises(UserError, match="has no image in its column 'image'"):
        dataset_folder("someone/dogs", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["someone--cats"]


def test_the_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run(tmp_path, "--class_prompt", "cat", "--source", "dataset", "--path", "user/set")
    assert result.stderr == 'error: --source dataset needs the package datasets: pip install ".[datasets]"\n'
    with pytest.raises(UserError, match=r'pip install "\.\[datasets\]"'):
        dataset_folder("someone/cats", tmp_path)


def test_the_columns_and_words_that_are_named_are_taken(tmp_path, monkeypatch):
    features = {"image": datasets.Image(), "photo": datasets.Image(), "text": TEXT, "alt": TEXT}
    rows = [{"image": image(0), "photo": image(1), "text": "a cat", "alt": "a kitten"}]
    named = ["--image_column", "photo", "--caption_column", "alt", "--words", "kitten", "--num_class_images", 1]
    assert retrieve_dataset(tmp_path, monkeypatch, features, rows, *named)[0] == ["a kitten"]
    assert (tmp_path / "out/images/0.jpg").read_bytes() == jpeg(1)


def test_a_revision_of_a_dataset_is_asked_for(tmp_path, monkeypatch):
    data = datasets.Dataset.from_list([{"image": image(0)}], features=datasets.Features({"image": datasets.Image()}))
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **more: asked.update(name=name, **more) or data)
    dataset_folder("someone/cats@v2", tmp_path / "cache")
    assert asked["name"] == "someone/cats" and asked["revision"] == "v2"
