"""Training runs from the command line to the files, checkpoints and resuming included."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import export
import infer
import merge
from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.files import load_concept
from custom_diffusion.errors import UserError
from custom_diffusion.machine import computes_bf16
from tests.conftest import draw_images, flags, launch, prepare, run_script

Train = Callable[[list[str]], None]
WEIGHTS = "pytorch_custom_diffusion_weights"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def checkpoints(folder: Path) -> set[str]:
    return {name for name in names(folder) if "checkpoint" in name}


def learned(folder: Path) -> dict[str, torch.Tensor]:
    concept = load_concept(folder)
    return concept.tensors()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


# --- what the example's own tests hold -----------------------------------------------------------


def test_example_1_two_steps_write_both_files(base_model: Path, images: Path, tmp_path: Path) -> None:
    launch(
        *flags(base_model, images, tmp_path, instance_prompt="<new1>", scale_lr=True, gradient_accumulation_steps=1),
        "--no_safe_serialization",
    )
    assert (tmp_path / f"{WEIGHTS}.bin").is_file()
    assert (tmp_path / "<new1>.bin").is_file()
    assert not list(tmp_path.glob("*.safetensors")), "--no_safe_serialization leaves the .bin files alone"


@pytest.mark.long
def test_example_2_the_limit_keeps_the_newest_checkpoints(base_model: Path, images: Path, tmp_path: Path) -> None:
    argv = flags(base_model, images, tmp_path, max_train_steps=6, checkpoints_total_limit=2, checkpointing_steps=2)
    launch(*argv)
    assert checkpoints(tmp_path) == {"checkpoint-4", "checkpoint-6"}


def test_example_3_resuming_removes_several_checkpoints(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(flags(base_model, images, tmp_path, max_train_steps=4, checkpointing_steps=2))
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-4"}
    launch(
        *flags(base_model, images, tmp_path, max_train_steps=8, checkpointing_steps=2, checkpoints_total_limit=2),
        "--resume_from_checkpoint=checkpoint-4",
    )
    assert checkpoints(tmp_path) == {"checkpoint-6", "checkpoint-8"}


# --- one run with everything ---------------------------------------------------------------------


def test_the_output_folder(trained: Path) -> None:
    assert names(trained) == {
        f"{WEIGHTS}.bin",
        f"{WEIGHTS}.safetensors",
        "<new1>.bin",
        "<new1>.safetensors",
        "README.md",
        "config.yaml",
        "image_0.png",
        "image_1.png",
        "checkpoint-3",
        "checkpoint-6",
        "validation",
        "logs",
        "training_settings.json",
        "training_log.json",
        "report.html",
    }
    for ending in ("bin", "safetensors"):
        assert (trained / f"<new1>.{ending}").stat().st_size < 4096, "a vector, not the table it was cut from"


def test_saved_keys_and_shapes_are_the_examples(trained: Path) -> None:
    binary = torch.load(trained / f"{WEIGHTS}.bin", weights_only=True)
    weights = {key: value for key, value in binary.items() if len(value)}
    layers = [
        "down_blocks.0.attentions.0.transformer_blocks.0",
        "mid_block.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.1.transformer_blocks.0",
    ]
    assert set(weights) == {
        f"{layer}.attn2.processor.to_{part}_custom_diffusion.weight" for layer in layers for part in "kv"
    }
    assert set(binary) - set(weights) == {f"{layer}.attn1.processor" for layer in layers}
    assert weights[
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
    ].shape == (
        32,
        32,
    )
    safe = {key: value for key, value in load_file(trained / f"{WEIGHTS}.safetensors").items() if len(value)}
    assert_equal(weights, safe)
    token = torch.load(trained / "<new1>.bin", weights_only=True)
    assert token.keys() == {"<new1>"}
    assert token["<new1>"].shape == (32,)
    assert token["<new1>"].dtype == torch.float32
    assert_equal(token, load_file(trained / "<new1>.safetensors"))


def test_something_was_learned_and_nothing_is_broken(trained: Path, base_model: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(base_model)
    for key, value in load_concept(trained).attention.items():
        name = key.replace(".processor.", ".").replace("_custom_diffusion", "")
        assert not torch.allclose(value, pipeline.unet.state_dict()[name], atol=1e-3), f"{name} has not moved"
    start = pipeline.text_encoder.get_input_embeddings().weight[42170]
    assert not torch.allclose(load_concept(trained).tokens["<new1>"]["text_encoder"], start, atol=1e-3)


def test_every_checkpoint_is_a_concept(trained: Path, base_model: Path) -> None:
    for name in ("checkpoint-3", "checkpoint-6"):
        assert names(trained / name) == {f"{WEIGHTS}.safetensors", "<new1>.safetensors", "README.md", "training_state"}
        pipeline = StableDiffusionPipeline.from_pretrained(base_model)
        concept = load_concept(trained / name)
        assert concept.base_model == str(base_model)
        apply_concepts(pipeline, concept)
    assert_equal(learned(trained / "checkpoint-6"), learned(trained))
    assert "| steps | 3 |" in (trained / "checkpoint-3" / "README.md").read_text()


def test_checkpoints_hold_only_what_is_trained(trained: Path) -> None:
    size = sum(path.stat().st_size for path in (trained / "checkpoint-6").rglob("*") if path.is_file())
    values = sum(value.numel() for value in learned(trained).values())
    # The values and Adam's two moments, and some 50 kB for random states, file headers and the card.
    assert size < 3 * 4 * values + 60_000


def test_validation_images_are_written_and_logged(trained: Path) -> None:
    # Steps 2 and 4 on the way (once each, though two batches make a step) and 6 at the end.
    assert names(trained / "validation") == {f"step_00000{step}_{i}.png" for step in (2, 4, 6) for i in range(2)}
    first = np.asarray(Image.open(trained / "validation" / "step_000002_0.png"), dtype=int)
    last = np.asarray(Image.open(trained / "validation" / "step_000006_0.png"), dtype=int)
    assert first.shape == (64, 64, 3)
    assert np.abs(first - last).mean() > 1, "the concept has changed in between"
    events = EventAccumulator(str(trained / "logs" / "custom-diffusion"), size_guidance={"images": 0})
    events.Reload()
    assert {event.step for event in events.Images("validation")} == {2, 4}
    assert {event.step for event in events.Images("test")} == {6}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert all(event.value == pytest.approx(1e-2) for event in events.Scalars("lr"))
    for loss, instance, prior in zip(
        events.Scalars("loss"), events.Scalars("instance_loss"), events.Scalars("prior_loss"), strict=True
    ):
        assert loss.value == pytest.approx(instance.value + prior.value, rel=1e-4)


def test_the_card_tells_what_is_needed(trained: Path, base_model: Path) -> None:
    card = ModelCard.load(trained / "README.md")
    assert card.data.base_model == str(base_model)
    assert card.data.instance_prompt == "photo of a <new1> cat"
    assert card.data.license
    for text in ("`<new1>`", "./image_0.png", "./image_1.png", "_pipeline=pipeline", "| steps | 6 |"):
        assert text in card.text


def test_generated_class_images(trained: Path) -> None:
    images = sorted((trained.parent / "class").glob("*.jpg"))
    assert [path.name.split("-")[0] for path in images] == ["0", "1", "2"]
    assert len({Image.open(path).tobytes() for path in images}) == 3


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "unknown_then"), [(0, ()), (2, ("padding_mode", "cutmix_probability"))])
def test_a_resumed_run_ends_bit_equal(
    trained: Path,
    base_model: Path,
    images: Path,
    tmp_path: Path,
    workers: int,
    unknown_then: tuple[str, ...],
    train_here: Train,
) -> None:
    shutil.copytree(trained / "checkpoint-3", tmp_path / "checkpoint-3")
    # Flags that an earlier version did not have stand in none of its files.
    path = tmp_path / "checkpoint-3" / "training_state" / "training_settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in settings.items() if name not in unknown_then}))
    train_here(
        flags(
            base_model,
            images,
            tmp_path,
            with_prior_preservation=True,
            class_data_dir=trained.parent / "class",
            class_prompt="cat",
            num_class_images=3,
            learning_rate=1e-2,
            max_train_steps=6,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
            hflip=True,
            resume_from_checkpoint="latest",
        )
    )
    assert_equal(learned(tmp_path), learned(trained))


def test_latest_starts_afresh_where_there_is_none(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, caplog: pytest.LogCaptureFixture
) -> None:
    train_here(flags(base_model, images, tmp_path / "out", resume_from_checkpoint="latest"))
    assert "no checkpoint" in caplog.text
    assert "starts afresh" in caplog.text
    assert learned(tmp_path / "out")


def test_resuming_with_other_settings_is_refused(
    trained: Path, base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    shutil.copytree(trained / "checkpoint-3", tmp_path / "checkpoint-3")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    more = {"modifier_token": "<new2>", "instance_prompt": "<new2>", "resume_from_checkpoint": "checkpoint-3"}
    with pytest.raises(UserError) as caught:
        train_here(flags(base_model, images, tmp_path, **more))
    for difference in ('modifier_token "<new1>" -> "<new2>"', "learning_rate 0.01 -> 1e-05", "--overwrite"):
        assert difference in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_other_projections_is_refused(
    trained: Path, base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    shutil.copytree(trained / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "training_state" / "training_settings.json").unlink()
    more = {"freeze_model": "crossattn", "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match=r"does not fit this run .*to_q"):
        train_here(flags(base_model, images, tmp_path, **more))


def test_another_runs_folder_is_not_written_to(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(flags(base_model, images, tmp_path, checkpointing_steps=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"seed 42 -> 43.*--overwrite"):
        train_here(flags(base_model, images, tmp_path, seed=43))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    train_here(flags(base_model, images, tmp_path, checkpointing_steps=1, max_train_steps=1))  # the same settings
    train_here(flags(base_model, images, tmp_path, seed=43, overwrite=True))
    assert not checkpoints(tmp_path), "those of the other run are gone, so that latest cannot pick them"


def test_a_half_written_checkpoint_is_never_picked(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(flags(base_model, images, tmp_path, checkpointing_steps=1, max_train_steps=1))
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-2.tmp")
    (tmp_path / ".checkpoint-2.tmp" / f"{WEIGHTS}.safetensors").write_bytes(b"half")
    argv = flags(base_model, images, tmp_path, checkpointing_steps=1, resume_from_checkpoint="latest")
    train_here(argv)
    assert checkpoints(tmp_path) == {"checkpoint-1", "checkpoint-2"}


# --- variants ------------------------------------------------------------------------------------


def test_without_modifier_token(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    train_here(flags(base_model, images, tmp_path, modifier_token=None, instance_prompt="photo of a cat"))
    concept = load_concept(tmp_path)
    assert concept.attention
    assert not concept.tokens


def test_several_concepts(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    pots = draw_images(tmp_path / "pot", 3)
    concepts = [
        {"instance_prompt": "photo of a <new1> cat", "instance_data_dir": str(images)},
        {"instance_prompt": "photo of a <new2> pot", "instance_data_dir": str(pots)},
    ]
    (tmp_path / "list.json").write_text(json.dumps(concepts))
    more = {"instance_prompt": None, "concepts_list": tmp_path / "list.json", "modifier_token": "<new1>+<new2>"}
    train_here(flags(base_model, tmp_path, tmp_path / "out", instance_data_dir=None, learning_rate=1e-2, **more))
    tokens = load_concept(tmp_path / "out").tokens
    table = StableDiffusionPipeline.from_pretrained(base_model).text_encoder.get_input_embeddings().weight
    assert list(tokens) == ["<new1>", "<new2>"]
    assert torch.allclose(tokens["<new1>"]["text_encoder"], table[42170], atol=0.1)
    assert torch.allclose(tokens["<new2>"]["text_encoder"], table[47629], atol=0.1)


def test_real_class_images(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    draw_images(tmp_path / "real" / "images", 4)
    (tmp_path / "real" / "images.txt").write_text("".join(f"{tmp_path}/real/images/{i}.png\n" for i in range(4)))
    (tmp_path / "real" / "caption.txt").write_text("".join(f"cat number {i}\n" for i in range(4)))
    more = {"class_prompt": "cat", "class_data_dir": tmp_path / "real", "num_class_images": 3}
    train_here(flags(base_model, images, tmp_path / "out", with_prior_preservation=True, real_prior=True, **more))
    assert learned(tmp_path / "out")
    assert names(tmp_path / "real" / "images") == {f"{i}.png" for i in range(4)}, "nothing is added"


@pytest.mark.parametrize(
    "more",
    [
        {"freeze_model": "crossattn", "mixed_precision": "bf16", "gradient_checkpointing": True, "noaug": True},
        {"lr_scheduler": "cosine", "set_grads_to_none": True, "mixed_precision": "bf16", "scale_lr": True},
    ],
)
def test_combinations_of_flags(
    more: dict[str, object], base_model_v: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(flags(base_model_v, images, tmp_path, **more))
    weights = learned(tmp_path)
    assert all(value.dtype == torch.float32 for value in weights.values())
    keys = {key.split(".processor.")[1] for key in weights if ".processor." in key}
    queries_and_outputs = {
        "to_q_custom_diffusion.weight",
        "to_out_custom_diffusion.0.weight",
        "to_out_custom_diffusion.0.bias",
    }
    assert (queries_and_outputs <= keys) == (more.get("freeze_model") == "crossattn")
    apply_concepts(StableDiffusionPipeline.from_pretrained(base_model_v), load_concept(tmp_path))


def test_updates_are_not_lost_in_bfloat16(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, caplog: pytest.LogCaptureFixture
) -> None:
    # An update of 1e-5 is far below what bfloat16 resolves at the size of these weights.
    train_here(flags(base_model, images, tmp_path, mixed_precision="bf16", max_train_steps=3))
    plain = StableDiffusionPipeline.from_pretrained(base_model).unet.state_dict()
    for key, value in load_concept(tmp_path).attention.items():
        moved = (value - plain[key.replace(".processor.", ".").replace("_custom_diffusion", "")]).abs()
        assert 0 < moved.max() < 1e-4
        assert (moved > 0).float().mean() > 0.9
    assert ("no instructions for bf16" in caplog.text) == (not computes_bf16())


def test_eight_bit_adam(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    train_here(flags(base_model, images, tmp_path, use_8bit_adam=True))
    assert learned(tmp_path)


def test_epochs_are_counted_in_images(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    # Five images in batches of two are three batches, and two of these make a step: two steps an epoch.
    more = {"max_train_steps": None, "num_train_epochs": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    train_here(flags(base_model, images, tmp_path, **more))
    assert capsys.readouterr().out.strip().startswith("6 steps")


def test_the_learning_rate_is_scaled(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, caplog: pytest.LogCaptureFixture
) -> None:
    class_images = draw_images(tmp_path / "class", 2)
    more = {
        "with_prior_preservation": True,
        "class_data_dir": class_images,
        "class_prompt": "cat",
        "num_class_images": 2,
    }
    more |= {"scale_lr": True, "train_batch_size": 2, "gradient_accumulation_steps": 3, "report_to": "tensorboard"}
    train_here(flags(base_model, images, tmp_path / "out", max_train_steps=1, **more))
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "custom-diffusion"))
    events.Reload()
    assert events.Scalars("lr")[0].value == pytest.approx(1e-5 * 2 * 3 * 2)


def test_class_images_are_topped_up(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    more = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "class_prompt": "cat"}
    argv = flags(base_model, images, tmp_path / "out", max_train_steps=1, **more)
    train_here([*argv, "--num_class_images=4", "--sample_batch_size=3"])
    all_four = {path.name: path.read_bytes() for path in (tmp_path / "class").glob("*.jpg")}
    assert sorted(name.split("-")[0] for name in all_four) == ["0", "1", "2", "3"]
    removed = next(name for name in all_four if name.startswith("1-"))
    (tmp_path / "class" / removed).unlink()
    kept = {name: (tmp_path / "class" / name).stat().st_mtime_ns for name in all_four if name != removed}
    train_here([*argv, "--num_class_images=4", "--sample_batch_size=1"])
    # The one that was gone is made again from its own noise (batches round differently), and no other is touched.
    assert {name: (tmp_path / "class" / name).stat().st_mtime_ns for name in kept} == kept
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "class").glob("*.jpg")) == ["0", "1", "2", "3"]


def test_wandb_gets_losses_and_images(base_model: Path, images: Path, tmp_path: Path) -> None:
    argv = flags(base_model, images, tmp_path / "out", report_to="wandb", max_train_steps=3)
    result = launch(
        *argv,
        "--validation_prompt=<new1>",
        "--validation_steps=2",
        "--num_validation_images=1",
        WANDB_DIR=str(tmp_path),
    )
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 2
    assert re.search(r"follow this run: wandb sync \S*offline-run-", result.stderr)


@pytest.mark.long
def test_comet_gets_losses_images_and_no_secret(base_model: Path, images: Path, tmp_path: Path) -> None:
    argv = flags(base_model, images, tmp_path / "out", report_to="comet_ml", max_train_steps=3)
    result = launch(
        *argv,
        "--validation_prompt=<new1>",
        "--validation_steps=2",
        "--num_validation_images=1",
        COMET_API_KEY="dummy",
        COMET_START_ONLINE="0",
        COMET_OFFLINE_DIRECTORY=str(tmp_path / "comet"),
    )
    assert "follow this run: Comet, offline" in result.stderr
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        text = file.read("messages.json").decode()
    metrics = [json.loads(line)["payload"]["metric"] for line in text.splitlines() if '"metricName"' in line]
    assert sorted(entry["step"] for entry in metrics if entry["metricName"] == "loss") == [1, 2, 3]
    assert [entry["metricValue"] for entry in metrics if entry["metricName"] == "lr"] == [1e-5] * 3
    assert set(re.findall(r"(?:validation|test) 0: <new1>", text)) == {"validation 0: <new1>", "test 0: <new1>"}
    assert "hub_token" not in text


def test_no_secret_in_any_file(base_model: Path, images: Path, tmp_path: Path) -> None:
    secrets = {"HF_TOKEN": "hf_environment", "WANDB_API_KEY": "4" * 40, "MY_PASSWORD": "swordfish-and-more"}
    argv = flags(base_model, images, tmp_path / "out", checkpointing_steps=1, max_train_steps=1)
    launch(*argv, "--report_to=tensorboard", "--hub_token=hf_argument", WANDB_DIR=str(tmp_path), **secrets)
    launch(*argv, "--report_to=wandb", WANDB_DIR=str(tmp_path), **secrets)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(".wandb" in path.name for path in files)
    for path in files:
        for secret in ("hf_argument", *secrets.values()):
            assert secret.encode() not in path.read_bytes(), f"{secret} stands in {path}"


@pytest.mark.long
def test_all_cores_are_used(base_model: Path, images: Path, tmp_path: Path) -> None:
    code = (
        "import os, torch; from custom_diffusion.machine import use_all_cores; use_all_cores();"
        "assert torch.get_num_threads() == len(os.sched_getaffinity(0)), torch.get_num_threads()"
    )
    for environment in ({"OMP_NUM_THREADS": "1"}, {}):
        result = run_script("python", "-c", code, **environment)
        assert result.returncode == 0, result.stderr


def test_a_result_in_half_precision_takes_half_and_opens_everywhere(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    more = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2}
    train_here(flags(base_model, images, tmp_path / "whole", **more))
    train_here(flags(base_model, images, tmp_path / "half", **more, save_precision="fp16"))
    whole, half = learned(tmp_path / "whole"), learned(tmp_path / "half")
    assert whole.keys() == half.keys()
    assert {value.dtype for key, value in half.items() if "to_" in key} == {torch.float16}
    assert all(torch.equal(half[key], value.to(half[key].dtype)) for key, value in whole.items())
    assert_equal(learned(tmp_path / "whole" / "checkpoint-2"), learned(tmp_path / "half" / "checkpoint-2"))

    argv = ["--prompt", "<new1> cat", "--num_inference_steps", "2", "--output_dir", tmp_path / "images", "--model_dir"]
    infer.main([str(part) for part in (*argv, tmp_path / "half")])
    merge.main(["--model_dir", str(tmp_path / "half"), "--prior_weight=0.5", "--output_dir", str(tmp_path / "weighed")])
    assert load_concept(tmp_path / "weighed").attention.keys() == load_concept(tmp_path / "half").attention.keys()
    for form in ("lora", "delta", "pipeline"):
        export.main(["--model_dir", str(tmp_path / "half"), "--format", form, "--output_dir", str(tmp_path / form)])


# --- what an output folder holds ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "image_0.png", "pytorch_custom_diffusion_weights.bin"])
def test_what_no_training_has_left_is_not_replaced(
    name: str, base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{re.escape(name)}' already exists and was not written .*--overwrite"):
        train_here(flags(base_model, images, tmp_path, max_train_steps=1))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_flags_may_come_from_a_file_in_the_output_folder(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    (tmp_path / "config.yaml").write_text("seed: 7\n")
    train_here(flags(base_model, images, tmp_path, max_train_steps=1, config=tmp_path / "config.yaml"))
    assert "seed: 7" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("folder", ["", "images"])
def test_an_output_folder_that_is_none(
    folder: str, base_model: Path, images: Path, tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(images, tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--output_dir (is empty|'images' is a folder of images too)"):
        train_here([*flags(base_model, tmp_path / "images", Path("x"), max_train_steps=1), f"--output_dir={folder}"])
    assert len(list((tmp_path / "images").iterdir())) == len(list(images.iterdir()))


def test_overwriting_leaves_no_word_of_the_run_before(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    options = {"max_train_steps": 1, "checkpointing_steps": 1}
    train_here(flags(base_model, images, tmp_path, **options))
    (tmp_path / "notes.bin").write_bytes((tmp_path / "<new1>.bin").read_bytes())  # another name: no token's file
    more = {"modifier_token": "<new2>", "instance_prompt": "photo of a <new2> cat", "overwrite": True}
    train_here(flags(base_model, images, tmp_path, **(options | more)))
    assert list(load_concept(tmp_path).tokens) == ["<new2>"]
    assert (tmp_path / "notes.bin").exists()


def test_what_refuses_a_run_refuses_before_anything_is_overwritten(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(flags(base_model, images, tmp_path, max_train_steps=1, checkpointing_steps=1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(*_: object) -> None:
        raise UserError("the Hub refuses the token")

    monkeypatch.setattr("custom_diffusion.training.run.create_hub_repository", refuse)
    with pytest.raises(UserError, match="the Hub refuses"):
        train_here(flags(base_model, images, tmp_path, seed=43, overwrite=True, push_to_hub=True))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_may_be_a_link_to_another_disk(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 1}
    train_here(flags(base_model, images, out, max_train_steps=1, **options))
    (out / "checkpoint-1").rename(elsewhere)
    (out / "checkpoint-1").symlink_to(elsewhere)
    train_here(flags(base_model, images, out, max_train_steps=2, resume_from_checkpoint="latest", **options))
    assert checkpoints(out) == {"checkpoint-2"}
    assert (elsewhere / "README.md").exists(), "only the link is removed"


@pytest.mark.parametrize(("damage", "message"), [
    (lambda state: shutil.rmtree(state), r"checkpoint-2' cannot be continued, as it has no training_state: resume from "
                                         "checkpoint-1, or start afresh"),
    (lambda state: (state / "optimizer.bin").write_bytes(b"x"), r"training_state' cannot be read \(.+\): resume from "
                                                                "checkpoint-1, or start afresh"),
])  # fmt: skip
def test_a_checkpoint_without_its_state_is_named_and_the_others_too(
    damage: Callable[[Path], object], message: str, base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(flags(base_model, images, tmp_path, max_train_steps=2, checkpointing_steps=1))
    damage(tmp_path / "checkpoint-2" / "training_state")
    with pytest.raises(UserError, match=message):
        train_here(flags(base_model, images, tmp_path, max_train_steps=3, resume_from_checkpoint="latest"))


def test_more_steps_than_anyone_waits_for(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    with pytest.raises(UserError, match=r"--num_train_epochs gives \d+ steps, more than 1000000"):
        train_here([*flags(base_model, images, tmp_path, max_train_steps=None), "--num_train_epochs=1000000"])


def test_the_end_says_time_memory_place_and_the_way_on(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(flags(base_model, images, tmp_path / "out"))
    said = capsys.readouterr().out
    assert re.search(r"\d steps in fp32, \d+\.\d\d s each, at most \d+\.\d GiB", said)
    assert str(tmp_path / "out") in said and "python infer.py --prompt" in said


def test_flags_that_save_memory_reach_the_model(
    base_model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    more = {"mixed_precision": "bf16", "gradient_checkpointing": True, "allow_tf32": True}
    run = prepare(flags(base_model, images, tmp_path, **more))
    trained = run.module.trained()
    frozen = {value.dtype for name, value in run.module.named_parameters() if name not in trained}
    assert frozen == {torch.bfloat16}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert run.module.unet.is_gradient_checkpointing
    assert torch.backends.cuda.matmul.allow_tf32


def test_an_optimizer_state_runs_no_code(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    out = tmp_path / "out"
    train_here(flags(base_model, images, out, checkpointing_steps=1, max_train_steps=1))
    torch.save({"state": Code()}, out / "checkpoint-1" / "training_state" / "optimizer.bin")
    with pytest.raises(UserError, match="cannot be read"):
        train_here(flags(base_model, images, out, max_train_steps=2, resume_from_checkpoint="latest"))
    assert not (tmp_path / "ran").exists()
