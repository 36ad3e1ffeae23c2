"""Masks of instance images: which are found, that they go the way of their images, and what then counts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from custom_diffusion.concept.files import load_concept
from custom_diffusion.data.buckets import find_buckets, shapes_of
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.data.dataset import CustomDiffusionDataset
from custom_diffusion.data.images import find_instance_images
from custom_diffusion.data.masks import find_masks
from custom_diffusion.data.views import Renderer, View
from custom_diffusion.errors import UserError
from custom_diffusion.training.objective import custom_diffusion_loss
from custom_diffusion.training.run import training_batches
from tests.conftest import draw_images, flags, prepare

Train = Callable[[list[str]], None]
Tokenize = Callable[[str], dict[str, torch.Tensor]]


def entry(folder: Path) -> ConceptEntry:
    return ConceptEntry("photo of a <new1> cat", str(folder), instance_folder=folder)


def instance_images(folder: Path, **options: bool) -> list[Path]:
    return [path for path, _ in find_instance_images([entry(folder)], **options)]


def draw_mask(path: Path, size: tuple[int, int] = (96, 96), box: tuple[int, ...] = (16, 8, 72, 64)) -> Path:
    """A white box on black, that is unlike its mirror image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(path)
    return path


# --- which are found -----------------------------------------------------------------------------


def test_masks_are_found_by_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw_images(tmp_path, 5)
    (tmp_path / "0.png").rename(tmp_path / "photo.jpg")
    expected = {
        "photo.jpg": draw_mask(tmp_path / "mask" / "photo.png"),
        "1.png": draw_mask(tmp_path / "1-masklabel.png"),
        "2.png": draw_mask(tmp_path / "mask" / "2.bmp"),
        "3.png": draw_mask(tmp_path / "mask" / "3.png"),
    }
    draw_mask(tmp_path / "3-masklabel.png")
    draw_mask(tmp_path / "mask" / "3.bmp")
    draw_mask(tmp_path / "mask" / "9.png")
    (tmp_path / "mask" / ".DS_Store").write_bytes(b"\0")
    with caplog.at_level(logging.INFO, "custom_diffusion"):
        images = instance_images(tmp_path, with_masks=True)
        assert {image.name: mask for image, mask in find_masks(images, {}).items()} == expected
    assert {image.name for image in images} == {*expected, "4.png"}, "masks are no instance images"
    said = "\n".join(caplog.messages)
    assert "masks of 4 of 5 images" in said
    assert f"no mask, so that the whole image counts: {tmp_path / '4.png'}" in said
    assert f"masks of no image: {tmp_path / 'mask' / '3.bmp'}, {tmp_path / 'mask' / '9.png'}" in said
    assert f"masks: {tmp_path / '3-masklabel.png'}" in said, "the other one was taken"
    assert "folders: " not in said and ".DS_Store" not in said and "1-masklabel" not in said


def test_without_the_flag_masks_are_left_out_and_the_flag_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw_images(tmp_path, 3)
    draw_mask(tmp_path / "mask" / "0.png")
    draw_mask(tmp_path / "1-masklabel.png")
    with caplog.at_level(logging.INFO, "custom_diffusion"):
        assert len(instance_images(tmp_path)) == 3
    assert f"2 of 3 images in {tmp_path} have a mask, which --masked_loss would use" in caplog.text
    assert "1-masklabel.png" in caplog.text and "mask/" in caplog.text


def with_alpha(path: Path, alpha: int = 0) -> Path:
    """Red, with a box that is opaque; the rest is blue and has this alpha."""
    image = Image.new("RGBA", (96, 96), (0, 0, 255, alpha))
    image.paste((255, 0, 0, 255), (16, 8, 72, 64))
    image.save(path)
    return path


def test_the_alpha_channel_is_the_mask_and_hidden_colours_are_shown(tmp_path: Path) -> None:
    images = [with_alpha(tmp_path / "cut-out.png"), with_alpha(tmp_path / "opaque.png", alpha=255)]
    masks = find_masks(images, {})
    assert masks == {images[0]: images[0]}, "one that is opaque everywhere has no mask"
    view = View(images[0], False, 96, 0.0, 0.0)
    masked, plain = Renderer(96, 12, object_masks=masks), Renderer(96, 12)
    assert masked.render(view)[:, 0, 0].tolist() == [-1, -1, 1], "blue"
    assert plain.render(view)[:, 0, 0].tolist() == [1, 1, 1], "laid on white"
    cells = torch.zeros(12, 12)
    cells[1:8, 2:9] = 1
    assert torch.equal(masked.object_mask(view), cells)
    assert masked.object_mask(View(images[1], False, 96, 0.0, 0.0)).min() == 1
    # A file takes precedence, and the image is laid on white as ever.
    masks = {images[0]: draw_mask(tmp_path / "mask" / "cut-out.png")}
    assert find_masks(images, {}) == masks
    assert torch.equal(Renderer(96, 12, object_masks=masks).render(view), plain.render(view))


