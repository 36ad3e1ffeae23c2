"""Generated class images: what draws them, how often the model is asked, and that earlier ones can be made again."""

from __future__ import annotations

import gc
import hashlib
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from custom_diffusion.data import class_images
from custom_diffusion.data.class_images import derived_seed, generate_class_images, images_at_once
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.errors import UserError
from custom_diffusion.models import drawing
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.families import StableDiffusion, StableDiffusionXL
from custom_diffusion.training.settings import describe_settings
from tests.conftest import flags, train
from train_custom_diffusion import parse_args


def generate(model: Path, folder: Path, count: int = 3, **more: object) -> dict[int, str]:
    """Number and digest of the images that the folder has then."""
    argv = flags(model, Path(), Path(), num_class_images=count, **({"sample_batch_size": 2} | more))
    entry = ConceptEntry("photo of a <new1> cat", ".", "cat", str(folder))
    generate_class_images(BaseModel(str(model)), [entry], Accelerator(cpu=True), parse_args(argv))
    return {int(number): digest for number, digest in (path.stem.split("-") for path in folder.glob("*.jpg"))}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """How often UNet and text encoder are asked."""
    counts = SimpleNamespace(unet=0, text=0)

    def count(kind: type[Any], name: str) -> None:
        forward = kind.forward

        def counting(*args: Any, **options: Any) -> Any:
            setattr(counts, name, getattr(counts, name) + 1)
            return forward(*args, **options)

        monkeypatch.setattr(kind, "forward", counting)

    count(UNet2DConditionModel, "unet")
    count(CLIPTextModel, "text")
    return counts


@pytest.mark.long
@pytest.mark.parametrize("name", ["base_model", "base_model_v"])
def test_the_examples_way_gives_the_examples_images(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, calls: SimpleNamespace
) -> None:
    model = request.getfixturevalue(name)
    made = generate(model, tmp_path, class_image_scheduler="default")
    assert calls.unet == 2 * 50, "two batches"
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    for numbers in ([0, 1], [2]):
        generators = [torch.Generator().manual_seed(derived_seed(42, "cat", number)) for number in numbers]
        for number, image in zip(numbers, pipeline(["cat"] * len(numbers), generator=generators).images, strict=True):
            assert made[number] == hashlib.sha1(image.tobytes(), usedforsecurity=False).hexdigest()


def test_dpm_solver_needs_half_the_steps_and_reads_the_prompt_once(
    base_model: Path, tmp_path: Path, calls: SimpleNamespace
) -> None:
    generate(base_model, tmp_path / "six", count=6)
    assert calls.unet == 3 * 25
    assert calls.text == 2, "the prompt and the empty one, for all three batches"
    calls.unet = 0
    generate(base_model, tmp_path / "few", count=2, class_image_steps=3)
    assert calls.unet == 3


