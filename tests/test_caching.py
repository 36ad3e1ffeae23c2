"""What is computed once: images and captions, in memory and on disk, and that nothing else changes by it."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from custom_diffusion.concept.files import load_concept
from custom_diffusion.data.caching import encode_views
from custom_diffusion.data.dataset import CustomDiffusionDataset
from custom_diffusion.data.latent_files import read_posterior
from custom_diffusion.data.views import Renderer, View
from custom_diffusion.errors import UserError
from custom_diffusion.training.frozen_layers import FrozenGroupNorm
from custom_diffusion.training.run import Run, training_batches
from custom_diffusion.training.saving import validate
from tests.conftest import draw_images, flags, prepare, run_script
from train_custom_diffusion import train

RENDERING = "custom_diffusion.data.latent_files.RENDERING_VERSION"
Train = Callable[[list[str]], None]
Tokenize = Callable[[str], dict[str, torch.Tensor]]


def command(base_model: Path, folder: Path, output: str, **more: object) -> list[str]:
    """A run with five instance images and four wide class images."""
    if not (folder / "class").exists():
        draw_images(folder / "instance", 5)
        draw_images(folder / "class", 4, size=(120, 80))
    values = {
        "with_prior_preservation": True,
        "class_data_dir": folder / "class",
        "class_prompt": "cat",
        "num_class_images": 4,
        "train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_train_steps": 4,
        "hflip": True,
    }
    return flags(base_model, folder / "instance", folder / output, **(values | more))


def learned(folder: Path) -> torch.Tensor:
    concept = load_concept(folder)
    vectors = [vector for own in concept.tokens.values() for vector in own.values()]
    return torch.cat([value.flatten() for value in (*concept.attention.values(), *vectors)])


def losses(folder: Path) -> np.ndarray:
    events = EventAccumulator(str(folder / "logs" / "custom-diffusion"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == list(range(1, len(scalars) + 1))
    return np.array([event.value for event in scalars])


# --- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"center_crop": True},
        {"center_crop": True, "mixed_precision": "bf16", "gradient_checkpointing": True},
        {"with_prior_preservation": None},
    ],
)
def test_without_augmentation_the_result_is_bit_equal(
    more: dict[str, object], base_model: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(command(base_model, tmp_path, "cached", noaug=True, **more))
    train_here(command(base_model, tmp_path, "anew", noaug=True, no_latent_cache=True, **more))
    assert torch.equal(learned(tmp_path / "cached"), learned(tmp_path / "anew"))


def two_concepts(folder: Path) -> dict[str, object]:
    """Flags for two concepts whose images are in `instance` and `second` of the folder."""
    draw_images(folder / "instance", 5)
    draw_images(folder / "second", 3)
    prompts = {"instance": "photo of a <new1> cat", "second": "photo of a <new2> dog"}
    entries = [{"instance_prompt": prompt, "instance_data_dir": str(folder / name)} for name, prompt in prompts.items()]
    for entry in entries:
        noun = entry["instance_prompt"].split()[-1]
        entry |= {"class_prompt": f"photo of a {noun}", "class_data_dir": str(draw_images(folder / noun, 4))}
    (folder / "list.json").write_text(json.dumps(entries))
    return {"concepts_list": folder / "list.json", "modifier_token": "<new1>+<new2>", "num_class_images": 4}


@pytest.mark.parametrize(
    "more",
    [
        {"with_prior_preservation": None},
        {"with_prior_preservation": True, "center_crop": True, "gradient_accumulation_steps": 2},
    ],
)
def test_pairs_of_concepts_are_bit_equal(
    more: dict[str, object], base_model: Path, tmp_path: Path, train_here: Train
) -> None:
    common = {"cutmix_probability": 0.5, "max_train_steps": 6, "noaug": True, **two_concepts(tmp_path), **more}
    train_here(command(base_model, tmp_path, "cached", **common))
    train_here(command(base_model, tmp_path, "anew", **common, no_latent_cache=True))
    assert torch.equal(learned(tmp_path / "cached"), learned(tmp_path / "anew"))


def test_square_class_images_are_exact_beside_augmented_images(tmp_path: Path, tokenize: Tokenize) -> None:
    square = [(path, "cat") for path in sorted(draw_images(tmp_path / "square", 4).iterdir())]
    cached, anew = (
        CustomDiffusionDataset(square[:2], square, tokenize, 64, 8, hflip=True, variants=variants)
        for variants in (3, None)
    )
    for position in range(40):
        one, other = cached[position], anew[position]
        assert torch.equal(one["class_images"], other["class_images"])
        assert one["noise_seed"] == other["noise_seed"]


def test_the_loss_stays_within_the_spread_of_two_seeds(base_model: Path, tmp_path: Path, train_here: Train) -> None:
    # At 128 px a mask covers enough latents for the loss to say something.
    common = {"resolution": 128, "max_train_steps": 200, "learning_rate": 1e-3, "train_batch_size": 1}
    common["report_to"] = "tensorboard"
    train_here(command(base_model, tmp_path, "cached", **common))
    train_here(command(base_model, tmp_path, "anew", **common, no_latent_cache=True))
    train_here(command(base_model, tmp_path, "other-seed", **common, no_latent_cache=True, seed=43))
    cached, anew, other = (losses(tmp_path / name) for name in ("cached", "anew", "other-seed"))
    assert len(cached) == 200

    def distance(one: np.ndarray, another: np.ndarray) -> float:
        return float(np.abs((one - another).reshape(10, 20).mean(1)).mean())

    print("distance of the losses:", distance(cached, anew), "between seeds:", distance(anew, other))
    assert 0 < distance(cached, anew) < distance(anew, other)


@pytest.mark.parametrize("keep", [False, True])
def test_a_resumed_run_ends_bit_equal(keep: bool, base_model: Path, tmp_path: Path, train_here: Train) -> None:
    more = {"checkpointing_steps": 3, "max_train_steps": 6, "keep_latents": keep or None, "padding_mode": "edge"}
    train_here(command(base_model, tmp_path, "whole", **more))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    train_here(command(base_model, tmp_path, "resumed", **more, resume_from_checkpoint="latest"))
    assert torch.equal(learned(tmp_path / "resumed"), learned(tmp_path / "whole"))


# --- what is encoded -----------------------------------------------------------------------------


def stream(instance: int, class_images: int, **more: object) -> CustomDiffusionDataset:
    """Images that need not be there: what is drawn is decided without them."""
    images = [(Path(f"{number % 2}/{number}.png"), f"<new1> {number}") for number in range(instance)]
    others = [(Path(f"class/{number}.png"), f"cat {number}") for number in range(class_images)]
    return CustomDiffusionDataset(images, others, lambda prompt: {}, 64, 8, hflip=True, **more)


def test_only_what_the_steps_draw_is_encoded() -> None:
    samples = stream(5, 2000, variants=20)
    views, prompts = samples.drawn(range(100, 130))
    assert len(views) == len(set(views)) <= 60, "no more than the steps would encode"
    assert len([view for view in views if view.scale is None]) == len(prompts["class"]) == 30
    assert {view for position in range(100, 130) for view in drawn_at(samples, position)} == set(views)


def drawn_at(samples: CustomDiffusionDataset, position: int) -> list[object]:
    sample = samples.draw(position)
    return [*sample.instance, *sample.class_image]


@pytest.mark.parametrize(
    "more",
    [
        {"variants": 3},
        {"variants": 3, "aug": False},
        {"variants": None, "aug": False},
    ],
)
def test_a_long_run_is_not_walked_through_for_nothing(more: dict[str, object]) -> None:
    samples = stream(5, 7, center_crop=True, **more)
    views, prompts = samples.drawn(range(10**12))
    assert set(views) == {view for position in range(3000) for view in drawn_at(samples, position)}
    assert set(prompts["instance"]) == {samples.draw(position).instance_prompt for position in range(3000)}
    assert len(views) == (5 * 3 if samples.stream.aug else 5 * 2) + 7 * 2


def test_all_that_pairs_show_and_say_is_encoded() -> None:
    samples = stream(5, 7, variants=3, cutmix_probability=0.3)
    views, prompts = samples.drawn(range(500))
    assert set(views) == {view for position in range(500) for view in drawn_at(samples, position)}
    assert set(prompts["instance"]) == {samples.draw(position).instance_prompt for position in range(500)}
    assert set(prompts["class"]) == {samples.draw(position).class_prompt for position in range(500)}
    assert len([view for view in views if view.scale is not None]) <= 5 * 3 + 5 * 2, "pairs share their views"


def test_the_pool_holds_as_many_augmentations_as_asked() -> None:
    samples = stream(5, 0, variants=4)
    for image in range(5):
        seen = {samples.draw(position).instance[0] for position in range(1000)}
        assert len({view for view in seen if view.path.stem == str(image)}) == 4
    others = stream(5, 0, variants=4, seed=7)
    assert not seen & {others.draw(position).instance[0] for position in range(1000)}, (
        "another seed, other augmentations"
    )


def test_a_prompt_fits_its_variant() -> None:
    samples = stream(5, 0, variants=30)
    for position in range(500):
        sample = samples.draw(position)
        small, large = (sample.instance_prompt.startswith(words) for words in (("a far", "very"), ("zoomed", "close")))
        assert small == (sample.instance[0].scale < 0.6 * 64)
        assert large == (sample.instance[0].scale > 64)


# --- memory --------------------------------------------------------------------------------------


@pytest.fixture
def start() -> Callable[[list[str]], Run]:
    return prepare


def vaes() -> list[AutoencoderKL]:
    gc.collect()
    return [thing for thing in gc.get_objects() if isinstance(thing, AutoencoderKL)]


def test_the_vae_is_gone_while_training(
    start: Callable[[list[str]], Run], train_here: Train, base_model: Path, tmp_path: Path
) -> None:
    run = start(command(base_model, tmp_path, "out", validation_prompt="<new1>", num_validation_images=1))
    assert not vaes()
    weights = str(base_model / "vae")
    assert weights not in Path("/proc/self/maps").read_text(), "its file is no longer mapped into memory"
    assert len(validate(run, 1, "validation")) == 1
    assert not vaes(), "loaded for the images, and gone again"
    assert weights not in Path("/proc/self/maps").read_text()
    train(run)


def test_without_the_cache_the_vae_stays(
    start: Callable[[list[str]], Run], train_here: Train, base_model: Path, tmp_path: Path
) -> None:
    run = start(command(base_model, tmp_path, "out", no_latent_cache=True))
    assert vaes() == [run.latents.vae]
    assert not run.dataset.posteriors


def test_torch_compile_leaves_the_model_as_it_is_for_images(
    start: Callable[[list[str]], Run], train_here: Train, base_model: Path, tmp_path: Path
) -> None:
    argv = command(base_model, tmp_path, "out", validation_prompt="<new1>", num_validation_images=1)
    compiled, plain = (start(argv + flag) for flag in (["--torch_compile"], ["--torch_compile=False", "--overwrite"]))
    assert compiled.module.unet_forward != compiled.module.unet.forward, "compiled when it is first called"
    assert plain.module.unet_forward == plain.module.unet.forward
    assert validate(compiled, 1, "validation"), "at once: nothing is compiled for it"


def test_gradients_are_dropped_between_steps(
    start: Callable[[list[str]], Run], base_model: Path, tmp_path: Path
) -> None:
    run = start(command(base_model, tmp_path, "out", max_train_steps=1))
    train(run)
    assert all(parameter.grad is None for parameter in run.module.trained().values())


@pytest.mark.parametrize(("resolution", "wide"), [(64, False), (768, True)])
def test_a_cpu_keeps_little_of_wide_layers(
    start: Callable[[list[str]], Run], base_model: Path, tmp_path: Path, resolution: int, wide: bool
) -> None:
    run = start(command(base_model, tmp_path, "out", resolution=resolution, max_train_steps=1))
    unet = run.module.unet
    assert unet.down_blocks[0].attentions[0].gradient_checkpointing == wide
    assert isinstance(unet.down_blocks[0].resnets[0].norm1, FrozenGroupNorm) == wide
    assert run.module.text_encoders["text_encoder"].is_gradient_checkpointing == wide
    assert not unet.mid_block.attentions[0].gradient_checkpointing, "has few pixels"
    last = unet.up_blocks[-1].attentions[-1]
    assert not last.gradient_checkpointing, "is needed at once"


# --- captions ------------------------------------------------------------------------------------


def rows_encoded(run: Run) -> list[int]:
    """How many captions go through the text encoder at each call from here on."""
    rows: list[int] = []
    run.module.text_encoders["text_encoder"].register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    return rows


def test_class_captions_are_encoded_once(
    start: Callable[[list[str]], Run], train_here: Train, base_model: Path, tmp_path: Path
) -> None:
    run = start(command(base_model, tmp_path, "out"))
    assert list(run.dataset.conditioning) == ["class"]
    rows = rows_encoded(run)
    train(run)
    assert rows == [2] * 4, "the two instance captions of each step, and not the class captions"


def test_without_new_words_the_text_encoder_is_not_needed(
    start: Callable[[list[str]], Run], train_here: Train, base_model: Path, tmp_path: Path
) -> None:
    argv = command(base_model, tmp_path, "out", modifier_token=None, instance_prompt="a cat", validation_prompt="cat")
    run = start(argv)
    rows = rows_encoded(run)
    train(run)
    assert rows == []
    assert validate(run, 4, "test"), "images can be made all the same"


def test_encoded_captions_give_the_loss_of_their_ids(
    start: Callable[[list[str]], Run], train_here: Train, base_model: Path, tmp_path: Path
) -> None:
    run = start(command(base_model, tmp_path, "out"))
    (batch, *_) = training_batches(run)
    latents = run.latents.draw(batch)
    expected = run.module(latents, **batch)[0]
    class_ids = run.dataset.tokenize("cat")["text_encoder"].expand(2, -1)
    assert len(batch.pop("conditioning")["features"]) == 2
    batch["input_ids"] = {"text_encoder": torch.cat([batch["input_ids"]["text_encoder"], class_ids])}
    assert torch.allclose(run.module(latents, **batch)[0], expected, rtol=1e-6)


def test_a_class_caption_with_a_new_word_is_encoded_at_every_step(
    start: Callable[[list[str]], Run], train_here: Train, base_model: Path, tmp_path: Path
) -> None:
    run = start(command(base_model, tmp_path, "out", class_prompt="a cat, no <new1>"))
    assert not run.dataset.conditioning
    rows = rows_encoded(run)
    train(run)
    assert rows == [4] * 4


# --- on disk -------------------------------------------------------------------------------------


def kept(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Name to content and time of writing."""
    paths = (folder / "latents").iterdir()
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def encoded(base_model: Path, tmp_path: Path, train_here: Train) -> Path:
    """The output folder of a run that has kept its latents."""
    train_here(command(base_model, tmp_path, "out", keep_latents=True))
    return tmp_path / "out"