def test_transparent_parts_of_a_mask_are_outside(tmp_path: Path) -> None:
    (image,) = draw_images(tmp_path, 1).iterdir()
    mask = Image.new("RGBA", (96, 96), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 48, 96))
    (tmp_path / "mask").mkdir()
    mask.save(tmp_path / "mask" / "0.png")
    found = Renderer(96, 12, object_masks=find_masks([image], {})).object_mask(View(image, False, 96, 0.0, 0.0))
    assert found.mean(0).tolist() == [1] * 6 + [0] * 6


def test_a_photograph_on_its_side_has_an_upright_mask(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (96, 60), "red").save(tmp_path / "0.jpg", exif=exif)
    draw_mask(tmp_path / "mask" / "0.png", (60, 96))
    assert len(find_masks([tmp_path / "0.jpg"], {})) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"\x89PNG broken"), "'{mask}' cannot be read: "),
        (lambda path: draw_mask(path, (48, 96)), "'{mask}' has 48 x 96 pixels, and its image '{image}' 128 x 96"),
        (lambda path: draw_mask(path, (128, 96), (0, 0, 0, 0)), "'{mask}' has nothing inside: "),
        (lambda path: Image.new("L", (128, 96), 1).save(path), "'{mask}' has nothing inside: "),
        (
            lambda path: draw_mask(path, (128, 96), (0, 0, 15, 96)),
            "'{mask}' has nothing inside the centre of the image",
        ),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(
    make: Callable[[Path], object], words: str, base_model: Path, tmp_path: Path, train_here: Train
) -> None:
    (image,) = draw_images(tmp_path / "cat", 1, (128, 96)).iterdir()
    mask = tmp_path / "cat" / "mask" / "0.png"
    mask.parent.mkdir()
    make(mask)
    with pytest.raises(UserError) as caught:
        train_here(flags(base_model, tmp_path / "cat", tmp_path / "out", masked_loss=True))
    assert words.format(mask=mask, image=image) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_where_there_is_no_mask_at_all_the_names_are_said(images: Path) -> None:
    with pytest.raises(UserError, match=r"finds no mask: put mask/photo.png or photo-masklabel.png"):
        find_masks(sorted(images.iterdir()), {})


def test_an_image_that_is_transparent_everywhere_is_named(tmp_path: Path) -> None:
    Image.new("RGBA", (96, 96)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"the alpha channel of '.*0.png' has nothing inside"):
        find_masks([tmp_path / "0.png"], {})


