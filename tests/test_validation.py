"""The validation loss and images: what they measure, that they disturb nothing, and what is kept of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from custom_diffusion.data.concept_list import ConceptEntry, read_concepts
from custom_diffusion.data.images import find_instance_images
from custom_diffusion.errors import UserError
from custom_diffusion.training import saving
from custom_diffusion.training.history import History, read_history
from custom_diffusion.training.validation import (
    TIMESTEPS,
    best_step,
    measure_validation,
    prepare_validation,
    split_images,
)
from tests.conftest import draw_images, flags, prepare
from train_custom_diffusion import build_parser, parse_args

Train = Callable[[list[str]], None]


def log_of(folder: Path) -> dict[str, list[dict[str, object]]]:
    return json.loads((folder / "training_log.json").read_text())


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two more images of the concept."""
    folder = tmp_path_factory.mktemp("others")
    draw_images(folder, 7)
    for number in range(5):
        (folder / f"{number}.png").unlink()
    return folder


@pytest.fixture(scope="module")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("class"), 6, (80, 64))


def with_prior(class_images: Path) -> dict[str, object]:
    return {
        "with_prior_preservation": True,
        "class_data_dir": class_images,
        "class_prompt": "cat",
        "num_class_images": 6,
        "learning_rate": 1e-3,
    }


# --- what is measured ----------------------------------------------------------------------------


def test_every_image_is_seen_at_the_same_timesteps(
    base_model: Path, images: Path, others: Path, class_images: Path, tmp_path: Path
) -> None:
    run = prepare(flags(base_model, images, tmp_path / "out", validation_data_dir=others, **with_prior(class_images)))
    assert len(run.validation) == 2 * TIMESTEPS
    latents = [batch["posterior"][0, 0] for batch in run.validation]
    timesteps = [int(batch["timesteps"][0]) for batch in run.validation]
    seen = Counter(zip((latent.sum().item() for latent in latents), timesteps, strict=True))
    assert len({image for image, _ in seen}) == 2
    assert set(seen.values()) == {1}
    assert {timestep for _, timestep in seen} == {125, 375, 625, 875}
    noises = {batch["noise"].sum().item() for batch in run.validation}
    assert len(noises) == len(run.validation), "each has a noise of its own"


def test_the_loss_is_the_training_objective_at_fixed_noise(
    base_model: Path, images: Path, others: Path, class_images: Path, tmp_path: Path
) -> None:
    run = prepare(flags(base_model, images, tmp_path / "out", validation_data_dir=others, **with_prior(class_images)))
    (first,) = run.history.validations
    assert first["step"] == 0
    measure_validation(run, 1)
    measure_validation(run, 2)
    assert run.history.validations[1] == {**first, "step": 1}, "the same whenever it is measured"
    by_hand = []
    for batch in run.validation:
        latents = run.latents.draw(kept := dict(batch))
        with torch.no_grad():
            by_hand.append(torch.stack(run.module(latents, **kept)))
    _, instance, prior = torch.stack(by_hand).mean(dim=0).tolist()
    assert (first["validation_loss"], first["validation_prior_loss"]) == pytest.approx((instance, prior), rel=1e-6)
    # Other noise gives another loss, and the same images prepared again the same one.
    again = prepare_validation(run, [(path, "photo of a <new1> cat") for path in sorted(others.iterdir())])
    run.validation = again
    measure_validation(run, 3)
    assert run.history.validations[-1]["validation_loss"] == first["validation_loss"]
    for batch in again:
        batch["noise"] = batch["noise"].flip(-1)
    measure_validation(run, 4)
    assert run.history.validations[-1]["validation_loss"] != first["validation_loss"]


def test_it_changes_nothing_that_is_learned(
    base_model: Path, images: Path, others: Path, class_images: Path, tmp_path: Path, train_here: Train
) -> None:
    more = with_prior(class_images) | {"max_train_steps": 2, "checkpointing_steps": 2}
    train_here(flags(base_model, images, tmp_path / "without", **more))
    train_here(
        [
            *flags(base_model, images, tmp_path / "with", validation_data_dir=others, validation_steps=1, **more),
            "--validation_at_start",
            "--validation_prompt=<new1> cat",
            "--validation_prompt=a <new1> cat in the snow",
            "--num_validation_images=1",
        ]
    )
    for name in ("pytorch_custom_diffusion_weights.safetensors", "<new1>.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    states = [
        torch.load(tmp_path / folder / "checkpoint-2/training_state/random_states_0.pkl", weights_only=False)
        for folder in ("with", "without")
    ]
    assert torch.equal(*(state["torch_manual_seed"] for state in states))
    assert np.array_equal(*(state["numpy_random_seed"][1] for state in states))
    assert not log_of(tmp_path / "without")["validations"]
    # And what it left.
    log = log_of(tmp_path / "with")
    assert [row["step"] for row in log["validations"]] == [0, 1, 2]
    assert [(row["step"], row["prompt"]) for row in log["images"]] == [
        (step, prompt) for step in range(3) for prompt in ("<new1> cat", "a <new1> cat in the snow")
    ]
    assert [row["step"] for row in log["steps"]] == [1, 2]
    for row in log["images"]:
        for file in row["files"]:
            assert Image.open(tmp_path / "with" / file).size == (64, 64)
    card = (tmp_path / "with" / "README.md").read_text()
    assert card.count("![<new1> cat](./image_0.png)") == 1
    assert "image_1.png" not in card, "its prompt is another"


