"""Stable Diffusion XL learns: on the small model's twin in its layout, which is made without training."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from benchmarks.learning import BASE, measure, recipe, retrieve, weigh
from tests.conftest import MakeOnce, launch
from tools.base.score import generated
from tools.xl_twin import build_twin

# One training of minutes, for which another worker would only wait.
pytestmark = pytest.mark.xdist_group("test_xl_twin")
SEED = 2026  # others chose the recipe


@pytest.fixture(scope="session")
def twin(make_once: MakeOnce) -> Path:
    return make_once("xl-twin", build_twin)


def test_it_draws_what_the_base_model_draws(twin: Path) -> None:
    prompts = ["photo of a penguin on an orange background", "a cat next to a plant at night", ""]
    base = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.float32, safety_checker=None)
    xl = StableDiffusionXLPipeline.from_pretrained(twin, torch_dtype=torch.float32)
    one, other = (generated(pipeline, prompts, seed=5, steps=10).astype(int) for pipeline in (base, xl))
    assert np.abs(one - other).max() <= 2
    assert len(np.unique(one)) > 100


def teach(twin: Path, folder: Path) -> None:
    """Teach the cat of `examples/cat` by the documented recipe, and write down what was learned."""
    retrieve("cat", folder / "class")
    more = {"pretrained_model_name_or_path": twin, "learning_rate": 3e-4}
    launch(*recipe(output_dir=folder / "cat", class_data_dir=folder / "class", seed=SEED, **more))
    (folder / "figures.json").write_text(json.dumps(measure(weigh(folder / "cat"), SEED)))


@pytest.fixture(scope="session")
def figures(twin: Path, make_once: MakeOnce) -> dict[str, float]:
    folder = make_once("xl-twin-taught", partial(teach, twin))
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.long
def test_unseen_views_are_predicted_better(figures: dict[str, float]) -> None:
    assert figures["loss on unseen views, <new1> cat"] <= -0.10


@pytest.mark.long
def test_what_the_model_knew_stays(figures: dict[str, float]) -> None:
    assert abs(figures["loss on other cats, plain cat"]) <= 0.02
    assert abs(figures["loss on dogs, plain dog"]) <= 0.02


@pytest.mark.long
def test_images_show_the_concept_and_only_with_its_trained_word(figures: dict[str, float]) -> None:
    assert figures["images of <new1> cat nearest to the concept"] >= 0.70
    assert figures["the same with the untrained token"] <= 0.15
    assert figures["red background followed"] >= 0.8