def test_it_is_dpm_solver_as_infer_has_it(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    draw = StableDiffusionPipeline.__call__

    def look(self: StableDiffusionPipeline, **options: Any) -> Any:
        used.append(self.scheduler)
        return draw(self, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", look)
    generate(base_model, tmp_path, count=1, class_image_steps=2)
    (scheduler,) = used
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    assert scheduler.config.algorithm_type == "dpmsolver++"


@pytest.mark.long
def test_images_of_either_kind_fill_a_folder_together(base_model: Path, tmp_path: Path) -> None:
    few = {"class_image_steps": 2}
    first = generate(base_model, tmp_path / "mixed", count=2, class_image_scheduler="default", **few)
    mixed = generate(base_model, tmp_path / "mixed", count=4, **few)
    whole = generate(base_model, tmp_path / "whole", count=4, **few)
    assert {number: mixed[number] for number in (0, 1)} == first, "what is there already stays and counts"
    assert {number: mixed[number] for number in (2, 3)} == {number: whole[number] for number in (2, 3)}
    assert not first.items() & whole.items()
    # An interrupted generation makes the images that it would have made.
    for number in (2, 3):
        (tmp_path / "whole" / f"{number}-{whole[number]}.jpg").unlink()
    assert generate(base_model, tmp_path / "whole", count=4, **few) == whole


def test_how_they_are_drawn_is_no_setting_of_the_training() -> None:
    # The images themselves are compared when a run is resumed.
    argv = flags(Path(), Path(), Path())
    settings = [
        describe_settings(parse_args([*argv, *more]), [], [], [], [], 1)
        for more in ([], ["--class_image_scheduler=default", "--class_image_steps=30"])
    ]
    assert settings[0] == settings[1]


def test_a_model_that_dpm_solver_does_not_know_gets_a_line(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("squares is not implemented")

    monkeypatch.setattr(DPMSolverMultistepScheduler, "from_config", refuse)
    with pytest.raises(UserError, match=r"cannot be sampled with --class_image_scheduler dpmsolver\+\+: squares"):
        generate(base_model, tmp_path)


# --- how many at once, and in which precision ----------------------------------------------------

SD = {"block_out_channels": (128, 256, 512, 512)}  # of a VAE


@pytest.mark.parametrize(
    ("family", "latent_size", "dtype", "gib", "count"),
    [
        (StableDiffusion(), 64, torch.float16, 80, 32),  # more are hardly faster
        (StableDiffusion(), 64, torch.float16, 5, 5),  # 0.5 GiB each, of half of what is free
        (StableDiffusion(), 64, torch.float32, 5, 2),
        (StableDiffusion(), 96, torch.float16, 5, 2),
        (StableDiffusion(), 64, torch.float16, 0, 1),
        (StableDiffusionXL(), 128, torch.float16, 16, 2),  # its VAE works in fp32: 4 GiB each
    ],
)
def test_as_many_at_once_as_half_of_the_memory_holds(
    family: StableDiffusion | StableDiffusionXL, latent_size: int, dtype: torch.dtype, gib: int, count: int
) -> None:
    model: Any = SimpleNamespace(
        vae_configuration=lambda: SD,
        unet_configuration=lambda: {"sample_size": latent_size},
        family=lambda: family,
    )
    assert images_at_once(model, dtype, gib * 2**30) == count


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the pipeline was asked for."""
    counts = []
    draw = StableDiffusionPipeline.__call__

    def count(self: StableDiffusionPipeline, **options: Any) -> Any:
        counts.append(len(options["generator"]))
        if counts[-1] > 2 and len(counts) == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return draw(self, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", count)
    return counts


def test_batches_are_halved_where_the_memory_is_too_small(
    base_model: Path, tmp_path: Path, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_images, "images_at_once", lambda *_: 4)
    few = {"count": 5, "class_image_steps": 2}
    made = generate(base_model, tmp_path / "automatic", sample_batch_size=None, **few)
    assert batches == [4, 2, 2, 1]
    # An image does not depend on how many are generated at once, but for rounding.
    generate(base_model, tmp_path / "given", sample_batch_size=2, **few)
    assert sorted(made) == [0, 1, 2, 3, 4]
    for number in made:
        one, other = (next((tmp_path / name).glob(f"{number}-*.jpg")) for name in ("automatic", "given"))
        difference = np.asarray(Image.open(one), dtype=int) - np.asarray(Image.open(other))
        assert np.abs(difference).max() <= 8, "JPEG may make a level several"


def test_a_given_batch_size_is_kept(base_model: Path, tmp_path: Path, batches: list[int]) -> None:
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        generate(base_model, tmp_path, count=5, class_image_steps=2, sample_batch_size=5)
    assert batches == [5]


def test_the_fastest_precision_is_taken(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "computes_bf16", lambda: True)
    used = []
    load = BaseModel.pipeline

    def look(self: BaseModel, dtype: torch.dtype, **options: Any) -> Any:
        used.append(dtype)
        return load(self, dtype, **options)

    monkeypatch.setattr(BaseModel, "pipeline", look)
    few = {"count": 1, "class_image_steps": 1}
    generate(base_model, tmp_path / "tiny", **few)
    monkeypatch.setattr(drawing, "WIDE_ENOUGH_FOR_BF16", 1)
    generate(base_model, tmp_path / "fastest", **few)
    generate(base_model, tmp_path / "fp32", prior_generation_precision="fp32", **few)
    generate(base_model, tmp_path / "no", prior_generation_precision="no", **few)
    assert used == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_the_pipeline_is_gone_before_training_loads_its_own(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = BaseModel.pipeline

    def look(self: BaseModel, *args: Any, **options: Any) -> Any:
        pipeline = load(self, *args, **options)
        loaded.append(weakref.ref(pipeline.unet))
        return pipeline

    monkeypatch.setattr(BaseModel, "pipeline", look)
    generate(base_model, tmp_path, count=1, class_image_steps=1)
    gc.collect()
    assert [unet() for unet in loaded] == [None]


def test_class_images_of_another_base_model_are_warned_of(
    base_model: Path, base_model_v: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "cat"}
    more |= {"num_class_images": 2, "max_train_steps": 1, "class_image_steps": 1}
    for model, warned in ((base_model, False), (base_model, False), (base_model_v, True)):
        caplog.clear()
        train(flags(model, images, tmp_path / f"out-{model.name}", overwrite=True, **more))
        said = f"holds class images generated by {str(base_model)!r}"
        assert (said in caplog.text) is warned
