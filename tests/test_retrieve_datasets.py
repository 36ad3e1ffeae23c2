"""Datasets of the Hugging Face Hub."""

from __future__ import annotations

import pytest

from tests.retrieval_images import jpeg
from tests.retrieval_web import lists, run


def test_a_dataset_is_streamed(tmp_path):
    datasets = pytest.importorskip("datasets")
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