def test_kept_latents_are_used_again(encoded: Path, base_model: Path, tmp_path: Path, train_here: Train) -> None:
    before, weights = kept(encoded), learned(encoded)
    assert all(read_posterior(encoded / "latents" / name).shape == (2, 4, 8, 8) for name in before)
    train_here(command(base_model, tmp_path, "out", keep_latents=True))
    assert kept(encoded) == before, "nothing was encoded again"
    assert torch.equal(learned(encoded), weights)
    train_here(command(base_model, tmp_path, "memory"))
    assert torch.equal(learned(tmp_path / "memory"), weights)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_damaged_latents_are_encoded_again(encoded: Path, base_model: Path, tmp_path: Path, train_here: Train) -> None:
    before, weights = kept(encoded), learned(encoded)
    paths = sorted((encoded / "latents").iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[:-9])
    flipped = bytearray(paths[1].read_bytes())
    flipped[-40] ^= 1
    paths[1].write_bytes(flipped)
    paths[2].write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    paths[3].write_bytes(b"")
    save_file({"something": torch.zeros(3)}, paths[4])
    train_here(command(base_model, tmp_path, "out", keep_latents=True))
    after = kept(encoded)
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }
    assert {name for name in before if after[name] != before[name]} == {path.name for path in paths[:5]}
    assert torch.equal(learned(encoded), weights)
    assert not (tmp_path / "ran").exists(), "a pickle was run"


