"""A concept is learned: on the base model that ships with the project, with its recipe, against controls.

Seeds are others than those by which model and recipe were chosen. `python -m benchmarks.learning` prints the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from benchmarks.learning import (
    CALLED,
    CONCEPT,
    CONCEPTS,
    SIZES,
    TOKENS,
    Judge,
    denoising_loss,
    groups_of,
    load_base,
    load_designs,
    measure,
    measure_two,
    recipe,
    recipe_for_two,
    retrieve,
    sized_views,
    trainings,
    views,
    weigh,
    with_concept,
    with_untrained_token,
)
from tests.conftest import launch
from tools.base.score import reconstructed

# One training of minutes is for `make test-all`, and what takes more of them for `make test-learning`.
pytestmark = pytest.mark.long
learning = pytest.mark.learning
SEED = 2026


@pytest.fixture(scope="module")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real class images of cats that come with the project; those of plants lie beside them."""
    folder = tmp_path_factory.mktemp("class")
    for noun in ("cat", "plant"):
        retrieve(noun, folder / noun)
    return folder / "cat"


@pytest.fixture(scope="module")
def trained(class_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The concept of `examples/cat` as training leaves it."""
    folder = tmp_path_factory.mktemp("learned") / "cat"
    launch(*recipe(output_dir=folder, class_data_dir=class_images, seed=SEED))
    return folder


@pytest.fixture(scope="module")
def cat(trained: Path) -> Path:
    """The concept of `examples/cat`, taught by the documented command lines."""
    return weigh(trained)


@pytest.fixture(scope="module")
def figures(cat: Path) -> dict[str, float]:
    return measure(cat, SEED)


def test_unseen_views_are_predicted_better(figures: dict[str, float]) -> None:
    assert figures["loss on unseen views, <new1> cat"] <= -0.12


def test_what_the_model_knew_stays(figures: dict[str, float]) -> None:
    assert abs(figures["loss on other cats, plain cat"]) <= 0.015
    assert figures["loss on unseen views, plain cat"] >= -0.05


def test_a_class_that_no_class_image_shows_stays(figures: dict[str, float]) -> None:
    assert abs(figures["loss on dogs, plain dog"]) <= 0.015


def test_images_show_the_concept(figures: dict[str, float]) -> None:
    assert figures["images of <new1> cat nearest to the concept"] >= 0.85


def test_images_do_not_show_the_concept_without_its_trained_token(figures: dict[str, float]) -> None:
    assert figures["the same with the untrained token"] <= 0.15
    assert figures["images of plain cat nearest to the concept"] <= 0.25


def test_the_concept_follows_the_prompt(figures: dict[str, float]) -> None:
    assert figures["red background followed"] >= 0.95
    assert figures["of these, nearest to the concept"] >= 0.9


def test_the_judge_knows_real_images_of_the_concepts() -> None:
    """An image can be no more like a concept than the concept's own drawings are, seen through the VAE."""
    pipeline, icons = load_base(), load_designs()
    real = {}
    for noun, group in CONCEPTS.items():
        own = groups_of(icons, noun)[group]
        real[noun] = np.stack([view.image for view in views(icons, noun, own, each=24 // len(own), seed=SEED)])[:20]
        alone = reconstructed(pipeline.vae, real[noun])
        assert Judge(pipeline, icons, [noun]).share(alone, group) >= 0.9, noun
    both = reconstructed(pipeline.vae, np.concatenate([real["cat"], real["plant"]], axis=2))
    judge = Judge(pipeline, icons, list(TOKENS))
    for half, noun in zip(np.split(both, 2, axis=2), TOKENS, strict=True):
        assert judge.share(half, CONCEPTS[noun]) >= 0.9, noun


# --- two concepts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(class_images: Path, cat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cat and plant of `concept_list.json`, taught together; its own class images would be in the clone."""
    folder = tmp_path_factory.mktemp("both")
    launch(*recipe_for_two(folder, class_images.parent, output_dir=folder / "concepts", seed=SEED))
    return weigh(folder / "concepts")


@pytest.fixture(scope="module")
def figures_of_two(both: Path) -> dict[str, float]:
    return measure_two(both, seed=SEED)


@learning
def test_each_of_two_concepts_answers_to_its_token(figures_of_two: dict[str, float]) -> None:
    assert figures_of_two["<new1> cat nearest to the concept"] >= 0.7
    assert figures_of_two["<new2> plant nearest to the concept"] >= 0.7


@learning
@pytest.mark.parametrize(("first", "second"), [("cat", "plant"), ("plant", "cat")])
def test_both_concepts_in_one_image(first: str, second: str, figures_of_two: dict[str, float]) -> None:
    taught = f"{TOKENS[first]} {first} next to {TOKENS[second]} {second}"
    assert figures_of_two[f"{taught}: both as taught"] >= 0.75
    assert figures_of_two[f"{first} next to {second}: both as taught"] <= 0.1


@pytest.fixture(scope="module")
def figures_of_gated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Cat and plant, taught with `--token_gate`: each by itself and applied together, or both in one training."""
    apart = request.param == "apart"
    runs = trainings(tmp_path_factory.mktemp("gated"), SEED, two=not apart, apart=apart, gated=True)
    folders = [folder for folder in runs if folder.name.startswith((*TOKENS, "two"))]
    for folder in folders:
        launch(*runs[folder])
    return measure_two(*folders, seed=SEED)


@learning
@pytest.mark.parametrize(("first", "second"), [("cat", "plant"), ("plant", "cat")])
@pytest.mark.parametrize(
    ("figures_of_gated", "least"), [("apart", 0.5), ("together", 0.75)], indirect=["figures_of_gated"]
)
def test_gated_concepts_in_one_image(first: str, second: str, figures_of_gated: dict[str, float], least: float) -> None:
    assert figures_of_gated[f"{TOKENS[first]} {first} nearest to the concept"] >= 0.85
    taught = f"{TOKENS[first]} {first} next to {TOKENS[second]} {second}"
    assert figures_of_gated[f"{taught}: both as taught"] >= least
    assert figures_of_gated[f"{first} next to {second}: both as taught"] == 0


# --- the paper's ablations, in direction (its table 3) ----------------------------------------------


@pytest.fixture(scope="module")
def variant(class_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., StableDiffusionPipeline]:
    def train(**changes: object) -> StableDiffusionPipeline:
        folder = tmp_path_factory.mktemp("variant")
        launch(*recipe(output_dir=folder, seed=SEED, **({"class_data_dir": class_images} | changes)))
        return with_concept(folder)

    return train


@learning
def test_without_prior_preservation_the_prior_drifts_more(variant: Callable, trained: Path) -> None:
    icons = load_designs()
    known = [name for group, names in groups_of(icons, "cat").items() if group != CONCEPT for name in names]
    others = views(icons, "cat", known, each=2, seed=SEED)
    without = dict.fromkeys(("with_prior_preservation", "real_prior", "class_data_dir", "class_prompt"))
    alone = variant(**without)
    before = denoising_loss(with_untrained_token(), others)
    drift, drift_alone = (abs(denoising_loss(p, others) - before) for p in (with_concept(trained), alone))
    assert drift_alone > 1.5 * drift


@pytest.fixture(scope="module")
def without_augmentation(variant: Callable[..., StableDiffusionPipeline]) -> StableDiffusionPipeline:
    return variant(noaug=True)


@learning
@pytest.mark.parametrize(
    ("sizes", "each"), [(SIZES.values(), 4), ((("very small ", 0.35, 0.55),), 6)], ids=["every size", "very small"]
)
def test_without_augmentation_places_and_sizes_are_learned_less(
    sizes: Iterable[tuple[str, float, float]], each: int, without_augmentation: StableDiffusionPipeline, trained: Path
) -> None:
    icons = load_designs()
    designs = groups_of(icons, "cat")[CONCEPT]
    anywhere = [view for size in sizes for view in sized_views(icons, designs, size, each, SEED)]
    assert denoising_loss(with_concept(trained), anywhere, CALLED) < denoising_loss(
        without_augmentation, anywhere, CALLED
    )


@learning
def test_training_queries_and_outputs_too_fits_closer(variant: Callable, trained: Path) -> None:
    icons = load_designs()
    unseen = views(icons, "cat", groups_of(icons, "cat")[CONCEPT], each=6, seed=SEED)
    closer = variant(freeze_model="crossattn")
    assert denoising_loss(closer, unseen, CALLED) < denoising_loss(with_concept(trained), unseen, CALLED)
