"""Images in their own shape: which shapes there are, how steps take them, and what the model sees and is told."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from custom_diffusion.concept.files import load_concept
from custom_diffusion.data.batches import position_batches
from custom_diffusion.data.buckets import LEAST_CLASS_IMAGES, find_buckets, nearest_bucket
from custom_diffusion.data.dataset import CustomDiffusionDataset
from custom_diffusion.data.views import Renderer, View
from custom_diffusion.errors import UserError
from tests.conftest import draw_images, flags, prepare

Train = Callable[[list[str]], None]
Tokenize = Callable[[str], dict[str, torch.Tensor]]

BUCKETS = find_buckets(64, 16)


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (768, 64), (1024, 64), (64, 16), (128, 16)])
def test_buckets_have_the_area_of_the_square(resolution: int, multiple: int) -> None:
    buckets = find_buckets(resolution, multiple)
    assert (resolution, resolution) in buckets
    assert buckets == [(width, height) for height, width in reversed(buckets)], "tall ones as wide ones"
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        # One more step of the shorter side would exceed the area.
        assert resolution**2 - max(height, width) * multiple < height * width <= resolution**2
        assert max(height, width) <= 2.5 * min(height, width)


def test_the_bucket_of_an_image_has_the_nearest_proportions() -> None:
    buckets = find_buckets(512, 64)
    assert nearest_bucket((3000, 3000), buckets) == (512, 512)
    assert nearest_bucket((3000, 4000), buckets) == (576, 448)
    assert nearest_bucket((1920, 1080), buckets) == (384, 640)
    assert nearest_bucket((9000, 1000), buckets) == (320, 768)


def test_a_resolution_between_the_steps_is_refused() -> None:
    with pytest.raises(UserError, match=r"multiple of 64: take 448 or 512"):
        find_buckets(500, 64)


# --- what is shown -------------------------------------------------------------------------------


def mixed(folder: Path, tokenize: Tokenize, class_images: bool = True, **more: object) -> CustomDiffusionDataset:
    """Two squares, three portraits and one panorama; class images of which only the squares are many."""
    instance: list[tuple[Path, str]] = []
    for name, count, size in (("square", 2, (96, 96)), ("tall", 3, (60, 100)), ("panorama", 1, (400, 60))):
        instance += [(path, "a <new1> cat") for path in sorted(draw_images(folder / name, count, size).iterdir())]
    (folder / "class").mkdir()
    for name, count, size in (("many", LEAST_CLASS_IMAGES, (80, 80)), ("few", 2, (60, 100))):
        for path in list(draw_images(folder / name, count, size).iterdir()):
            path.rename(folder / "class" / f"{name}-{path.name}")
    pairs = [(path, "cat") for path in sorted((folder / "class").iterdir())] if class_images else []
    options: dict[str, object] = {"size": 64, "mask_size": 8, "hflip": True, "variants": 3, "samples_per_step": 4}
    return CustomDiffusionDataset(instance, pairs, tokenize, buckets=BUCKETS, **(options | more))


def test_a_step_has_one_shape_and_every_image_its_share(tmp_path: Path, tokenize: Tokenize) -> None:
    samples = mixed(tmp_path, tokenize)
    shown: Counter[Path] = Counter()
    beside: dict[tuple[int, ...], set[Path]] = {}
    rounds = 3
    for step in range(6 * rounds):
        examples = [samples[position] for position in samples.positions(range(step, step + 1))]
        (shape,) = {tuple(example[f"{kind}_images"].shape) for example in examples for kind in ("instance", "class")}
        assert {tuple(example["instance_mask"].shape) for example in examples} == {(shape[1] // 8, shape[2] // 8)}
        for position in samples.positions(range(step, step + 1)):
            sample = samples.draw(position)
            shown[sample.instance[0].path] += 1
            beside.setdefault(shape, set()).add(sample.class_image[0].path)
            assert sample == samples.draw(position), "whatever was drawn before"
    assert set(shown.values()) == {4 * rounds}
    assert set(beside) == {(3, 64, 64), (3, 80, 48), (3, 48, 80)}
    assert all(path.name.startswith("many-") for path in beside[3, 64, 64]), "of the same shape, where there are many"
    assert len(beside[3, 80, 48]) == LEAST_CLASS_IMAGES + 2, "cropped, where they are few"


def test_two_processes_see_what_one_with_the_double_batch_sees(tmp_path: Path, tokenize: Tokenize) -> None:
    samples = mixed(tmp_path, tokenize)
    one = position_batches(0, 12, 4, 0, 1)
    two = [position_batches(0, 12, 2, process, 2) for process in range(2)]
    assert one == [first + second for first, second in zip(*two, strict=True)]
    for first, second in zip(*two, strict=True):
        assert len({samples.draw(position).instance[0].canvas for position in first + second}) == 1


def test_what_a_long_run_shows_is_known_without_walking_through_it(tmp_path: Path, tokenize: Tokenize) -> None:
    samples = mixed(tmp_path, tokenize, center_crop=True)
    views, _ = samples.drawn(range(10**9))
    assert len(views) == len(set(views))
    assert {view.canvas for view in views} == {None, (80, 48), (48, 80)}


@pytest.mark.parametrize("scale", [40, 64, 80])
@pytest.mark.parametrize(("size", "canvas"), [((120, 200), (80, 48)), ((200, 120), (48, 80)), ((500, 60), (48, 80))])
def test_the_image_is_scaled_and_placed_as_in_a_square(
    scale: int, size: tuple[int, int], canvas: tuple[int, int], tmp_path: Path
) -> None:
    Image.new("RGB", size, "white").save(tmp_path / "white.png")
    renderer = Renderer(64, 8)
    view = View(tmp_path / "white.png", False, scale, 0.4, 0.7, canvas)
    pixels, mask = renderer.render(view), renderer.mask(view)
    assert pixels.shape == (3, *canvas)
    assert mask.shape == (canvas[0] // 8, canvas[1] // 8)
    inside = pixels[0] == 1
    expected = [min(side, round(side * scale / 64)) for side in canvas]
    assert [int(inside.any(1).sum()), int(inside.any(0).sum())] == expected, "the same part of both sides"
    cells = inside.unfold(0, 8, 8).unfold(1, 8, 8).all(-1).all(-1)
    assert mask.any()
    assert bool((cells | (mask == 0)).all()), "the mask takes in nothing but image"


def test_proportions_are_kept(tmp_path: Path) -> None:
    image = Image.new("RGB", (100, 166), "black")
    image.paste("white", (25, 58, 75, 108))
    image.save(tmp_path / "tall.png")
    for scale in (64, None):
        pixels = Renderer(64, 8).render(View(tmp_path / "tall.png", False, scale, 0.0, 0.0, (80, 48)))
        white = pixels[0] > 0
        assert abs(int(white.any(0).sum()) - int(white.any(1).sum())) <= 1, "a square stays one"
        assert 23 <= int(white.any(0).sum()) <= 25, "half of the width"


def test_time_ids_say_what_of_the_image_is_shown(tmp_path: Path) -> None:
    Image.new("RGB", (400, 120)).save(tmp_path / "panorama.png")
    renderer = Renderer(64, 8)
    path, canvas = tmp_path / "panorama.png", (48, 80)
    # Of 400 x 120 pixels, 200 x 120 are taken, and become 80 x 48.
    assert renderer.time_ids([View(path, False, 64, 0, 0, canvas)]).tolist() == [120, 400, 0, 40, 48, 80]
    assert renderer.time_ids([View(path, False, None, 0, 0, canvas)]).tolist() == [120, 400, 0, 0, 48, 80]
    # 1.25 times as large, 60 x 100, of which the lower right corner is shown.
    assert renderer.time_ids([View(path, False, 80, 0.999, 0.999, canvas)]).tolist() == [120, 400, 12, 50 + 20, 48, 80]


# --- training ------------------------------------------------------------------------------------


def command(base_model: Path, folder: Path, output: str, **more: object) -> list[str]:
    """Portraits, landscapes and a panorama, with class images of two shapes."""
    if not (folder / "class").exists():
        for name, size in (("square", (96, 96)), ("tall", (60, 100)), ("wide", (160, 96)), ("panorama", (400, 60))):
            draw_images(folder / name, 1, size)
            (folder / "instance").mkdir(exist_ok=True)
            (folder / name / "0.png").rename(folder / "instance" / f"{name}.png")
        draw_images(folder / "class", 3, (80, 80))
        Image.new("RGB", (60, 100), "red").save(folder / "class" / "tall.png")
    values = {
        "aspect_buckets": True, "resolution": 128, "with_prior_preservation": True, "class_data_dir": folder / "class",
        "class_prompt": "cat", "num_class_images": 4, "train_batch_size": 2, "learning_rate": 1e-2,
        "max_train_steps": 4, "hflip": True,
    }  # fmt: skip
    return flags(base_model, folder / "instance", folder / output, **(values | more))


def learned(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_concept(folder).tensors().values()])


def test_encoded_once_or_at_every_step_the_result_is_the_same(
    base_model: Path, tmp_path: Path, train_here: Train, caplog: pytest.LogCaptureFixture
) -> None:
    common: dict[str, object] = {"noaug": True, "center_crop": True}
    with caplog.at_level(logging.INFO, "custom_diffusion"):
        train_here(command(base_model, tmp_path, "cached", validation_split=1, keep_latents=True, **common))
    assert "instance images in buckets of width x height: " in caplog.text
    (line,) = [message for message in caplog.messages if message.startswith("cropped to")]
    assert line.endswith("panorama.png")
    train_here(command(base_model, tmp_path, "anew", validation_split=1, no_latent_cache=True, **common))
    assert torch.equal(learned(tmp_path / "cached"), learned(tmp_path / "anew"))


def test_a_resumed_run_is_bit_equal(base_model: Path, tmp_path: Path, train_here: Train) -> None:
    train_here(command(base_model, tmp_path, "whole"))
    train_here(command(base_model, tmp_path, "parts", max_train_steps=2, checkpointing_steps=2))
    more = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    train_here(command(base_model, tmp_path, "parts", **more))
    assert torch.equal(learned(tmp_path / "whole"), learned(tmp_path / "parts"))
    with pytest.raises(UserError, match="aspect_buckets true -> false"):
        train_here(command(base_model, tmp_path, "parts", **more, aspect_buckets=None))


def test_xl_is_told_the_shape_of_every_sample(base_model_xl: Path, tmp_path: Path) -> None:
    run = prepare(command(base_model_xl, tmp_path, "out"))
    shapes = set()
    for position in run.dataset.positions(range(4)):
        example, views = run.dataset[position], run.dataset.draw(position).instance
        shape = [8 * side for side in example["instance_posterior"].shape[-2:]]
        assert example["instance_time_ids"][-2:].tolist() == shape == list(run.dataset.renderer.canvas(views[0]))
        shapes.add(tuple(shape))
    assert len(shapes) == 4, "a round has all shapes"