def test_another_image_is_encoded_and_no_other(
    encoded: Path, base_model: Path, tmp_path: Path, train_here: Train
) -> None:
    before = kept(encoded)
    Image.new("RGB", (120, 80), "green").save(tmp_path / "class" / "1.png")
    train_here(command(base_model, tmp_path, "out", keep_latents=True))
    assert kept(encoded).items() >= before.items()
    assert 1 <= len(kept(encoded)) - len(before) <= 2, "one image and its mirror image"
    train_here(command(base_model, tmp_path, "fresh"))
    assert torch.equal(learned(encoded), learned(tmp_path / "fresh"))


@pytest.mark.parametrize("what", ["weights", "resolution", "precision"])
def test_latents_of_another_vae_size_or_type_are_not_used(
    what: str, encoded: Path, base_model: Path, tmp_path: Path, train_here: Train
) -> None:
    model, more = base_model, {"keep_latents": True, "overwrite": True}
    if what == "weights":
        model = shutil.copytree(base_model, tmp_path / "model")
        (path,) = (model / "vae").glob("*.safetensors")
        weights = load_file(path)
        weights["encoder.conv_in.weight"] *= 1.01
        save_file(weights, path, metadata={"format": "pt"})
    elif what == "resolution":
        more["resolution"] = 72
    else:
        more["mixed_precision"] = "bf16"
    before = kept(encoded)
    train_here(command(model, tmp_path, "out", **more))
    assert len(kept(encoded)) == 2 * len(before)
    train_here(command(model, tmp_path, "fresh", **(more | {"keep_latents": None})))
    assert torch.equal(learned(encoded), learned(tmp_path / "fresh"))