def test_a_bucket_shows_what_the_square_does_not(tmp_path: Path) -> None:
    (image,) = draw_images(tmp_path, 1, (128, 96)).iterdir()
    draw_mask(tmp_path / "mask" / "0.png", (128, 96), (0, 0, 15, 96))
    assert find_masks([image], shapes_of([(image, "")], find_buckets(128, 16)))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--unmasked_weight=0.5"], "has no meaning without --masked_loss"),
        (["--masked_loss", "--unmasked_weight=1.5"], "is not between 0 and 1"),
        (["--masked_loss", "--unmasked_weight=nan"], "is not between 0 and 1"),
    ],
)
def test_flags_that_make_no_sense(more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from train_custom_diffusion import parse_args

    with pytest.raises(SystemExit):
        parse_args(flags(Path("model"), Path("images"), Path("out")) + more)
    assert words in capsys.readouterr().err


# --- the way of the image ------------------------------------------------------------------------


def own_masks(folder: Path, size: tuple[int, int]) -> None:
    """Images of grey noise, each of which is its own mask."""
    (folder / "mask").mkdir(parents=True)
    for number in range(2):
        noise = np.random.default_rng((number, *size)).integers(0, 256, (size[1] // 4, size[0] // 4), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)
        image.save(folder / f"{number}.png")
        image.save(folder / "mask" / f"{number}.png")


@pytest.mark.parametrize(
    "options",
    [
        {"aug": False},
        {"variants": 5},
        {"padding_mode": "edge"},
        {"buckets": find_buckets(64, 16), "variants": 5},
        {"buckets": find_buckets(64, 16), "padding_mode": "edge"},
        {"cutmix_probability": 0.5},
    ],
)
def test_a_mask_goes_the_way_of_its_image(options: dict[str, object], tmp_path: Path, tokenize: Tokenize) -> None:
    for name, size in (("cat", (96, 96)), ("dog", (90, 150))):
        own_masks(tmp_path / name, size)
    pairs = find_instance_images([entry(tmp_path / "cat"), entry(tmp_path / "dog")], with_masks=True)
    masks = find_masks([path for path, _ in pairs], {})
    samples = CustomDiffusionDataset(pairs, [], tokenize, 64, 8, hflip=True, masks=masks, **options)
    shapes, flips = set(), set()
    for position in range(40):
        sample = samples[position]
        flips |= {view.flip for view in samples.draw(position).instance}
        pixels = F.avg_pool2d((sample["instance_images"][:1] + 1) / 2, 8)[0]
        mask, inside = sample["instance_object_mask"], sample["instance_mask"] == 1
        assert mask.shape == inside.shape
        assert torch.allclose(mask[inside], pixels[inside], atol=1e-5)
        shapes.add(tuple(mask.shape))
    assert flips == {False, True}
    assert len(shapes) == (2 if "buckets" in options or "cutmix_probability" in options else 1)


def test_around_a_small_image_nothing_is_inside(tmp_path: Path) -> None:
    own_masks(tmp_path, (96, 96))
    image = tmp_path / "0.png"
    renderer = Renderer(64, 8, object_masks={image: tmp_path / "mask" / "0.png"})
    mask = renderer.object_mask(View(image, False, 32, 0.0, 0.999))
    assert mask[:4, 4:].min() > 0
    assert mask[4:].max() == mask[:, :4].max() == 0


def test_batches_have_masks_of_both_kinds_of_images(base_model_xl: Path, tmp_path: Path) -> None:
    draw_images(tmp_path / "cat", 3)
    draw_mask(tmp_path / "cat" / "mask" / "1.png")
    more = {
        "with_prior_preservation": True,
        "class_data_dir": draw_images(tmp_path / "class", 2),
        "class_prompt": "cat",
    }
    more |= {"num_class_images": 2, "train_batch_size": 3, "max_train_steps": 1, "noaug": True}
    run = prepare(flags(base_model_xl, tmp_path / "cat", tmp_path / "out", masked_loss=True, **more))
    (batch,) = training_batches(run)
    assert batch["object_mask"].shape == batch["mask"].shape == (6, 1, 8, 8)
    means = batch["object_mask"].mean([1, 2, 3])
    assert sorted(means[:3].tolist())[1:] == [1, 1], "two instance images have no mask"
    assert means[:3].min().item() == pytest.approx(56 * 56 / 96**2, abs=0.01)
    assert means[3:].tolist() == [1, 1, 1]
    assert all(loss.isfinite() for loss in run.module(run.latents.draw(batch), **batch))
    run = prepare(flags(base_model_xl, tmp_path / "cat", tmp_path / "plain", **more))
    assert all("object_mask" not in batch for batch in training_batches(run))


# --- what counts ---------------------------------------------------------------------------------


def masked_folder(folder: Path, count: int = 3) -> Path:
    draw_images(folder, count)
    for number in range(count):
        draw_mask(folder / "mask" / f"{number}.png", box=(16 + number, 8, 72, 64))
    return folder


@pytest.mark.parametrize("weight", [0.0, 0.1, 1.0])
def test_what_is_outside_counts_by_its_weight(weight: float, base_model: Path, tmp_path: Path) -> None:
    argv = flags(base_model, masked_folder(tmp_path / "cat"), tmp_path / "out", masked_loss=True, max_train_steps=1)
    run = prepare([*argv, f"--unmasked_weight={weight}"])
    (batch,) = training_batches(run)
    # The UNet is wrong by one inside, and by something else outside.
    inside = batch["object_mask"] > 0

    def loss(wrong_outside: float) -> float:
        prediction = batch["noise"] + torch.where(inside, 1.0, wrong_outside)
        run.module.unet_forward = lambda *_, **__: SimpleNamespace(sample=prediction)
        latents = torch.zeros_like(batch["noise"])
        rest = {name: value for name, value in batch.items() if name not in ("posterior", "posterior_noise")}
        return float(run.module(latents, **rest)[1])

    weights = batch["mask"] * (weight + (1 - weight) * batch["object_mask"])
    for wrong in (0.0, 3.0):
        error = torch.where(inside, 1.0, wrong**2)
        assert loss(wrong) == pytest.approx(4 * float((weights * error).sum() / weights.sum()), rel=1e-5)
    assert (loss(0.0) == loss(3.0)) == (weight == 0)


def test_a_view_that_shows_nothing_of_the_object_has_no_loss() -> None:
    prediction = torch.ones(2, 4, 2, 2, requires_grad=True)
    mask = torch.zeros(2, 1, 2, 2)
    mask[1, 0, 0, 0] = 0.5
    loss, *_ = custom_diffusion_loss(prediction, torch.zeros(2, 4, 2, 2), mask, None)
    assert loss.item() == 2, "the mean of 0 and 4 channels"
    loss.backward()
    assert prediction.grad is not None and prediction.grad.isfinite().all() and prediction.grad[0].abs().sum() == 0


def command(base_model: Path, folder: Path, output: str, **more: object) -> list[str]:
    """A run with three instance images, of which one has no mask and one its own alpha channel."""
    if not (folder / "cat").exists():
        masked_folder(folder / "cat")
        with_alpha(folder / "cat" / "1.png")
        for name in ("1.png", "2.png"):
            (folder / "cat" / "mask" / name).unlink()
        draw_images(folder / "class", 3)
    values = {
        "masked_loss": True, "with_prior_preservation": True, "class_data_dir": folder / "class",
        "class_prompt": "cat", "num_class_images": 3, "train_batch_size": 2, "learning_rate": 1e-2,
        "max_train_steps": 4, "hflip": True,
    }  # fmt: skip
    return flags(base_model, folder / "cat", folder / output, **(values | more))


def learned(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_concept(folder).tensors().values()])


def test_encoded_once_or_at_every_step_the_result_is_the_same(
    base_model: Path, tmp_path: Path, train_here: Train
) -> None:
    run = partial(command, base_model, tmp_path, noaug=True, center_crop=True)
    # Latents that a run without masks has kept: those of the image with an alpha channel are others.
    train_here(run("kept", masked_loss=None, keep_latents=True))
    plain = learned(tmp_path / "kept")
    train_here(run("kept", keep_latents=True, overwrite=True))
    train_here(run("anew", no_latent_cache=True))
    assert torch.equal(learned(tmp_path / "kept"), learned(tmp_path / "anew"))
    assert not torch.equal(learned(tmp_path / "kept"), plain)


@pytest.mark.long
def test_where_outside_counts_as_inside_nothing_changes(base_model: Path, tmp_path: Path, train_here: Train) -> None:
    masked_folder(tmp_path / "cat")
    draw_images(tmp_path / "class", 3)
    train_here(command(base_model, tmp_path, "plain", masked_loss=None))
    train_here(command(base_model, tmp_path, "masked", unmasked_weight=1))
    assert torch.equal(learned(tmp_path / "plain"), learned(tmp_path / "masked"))


def test_a_resumed_run_is_bit_equal_and_notices_other_masks(
    base_model: Path, tmp_path: Path, train_here: Train
) -> None:
    more: dict[str, object] = {"unmasked_weight": 0}
    train_here(command(base_model, tmp_path, "whole", **more))
    train_here(command(base_model, tmp_path, "parts", max_train_steps=2, checkpointing_steps=2, **more))
    more["resume_from_checkpoint"] = "latest"
    for other, words in (
        ({"masked_loss": None, "unmasked_weight": None}, "masked_loss true -> false"),
        ({"unmasked_weight": 0.5}, "unmasked_weight 0.0 -> 0.5"),
    ):
        with pytest.raises(UserError, match=words):
            train_here(command(base_model, tmp_path, "parts", **(more | other)))
    mask = tmp_path / "cat" / "mask" / "0.png"
    before = mask.read_bytes()
    draw_mask(mask, box=(0, 0, 48, 48))
    with pytest.raises(UserError, match=r"other masks of the instance images: 0.png"):
        train_here(command(base_model, tmp_path, "parts", **more))
    mask.write_bytes(before)
    train_here(command(base_model, tmp_path, "parts", **more))
    assert torch.equal(learned(tmp_path / "whole"), learned(tmp_path / "parts"))


def test_the_validation_loss_counts_inside_the_masks(base_model: Path, tmp_path: Path) -> None:
    masked_folder(tmp_path / "cat")
    for more in ({"validation_data_dir": masked_folder(tmp_path / "more", 1)}, {"validation_split": 1}):
        run = prepare(flags(base_model, tmp_path / "cat", tmp_path / "out", masked_loss=True, **more))
        assert run.validation
        assert all(0 < batch["object_mask"].mean() < 1 for batch in run.validation)
