"""infer.py's samplers: the same image whatever scheduler the base model was saved with."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

import infer
from custom_diffusion import UserError
from custom_diffusion.command_line import SCHEDULERS
from custom_diffusion.models.samplers import build_sampler
from tools.base.train_unet import new_scheduler

# How the model was trained; the rest of a scheduler's configuration is about sampling.
TRAINING = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler") and hasattr(getattr(diffusers, name), "from_config")
    and {"beta_start", "prediction_type"} <= set(inspect.signature(getattr(diffusers, name).__init__).parameters)
)  # fmt: skip


def configuration(scheduler: Any) -> dict[str, Any]:
    """What a scheduler is made of."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}


def saved(scheduler: Any) -> dict[str, Any]:
    """The configuration as it comes out of a file."""
    return json.loads(scheduler.to_json_string())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_no_class_leaves_a_trace(prediction: str) -> None:
    assert len(CLASSES) >= 15
    reference = new_scheduler(prediction)
    expected = {name: configuration(build_sampler(name, saved(reference))) for name in SCHEDULERS}
    for name in CLASSES:
        kind = getattr(diffusers, name)
        # Made from a model's configuration, and with the class's own defaults for all that is not about training.
        for scheduler in (kind.from_config(reference.config), kind(**TRAINING, prediction_type=prediction)):
            for sampler in SCHEDULERS:
                assert configuration(build_sampler(sampler, saved(scheduler))) == expected[sampler], name


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_sample": True}, {"set_alpha_to_one": True}, {"steps_offset": 0}, {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing"}, {"thresholding": True}, {"use_karras_sigmas": True},
        {"final_sigmas_type": "sigma_min"}, {"use_exponential_sigmas": True}, {"algorithm_type": "sde-dpmsolver++"},
        {"skip_prk_steps": False}, {"sigma_min": 0.1, "sigma_max": 9.0}, {"lower_order_final": False},
    ],
)  # fmt: skip
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_no_setting_of_another_sampler_leaves_a_trace(sampler: str, settings: dict[str, Any]) -> None:
    reference = saved(new_scheduler("epsilon"))
    sampled = build_sampler(sampler, reference | settings)
    assert configuration(sampled) == configuration(build_sampler(sampler, reference))


def test_the_default_is_stable_diffusions_ddim() -> None:
    reference = new_scheduler("v_prediction")
    sampler = build_sampler("ddim", saved(reference))
    assert type(sampler) is diffusers.DDIMScheduler
    assert configuration(sampler) == configuration(reference)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_how_the_model_was_trained_stays(sampler: str) -> None:
    trained = {"num_train_timesteps": 500, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    config = build_sampler(sampler, trained | {"prediction_type": "v_prediction"}).config
    assert {name: config[name] for name in trained} == trained
    assert config.prediction_type == "v_prediction"
    own = build_sampler(sampler, {"trained_betas": [0.1] * 10, "num_train_timesteps": 10})
    assert own.betas.tolist() == pytest.approx([0.1] * 10)
    # Trained on pure noise: sampling begins there.
    sampler_of_pure_noise = build_sampler(sampler, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    sampler_of_pure_noise.set_timesteps(10)
    assert sampler_of_pure_noise.timesteps[0] == 999


def test_what_a_sampler_does_not_know_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot be sampled with --scheduler euler") as caught:
        build_sampler("euler", {"beta_schedule": "unheard_of"})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def reference(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return image(trained, None, tmp_path_factory.mktemp("reference"))


def image(concept: Path, base_model: Path | None, folder: Path, *more: str) -> np.ndarray:
    argv = ["--model_dir", str(concept), "--prompt", "<new1> cat", "--num_inference_steps", "6", *more]
    if base_model is not None:
        argv += ["--pretrained_model_name_or_path", str(base_model)]
    infer.main([*argv, "--output_dir", str(folder)])
    return np.asarray(Image.open(next(folder.glob("0*.png"))), dtype=int)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "LCMScheduler", "IPNDMScheduler", "DPMSolverSDEScheduler"])
def test_a_base_model_with_another_scheduler_gives_the_same_image(
    name: str, reference: np.ndarray, trained: Path, base_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base_model, copy, symlinks=True)
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"][1] = name
    (copy / "model_index.json").write_text(json.dumps(index))
    # What the class's own defaults give, as its save_pretrained writes it.
    kind = inspect.signature(getattr(diffusers, name).__init__).parameters
    own = {key: TRAINING[key] for key in TRAINING if key in kind} | {"_class_name": name}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(own))
    assert np.array_equal(image(trained, copy, tmp_path / "out"), reference)