def test_validation_is_logged_shown_and_summed_up(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = flags(base_model, images, out, validation_split=1, validation_steps=1, max_train_steps=3, learning_rate=1e-3)
    train_here([*argv, "--checkpointing_steps=1", "--report_to=tensorboard"])
    captured = capsys.readouterr()
    losses = {row["step"]: row["validation_loss"] for row in log_of(out)["validations"]}
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert f"The validation loss was lowest at step {best}: {losses[best]:.4f}" in captured.out
    assert f"kept in {out / f'checkpoint-{best}'}" in captured.out
    assert f"validation={losses[2]:.4f}" in captured.err, "in the progress bar"
    events = EventAccumulator(str(out / "logs" / "custom-diffusion"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("validation_loss")}
    assert logged == pytest.approx(losses)


# --- which images --------------------------------------------------------------------------------


def test_the_last_images_of_each_concept_are_held_out(tmp_path: Path) -> None:
    folders = [draw_images(tmp_path / name, 3) for name in ("cat", "pot")]
    concepts = [ConceptEntry(instance_prompt=folder.name, instance_folder=folder) for folder in folders]
    pairs = [(path, folder.name) for folder in folders for path in sorted(folder.iterdir())]
    args = SimpleNamespace(concepts_list="list.json", validation_split=1)
    training, held_out = split_images(args, concepts, pairs)
    assert [(path.parent.name, path.name, prompt) for path, prompt in held_out] == [
        ("cat", "2.png", "cat"),
        ("pot", "2.png", "pot"),
    ]
    assert sorted(training + held_out) == sorted(pairs)
    args.validation_split = 3
    with pytest.raises(UserError, match="would leave none of the 3 images"):
        split_images(args, concepts, pairs)


def concepts_of(folder: Path, *entries: dict[str, str], **more: object) -> list[ConceptEntry]:
    (folder / "list.json").write_text(json.dumps(entries))
    values = {"concepts_list": str(folder / "list.json"), "with_prior_preservation": False}
    return read_concepts(SimpleNamespace(**(values | more)))


def test_each_concept_of_a_list_has_validation_images_of_its_own(tmp_path: Path) -> None:
    cat, pot, cup = (draw_images(tmp_path / name, 2) for name in ("cat", "pot", "cup"))
    others = draw_images(tmp_path / "other-pots", 1)
    (others / "0.txt").write_text("a <new2> pot from behind")
    more_cats = draw_images(tmp_path / "more-cats", 2)
    concepts = concepts_of(
        tmp_path,
        {"instance_prompt": "a cat", "instance_data_dir": str(cat), "validation_data_dir": str(more_cats)},
        {"instance_prompt": "a pot", "instance_data_dir": str(pot), "validation_data_dir": str(others)},
        {"instance_prompt": "a cup", "instance_data_dir": str(cup)},
    )
    pairs = find_instance_images(concepts)
    training, held_out = split_images(SimpleNamespace(validation_split=None, masked_loss=False), concepts, pairs)
    assert training == pairs and len(pairs) == 6
    assert held_out == [
        (more_cats / "0.png", "a cat"),
        (more_cats / "1.png", "a cat"),
        (others / "0.png", "a <new2> pot from behind"),
    ]
    with pytest.raises(UserError, match=r"list.json both say what to validate with"):
        split_images(SimpleNamespace(concepts_list="list.json", validation_split=1), concepts, pairs)


@pytest.mark.parametrize("wrong", ["nowhere", 3, ["a"]])
def test_a_validation_folder_that_is_not_there_is_named(wrong: object, tmp_path: Path) -> None:
    entry = {"instance_prompt": "a cat", "instance_data_dir": str(tmp_path), "validation_data_dir": wrong}
    with pytest.raises(UserError, match=r"there is no folder .*validation_data_dir"):
        concepts_of(tmp_path, entry)
    entry |= {"class_prompt": None, "class_data_dir": None}
    if wrong == "nowhere":
        with pytest.raises(UserError, match="there is no folder 'nowhere'"):
            concepts_of(tmp_path, concepts_list=None, **entry)


def test_what_is_held_out_is_not_trained_on(base_model: Path, images: Path, tmp_path: Path) -> None:
    run = prepare(flags(base_model, images, tmp_path / "out", validation_split=2, max_train_steps=20))
    assert [path.name for path, _ in run.dataset.instance_images] == ["0.png", "1.png", "2.png"]
    shown = {view.path.name for view in run.dataset.drawn(range(20))[0]}
    assert shown == {"0.png", "1.png", "2.png"}
    assert len(run.validation) == 2 * TIMESTEPS


# --- the flags -----------------------------------------------------------------------------------


def test_several_validation_prompts() -> None:
    required = ["--pretrained_model_name_or_path=x"]
    parse = build_parser().parse_args
    assert parse(required).validation_prompt is None
    assert parse([*required, "--validation_prompt=a cat"]).validation_prompt == "a cat"
    assert parse([*required, "--validation_prompt=a", "--validation_prompt", "b"]).validation_prompt == ["a", "b"]


def test_several_validation_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("validation_prompt: [a cat, a dog]\n")
    argv = ["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=x", f"--config={file}"]
    assert parse_args(argv).validation_prompt == ["a cat", "a dog"]
    assert parse_args([*argv, "--validation_prompt=mine"]).validation_prompt == "mine"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--validation_data_dir=x", "--validation_split=1"], "give one of them"),
        (["--validation_split=0"], "less than 1"),
        (["--validation_prompt=a", "--validation_prompt=b\nc"], "line breaks"),
        (["--validation_data_dir=x", "--concepts_list=x.json"], "give each of --concepts_list its validation_data_dir"),
    ],
)
def test_wrong_flags(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=x", *more])
    assert message in capsys.readouterr().err


# --- history -------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_its_history(
    base_model: Path, images: Path, others: Path, tmp_path: Path, train_here: Train
) -> None:
    out = tmp_path / "out"
    # A run without any of these flags is resumed with them: they do not touch what is learned.
    train_here(flags(base_model, images, out, max_train_steps=3, checkpointing_steps=2))
    assert [row["step"] for row in log_of(out)["steps"]] == [1, 2, 3]
    more = {"validation_data_dir": others, "validation_steps": 1, "resume_from_checkpoint": "checkpoint-2"}
    train_here([*flags(base_model, images, out, max_train_steps=4, **more), "--validation_at_start"])
    log = log_of(out)
    assert [row["step"] for row in log["steps"]] == [1, 2, 3, 4]
    assert [row["step"] for row in log["validations"]] == [3, 4], "and nothing at a start that is long past"
    train_here(flags(base_model, images, out, max_train_steps=1, overwrite=True))
    assert [row["step"] for row in log_of(out)["steps"]] == [1]


