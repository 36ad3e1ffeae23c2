"""The pool of augmentations: as varied as fresh draws, and evenly made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from custom_diffusion.concept.prompts import LARGE_WORDS, SMALL_WORDS
from custom_diffusion.data.augmentation import Augmentation, augmentation_pool, draw_augmentation
from custom_diffusion.data.stream import SampleStream

SIZE = 512
# Sides of 170 to 512 pixels with 66 %, of which those below 307.2 are small; larger ones else.
SMALL = 0.66 * 138 / 343
LARGE = 0.34


def stream(seed: int, variants: int | None, images: int = 1, class_images: int = 0) -> SampleStream:
    return SampleStream(
        [(Path(f"{number}.png"), f"<new1> {number}") for number in range(images)],
        [(Path(f"class/{number}.png"), "cat") for number in range(class_images)],
        size=SIZE,
        center_crop=False,
        hflip=True,
        aug=True,
        seed=seed,
        variants=variants,
        cutmix_probability=0.0,
        samples_per_step=1,
    )


def pool(seed: int, count: int = 20, size: int = SIZE) -> list[Augmentation]:
    return augmentation_pool(count, size, 0.5, np.random.default_rng(seed))


def share_of_small(samples: SampleStream, draws: int) -> float:
    """Of the first draws, how many show the image small."""
    scales = [samples.draw(position).instance[0].scale for position in range(draws)]
    return float(np.mean([scale < 0.6 * SIZE for scale in scales]))


def test_every_image_has_its_share_of_small_and_large_views() -> None:
    for seed in range(200):
        variants = pool(seed)
        assert sum(one.scale < 0.6 * SIZE for one in variants) in (5, 6), "26.6 % of 20"
        assert sum(one.scale > SIZE for one in variants) in (6, 7), "34 % of 20"
        assert sum(one.flip for one in variants) == 10
        for place in ("top", "left"):
            parts = sorted(int(getattr(one, place) * 20) for one in variants if one.scale != SIZE)
            assert len(set(parts)) == len(parts), "spread over the canvas"


def test_a_run_shows_as_many_small_views_as_with_fresh_draws() -> None:
    shares = {
        variants: np.array([share_of_small(stream(seed, variants), draws=100) for seed in range(60)])
        for variants in (20, None)
    }
    for found in shares.values():
        assert abs(found.mean() - SMALL) < 4 * 0.044 / 60**0.5
    assert shares[20].std() <= shares[None].std()
    assert np.abs(shares[20] - SMALL).max() < 0.05


KINDS: dict[str, Callable[[Augmentation], float]] = {
    "small": lambda one: one.scale < 0.6 * SIZE,
    "large": lambda one: one.scale > SIZE,
    "scale": lambda one: one.scale / SIZE,
    "square of scale": lambda one: (one.scale / SIZE) ** 2,
    "flip": lambda one: one.flip,
    "first small word": lambda one: one.words == SMALL_WORDS[0],
    "first large word": lambda one: one.words == LARGE_WORDS[0],
    "top": lambda one: one.top,
    "left": lambda one: one.left,
    "top of small ones": lambda one: one.top * (one.scale < 0.6 * SIZE),
    "flipped small ones": lambda one: one.flip * (one.scale < 0.6 * SIZE),
}


@pytest.mark.parametrize("number", [0, 7, 19])
def test_each_variant_is_distributed_as_a_fresh_draw(number: int) -> None:
    fresh = [draw_augmentation(SIZE, 0.5, np.random.default_rng((seed, 1))) for seed in range(2000)]
    variants = [pool(seed)[number] for seed in range(2000)]
    for name, kind in KINDS.items():
        one, other = (np.array([float(kind(augmentation)) for augmentation in those]) for those in (fresh, variants))
        assert abs(one.mean() - other.mean()) < 4 * np.hypot(one.std(), other.std()) / 2000**0.5, name


@pytest.mark.parametrize("size", [8, 24, 64, 100, 512])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_pools_of_any_size_have_the_words_and_sides_that_fresh_draws_have(size: int, count: int) -> None:
    random = np.random.default_rng(0)
    fresh = {draw_augmentation(size, 0.5, random).scale for _ in range(20 * size)}
    for one in pool(3, count, size):
        assert min(fresh) <= one.scale <= max(fresh)
        assert (one.words in SMALL_WORDS) == (one.scale < 0.6 * size)
        assert (one.words in LARGE_WORDS) == (one.scale > size)
        assert 0 <= one.top < 1
        assert 0 <= one.left < 1


@pytest.mark.parametrize("class_images", [0, 7])
def test_all_variants_of_an_image_are_shown_before_one_comes_again(class_images: int) -> None:
    samples = stream(1, 6, images=3, class_images=class_images)
    shown: dict[str, list[object]] = {}
    for position in range(12 * 3 * 7):
        view = samples.draw(position).instance[0]
        shown.setdefault(view.path.name, []).append(view)
    for views in shown.values():
        counts = Counter(views)
        assert len(counts) == 6
        assert len(set(counts.values())) == 1
    # In an order of its own each time.
    first = shown["0.png"]
    assert class_images or (set(first[:6]) == set(first[6:12]) and first[:6] != first[6:12])