@pytest.mark.long
def test_latents_of_another_canvas_or_pair_are_not_used(base_model: Path, tmp_path: Path, train_here: Train) -> None:
    common = {**two_concepts(tmp_path), "latent_variants": 2}
    common |= {"with_prior_preservation": None, "max_train_steps": 12, "overwrite": True}
    count = 0
    for more in ({}, {"padding_mode": "edge"}, {"cutmix_probability": 1.0}):
        train_here(command(base_model, tmp_path, "out", keep_latents=True, **common, **more))
        count, before = len(kept(tmp_path / "out")), count
        assert count > before
        train_here(command(base_model, tmp_path, "fresh", **common, **more))
        assert torch.equal(learned(tmp_path / "out"), learned(tmp_path / "fresh"))
    # One of a pair may change alone.
    for name in ("0.png", "1.png", "2.png"):
        Image.new("RGB", (96, 96), "green").save(tmp_path / "second" / name)
    train_here(command(base_model, tmp_path, "out", keep_latents=True, **common, **more))
    train_here(command(base_model, tmp_path, "fresh", **common, **more))
    assert torch.equal(learned(tmp_path / "out"), learned(tmp_path / "fresh"))


# Without a training run: views of two images, and a VAE of two layers.


def small_vae(**options: object) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=[8], norm_num_groups=4, sample_size=16, **options).requires_grad_(False)