def test_a_damaged_history_does_not_stop_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "training_log.json").write_text('{"steps": [{}]')
    assert read_history(tmp_path, 5) == History()
    assert "is damaged" in caplog.text


def test_a_report_that_cannot_be_written_does_not_stop_a_run(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("custom_diffusion.training.history.write_report", full)
    train_here(flags(base_model, images, tmp_path / "out", max_train_steps=1))
    assert (tmp_path / "out" / "<new1>.safetensors").is_file()


@pytest.mark.parametrize(
    ("losses", "checkpoints", "sentence"),
    [
        ({0: 0.1, 5: 0.4, 10: 0.3}, [5, 10], "lowest at step 10: 0.3000, kept in out/checkpoint-10"),
        ({0: 0.9, 5: 0.4, 10: 0.5}, [4, 10], "step 5: 0.4000; the nearest checkpoint is out/checkpoint-4: validate"),
        ({0: 0.9, 5: 0.4}, [], "step 5: 0.4000; there is no checkpoint: validate"),
        ({0: 0.9, 20: 0.4}, [], "step 20: 0.4000, the last, which is the result"),
        ({0: 0.9}, [], None),
    ],
)
def test_the_best_step_and_its_checkpoint(
    losses: dict[int, float], checkpoints: list[int], sentence: str | None
) -> None:
    history = History(validations=[{"step": step, "validation_loss": loss} for step, loss in losses.items()])
    run = SimpleNamespace(history=history, steps=range(20), args=SimpleNamespace(output_dir="out"))
    found = best_step(run, checkpoints)
    assert (sentence in found) if sentence else found is None


def test_the_command_that_evaluates_names_folder_and_images(base_model: Path, images: Path, tmp_path: Path) -> None:
    run = prepare(flags(base_model, images, tmp_path / "out"))
    command = saving.evaluate_command(run)
    assert command == f"python evaluate.py --model_dir {tmp_path / 'out'} --instance_data_dir {images}"


def test_validation_images_have_the_size_of_the_training(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    more = {"resolution": 128, "max_train_steps": 1, "validation_prompt": "<new1>", "num_validation_images": 1}
    train_here(flags(base_model, images, tmp_path / "out", **more))
    with Image.open(tmp_path / "out" / "image_0.png") as image:
        assert image.size == (128, 128)


def test_an_image_that_two_concepts_share_is_held_out_of_both(base_model: Path, images: Path, tmp_path: Path) -> None:
    prompts = ("photo of a <new1> cat", "<new1> cat")
    entries = [{"instance_prompt": prompt, "instance_data_dir": str(images)} for prompt in prompts]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    options = {"concepts_list": tmp_path / "list.json", "instance_prompt": None, "instance_data_dir": None}
    run = prepare(flags(base_model, images, tmp_path / "out", validation_split=1, **options))
    last = sorted(images.glob("*.png"))[-1]
    assert last not in {path for path, _ in run.dataset.instance_images}
