"""Generated class images: what draws them, how often the model is asked, and that earlier ones can be made again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from custom_diffusion.data.class_images import derived_seed, generate_class_images
from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.training.settings import describe_settings
from tests.conftest import flags
from train_custom_diffusion import parse_args


def generate(model: Path, folder: Path, count: int = 3, **more: object) -> dict[int, str]:
    """Number and digest of the images that the folder has then."""
    argv = flags(model, Path(), Path(), num_class_images=count, sample_batch_size=2, **more)
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
        describe_settings(parse_args([*argv, *more]), [], [], [], 1)
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