def encode(folder: Path, vae: AutoencoderKL | None = None) -> dict[View, torch.Tensor]:
    paths = sorted(draw_images(folder / "images", 2).iterdir())
    views = [View(path, flip, 12, 0.3, 0.6) for path in paths for flip in (False, True)]
    (folder / "out").mkdir(exist_ok=True)
    return encode_views(Renderer(16, 16), views, vae or small_vae(), Accelerator(cpu=True), folder / "out" / "latents")


@pytest.mark.parametrize(
    "what",
    [f"{name}.__version__" for name in ("PIL", "torchvision", "torch", "diffusers")] + [RENDERING],
)
def test_latents_of_another_version_are_removed(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode(tmp_path)
    before = kept(tmp_path / "out")
    assert len(before) == 4
    latents = tmp_path / "out" / "latents"
    # As they were named before there were versions; and what is not ours.
    for name in (f"{'0a' * 32}.safetensors", "notes.txt", f"{'x' * 64}.safetensors", "my.safetensors"):
        (latents / name).write_bytes(b"old")
    monkeypatch.setattr(what, "99")
    with caplog.at_level("INFO", "custom_diffusion"):
        encode(tmp_path)
    after = kept(tmp_path / "out")
    assert not after.keys() & before.keys()
    assert after.keys() > {"notes.txt", f"{'x' * 64}.safetensors", "my.safetensors"}
    assert len(after) == 4 + 3
    assert "5 encoded images of other versions are removed from" in caplog.text
    caplog.clear()
    encode(tmp_path)
    assert kept(tmp_path / "out") == after
    assert "removed" not in caplog.text


def test_latents_of_these_versions_stay_where_a_run_does_not_use_them(tmp_path: Path) -> None:
    encode(tmp_path)
    before = kept(tmp_path / "out")
    other = small_vae(latent_channels=8)
    assert next(iter(encode(tmp_path, other).values())).shape[1] == 8
    assert kept(tmp_path / "out").items() > before.items()
    encode(tmp_path)
    assert len(kept(tmp_path / "out")) == 8


def test_a_vae_without_quant_conv_is_one(tmp_path: Path) -> None:
    with_it, without = small_vae(), small_vae(use_quant_conv=False)
    assert without.quant_conv is None
    encoded, others = encode(tmp_path, without), encode(tmp_path, with_it)
    assert all(torch.isfinite(posterior).all() for posterior in encoded.values())
    assert not any(torch.equal(encoded[view], others[view]) for view in encoded)
    assert len(kept(tmp_path / "out")) == 8
    again = encode(tmp_path, without)
    assert all(torch.equal(again[view], encoded[view]) for view in encoded)


# --- reading losses ------------------------------------------------------------------------------


def test_losses_that_are_read_later_are_logged_at_their_steps(
    start: Callable[[list[str]], Run], train_here: Train, base_model: Path, tmp_path: Path
) -> None:
    more = {"max_train_steps": 7, "checkpointing_steps": 5, "report_to": "tensorboard"}
    train_here(command(base_model, tmp_path, "each", **more))
    run = start(command(base_model, tmp_path, "later", **more))
    train(run, read_every=3)
    run.accelerator.end_training()
    assert len(losses(tmp_path / "each")) == 7
    assert np.array_equal(losses(tmp_path / "later"), losses(tmp_path / "each"))
    assert torch.equal(learned(tmp_path / "later" / "checkpoint-5"), learned(tmp_path / "each" / "checkpoint-5"))


def test_a_broken_loss_is_found_before_the_next_checkpoint(
    start: Callable[[list[str]], Run], train_here: Train, base_model: Path, tmp_path: Path
) -> None:
    run = start(command(base_model, tmp_path, "out", max_train_steps=9, learning_rate=1e30, checkpointing_steps=5))
    with pytest.raises(UserError, match=r"the loss of step 2 is not finite.*there is no checkpoint yet"):
        train(run, read_every=1000)
    assert not list((tmp_path / "out").glob("*checkpoint*"))


@pytest.mark.parametrize("more", [[], ["--no_latent_cache"]])
def test_data_workers_that_are_started_afresh(more: list[str], base_model: Path, images: Path, tmp_path: Path) -> None:
    """As on macOS, and on Linux from Python 3.14 on: they are sent the data set rather than forked with it."""
    argv = flags(base_model, images, tmp_path / "out", max_train_steps=1, dataloader_num_workers=1)
    code = "import multiprocessing, sys; multiprocessing.set_start_method('spawn'); import train_custom_diffusion; "
    code += "train_custom_diffusion.main(sys.argv[1:])"
    result = run_script("python", "-c", code, *argv, *more)
    assert result.returncode == 0, result.stderr
    assert load_concept(tmp_path / "out").tokens
