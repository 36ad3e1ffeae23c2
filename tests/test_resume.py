"""A resumed run takes the learning rates of the uninterrupted one, and other inputs are noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

from custom_diffusion.concept.files import load_concept
from custom_diffusion.errors import UserError
from custom_diffusion.training import processes
from custom_diffusion.training import run as training_run
from custom_diffusion.training.checkpoints import has_result
from custom_diffusion.training.run import build_accelerator, build_schedule
from custom_diffusion.training.settings import describe_settings, differences
from tests.conftest import draw_images, flags, forget_accelerate, train
from tests.test_distributed import relative_difference
from train_custom_diffusion import SCHEDULES, parse_args

Train = Callable[[list[str]], None]
SETTINGS = Path("training_state", "training_settings.json")


def learned(folder: Path) -> torch.Tensor:
    concept = load_concept(folder)
    vectors = [vector for own in concept.tokens.values() for vector in own.values()]
    return torch.cat([value.flatten() for value in (*concept.attention.values(), *vectors)])


def command(base_model: Path, folder: Path, **more: object) -> list[str]:
    """A run of six steps with three checkpoints, whose inputs all lie in the folder."""
    values = {
        "with_prior_preservation": True,
        "class_data_dir": folder / "class",
        "class_prompt": "cat",
        "num_class_images": 3,
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "max_train_steps": 6,
        "checkpointing_steps": 2,
    }
    return flags(base_model, folder / "images", folder / "out", **(values | more))


@pytest.fixture(scope="module")
def finished(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    draw_images(folder / "images", 3)
    train(command(base_model, folder))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that has only come to step 4."""
    shutil.copytree(finished, tmp_path / "run")
    out = tmp_path / "run" / "out"
    shutil.rmtree(out / "checkpoint-6")
    for name in ("pytorch_custom_diffusion_weights.bin", "pytorch_custom_diffusion_weights.safetensors"):
        (out / name).unlink()
    return tmp_path / "run"


# --- learning rates -------------------------------------------------------------------------------


@pytest.fixture
def several_processes() -> Callable[[int], None]:
    """Makes the next accelerator believe in several processes."""

    def begin(num_processes: int) -> None:
        forget_accelerate()
        PartialState(cpu=True)
        PartialState._shared_state["num_processes"] = num_processes

    return begin


def rates(
    begin: Callable[[int], None], name: str, num_processes: int, steps: range, folder: Path, old_style: bool = False
) -> list[float]:
    """The learning rates of these steps of twelve, by this many processes; the state is taken from and left in a file.

    Args:
        old_style: leave the state as it was when each process counted the steps of all.
    """
    begin(num_processes)
    args = parse_args([*flags(Path(), Path(), folder), f"--lr_scheduler={name}", "--learning_rate=1e-3"])
    args.lr_warmup_steps = 3
    accelerator = build_accelerator(args)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    optimizer, schedule = accelerator.prepare(optimizer, build_schedule(args, optimizer, 12))
    state = folder / "training_state"
    if steps.start:
        run = SimpleNamespace(accelerator=accelerator, lr_scheduler=schedule)
        training_run.load_state(run, state)
    taken = []
    for _ in steps:
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    if old_style:
        schedule.scheduler.last_epoch *= num_processes
    accelerator.save_state(str(state))
    for number in range(1, num_processes):
        shutil.copy(state / "random_states_0.pkl", state / f"random_states_{number}.pkl")
    (folder / SETTINGS).write_text(json.dumps({} if old_style else {"schedule_counts": "optimizer steps"}))
    return taken


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_of_any_number_of_processes_are_those_of_one(
    name: str, tmp_path: Path, several_processes: Callable[[int], None]
) -> None:
    whole = rates(several_processes, name, 1, range(12), tmp_path / "whole")
    assert rates(several_processes, name, 2, range(12), tmp_path / "two") == whole
    if name != "constant":
        assert len(set(whole)) > 3
    for first, then in ((2, 1), (1, 2), (3, 2)):
        for old_style in (False, True):
            out = tmp_path / f"{first}-{then}-{old_style}"
            taken = rates(several_processes, name, first, range(5), out, old_style)
            taken += rates(several_processes, name, then, range(5, 12), out)
            assert taken == whole, (first, then, old_style)


def test_a_resumed_run_ends_with_the_same_values(
    folder: Path, finished: Path, base_model: Path, train_here: Train
) -> None:
    train_here(command(base_model, folder, resume_from_checkpoint="latest"))
    assert torch.equal(learned(folder / "out"), learned(finished / "out"))


def test_an_old_checkpoint_still_resumes(folder: Path, finished: Path, base_model: Path, train_here: Train) -> None:
    # As it was written by two processes, before contents, values and the way of counting were recorded.
    path = folder / "out" / "checkpoint-4"
    settings = json.loads((path / SETTINGS).read_text())
    for name in ("instance_contents", "class_images", "starting_values", "total_steps", "schedule_counts"):
        del settings[name]
    settings["mixed_precision"] = None
    (path / SETTINGS).write_text(json.dumps(settings))
    state = torch.load(path / "training_state" / "scheduler.bin")
    state["last_epoch"] *= 2
    torch.save(state, path / "training_state" / "scheduler.bin")
    shutil.copy(path / "training_state" / "random_states_0.pkl", path / "training_state" / "random_states_1.pkl")
    train_here(command(base_model, folder, resume_from_checkpoint="checkpoint-4"))
    assert torch.equal(learned(folder / "out"), learned(finished / "out"))


# --- what has changed meanwhile -------------------------------------------------------------------


def another_image(folder: Path) -> None:
    Image.new("RGB", (96, 96), "blue").save(folder / "images" / "1.png")


def another_class_image(folder: Path) -> None:
    path = sorted((folder / "class").glob("*.jpg"))[1]
    Image.new("RGB", (64, 64), "blue").save(path)


def one_class_image_more(folder: Path) -> None:
    Image.new("RGB", (64, 64), "blue").save(folder / "class" / "0-.jpg")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_image, "instance images with other contents: 1.png"),
        (another_class_image, "class images with other names, captions or contents: 1-"),
        (one_class_image_more, "class images with other names, captions or contents: 0-"),
    ],
)
def test_images_that_were_replaced_are_named(
    change: Callable[[Path], None], words: str, folder: Path, base_model: Path, train_here: Train
) -> None:
    change(folder)
    weights = (folder / "out" / "checkpoint-4" / "pytorch_custom_diffusion_weights.safetensors").read_bytes()
    with pytest.raises(UserError) as caught:
        train_here(command(base_model, folder, resume_from_checkpoint="latest"))
    assert words in str(caught.value)
    assert "resume with the same settings" in str(caught.value)
    assert "\n" not in str(caught.value)
    path = folder / "out" / "checkpoint-4" / "pytorch_custom_diffusion_weights.safetensors"
    assert path.read_bytes() == weights


def test_captions_of_real_class_images_are_compared(base_model: Path, tmp_path: Path, train_here: Train) -> None:
    draw_images(tmp_path / "images", 2)
    draw_images(tmp_path / "class" / "images", 3)
    (tmp_path / "class" / "images.txt").write_text("".join(f"{tmp_path}/class/images/{n}.png\n" for n in range(3)))
    (tmp_path / "class" / "caption.txt").write_text("a cat\na black cat\na cat asleep\n")
    more = {"real_prior": True, "max_train_steps": 2, "checkpointing_steps": 1}
    train_here(command(base_model, tmp_path, **more))
    (tmp_path / "class" / "caption.txt").write_text("a cat\na white cat\na cat asleep\n")
    before = (tmp_path / "out" / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"class images with other names, captions or contents: 1\.png"):
        train_here(command(base_model, tmp_path, **more, resume_from_checkpoint="checkpoint-1"))
    assert (tmp_path / "out" / "config.yaml").read_bytes() == before, "found before anything is written"
    with pytest.raises(UserError, match="3 class images -> 2"):
        train_here(command(base_model, tmp_path, **more, resume_from_checkpoint="checkpoint-1", num_class_images=2))


def test_a_base_model_that_was_replaced_is_noticed(
    folder: Path, base_model: Path, tmp_path: Path, train_here: Train
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base_model, model)
    settings = json.loads((folder / "out" / "checkpoint-4" / SETTINGS).read_text())
    settings["pretrained_model_name_or_path"] = str(model)
    (folder / "out" / "checkpoint-4" / SETTINGS).write_text(json.dumps(settings))
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    name = next(name for name in weights if name.endswith("attn2.to_v.weight"))
    weights[name] = weights[name] * 1.01
    save_file(weights, model / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="another base model of the same name"):
        train_here(command(model, folder, resume_from_checkpoint="latest"))


# --- how far it goes ------------------------------------------------------------------------------


def test_a_checkpoint_beyond_the_end_is_refused(folder: Path, base_model: Path, train_here: Train) -> None:
    before = (folder / "out" / "config.yaml").read_bytes()
    with pytest.raises(UserError) as caught:
        train_here(command(base_model, folder, resume_from_checkpoint="latest", max_train_steps=3))
    message = str(caught.value)
    assert "is of step 4, and the run is to end at 3: give a larger --max_train_steps" in message
    assert message.endswith("or resume from checkpoint-2")
    assert (folder / "out" / "config.yaml").read_bytes() == before
    # An epoch is three steps here.
    with pytest.raises(UserError, match="is of step 4, and the run is to end at 3"):
        train_here(
            command(base_model, folder, resume_from_checkpoint="latest", max_train_steps=None, num_train_epochs=1)
        )


def test_another_length_under_a_decaying_schedule_warns(
    folder: Path, base_model: Path, train_here: Train, caplog: pytest.LogCaptureFixture
) -> None:
    train_here(command(base_model, folder, resume_from_checkpoint="latest", max_train_steps=5))
    assert "up to step 4 the learning rates were those of a run of 6 steps, and from there on they are" in caplog.text


def test_another_length_does_not_matter_to_a_constant_rate(
    base_model: Path, tmp_path: Path, train_here: Train, caplog: pytest.LogCaptureFixture
) -> None:
    draw_images(tmp_path / "images", 2)
    more = {"with_prior_preservation": None, "lr_scheduler": "constant", "max_train_steps": 1, "checkpointing_steps": 1}
    train_here(command(base_model, tmp_path, **more))
    train_here(command(base_model, tmp_path, **(more | {"max_train_steps": 2}), resume_from_checkpoint="latest"))
    assert "learning rates were" not in caplog.text


# --- whose a folder is ----------------------------------------------------------------------------


def test_a_folder_without_a_result_refuses_nobody(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("the VAE cannot be loaded")

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(UserError, match="the VAE"):
        patch.setattr(training_run, "load_vae", fail)
        train_here(flags(base_model, images, out, learning_rate=1e-3, report_to="tensorboard"))
    assert (out / "training_settings.json").is_file()
    assert not has_result(out)
    # The corrected command, with which it is a run.
    train_here(flags(base_model, images, out, learning_rate=1e-4, max_train_steps=1))
    assert json.loads((out / "training_settings.json").read_text())["learning_rate"] == 1e-4
    with pytest.raises(UserError, match=r"other settings \(learning_rate 0\.0001 -> 0\.001\)"):
        train_here(flags(base_model, images, out, learning_rate=1e-3))


@pytest.mark.parametrize(
    ("name", "is_result"),
    [
        ("checkpoint-1/README.md", True),
        ("pytorch_custom_diffusion_weights.bin", True),
        ("pytorch_custom_diffusion_weights.safetensors", True),
        ("latents/x.safetensors", False),
        ("logs/events", False),
        ("validation/step_000001_0.png", False),
        ("config.yaml", False),
        ("checkpoint-last/README.md", False),
    ],
)
def test_what_a_result_is(name: str, is_result: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert has_result(tmp_path) is is_result


# --- several processes ----------------------------------------------------------------------------


def everyone(monkeypatch: pytest.MonkeyPatch, *others: tuple[str, str | None, dict[str, object]]) -> SimpleNamespace:
    """An accelerator of several processes, of which the others see these."""
    monkeypatch.setattr(processes, "gather_object", lambda mine: [*mine, *others])
    return SimpleNamespace(num_processes=1 + len(others))


def test_processes_that_see_other_inputs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {
        "seed": 1,
        "instance_pictures": [["0.png", "a cat"], ["1.png", "a cat"]],
        "instance_contents": ["a", "b"],
        "class_images": [["0.jpg", "cat", "c"]],
        "total_steps": 4,
    }
    same = everyone(monkeypatch, ("far", "checkpoint-2", dict(mine)))
    processes.check_processes_agree(mine, "checkpoint-2", same)
    for other, words in (
        (("far", "checkpoint-2", mine | {"instance_contents": ["a", "x"]}), "other contents: 1.png"),
        (("far", "checkpoint-2", mine | {"class_images": [["0.jpg", "cat", "x"]]}), "contents: 0.jpg"),
        (("far", "checkpoint-2", mine | {"class_images": []}), "1 class images -> 0"),
        (
            ("far", "checkpoint-2", mine | {"instance_pictures": [["0.png", "a cat"], ["1.png", "a dog"]]}),
            'instance images and prompts: no longer ["1.png", "a cat"], now ["1.png", "a dog"]',
        ),
        (("far", "checkpoint-2", mine | {"instance_pictures": [["0.png", "a cat"]] * 2}), 'no longer ["1.png"'),
        (("far", "checkpoint-2", mine | {"seed": 2}), "seed 1 -> 2"),
        (("far", None, dict(mine)), "checkpoint checkpoint-2 -> None"),
    ):
        accelerator = everyone(monkeypatch, ("near", "checkpoint-2", dict(mine)), other)
        with pytest.raises(UserError) as caught:
            processes.check_processes_agree(mine, "checkpoint-2", accelerator)
        assert "process 2 (far) sees other inputs than process 0" in str(caught.value)
        assert words in str(caught.value)


# --- what is compared ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hflip", True), ("noaug", True), ("center_crop", True), ("resolution", 128), ("freeze_model", "crossattn"),
        ("lr_scheduler", "cosine"), ("lr_warmup_steps", 5), ("scale_lr", True), ("adam_beta1", 0.8),
        ("adam_beta2", 0.9), ("adam_epsilon", 1e-6), ("adam_weight_decay", 0.5), ("max_grad_norm", 2.0),
        ("latent_variants", 3), ("no_latent_cache", True), ("initializer_token", "cat</w>"), ("prior_loss_weight", 0.5),
        ("mixed_precision", "bf16"), ("padding_mode", "edge"), ("quantize_base", "8bit"), ("seed", 7),
        ("cutmix_probability", 0.5), ("snr_gamma", 5.0), ("rank", 2), ("aspect_buckets", True),
        ("unmasked_weight", 0.2),
    ],
)  # fmt: skip
def test_every_flag_that_decides_the_result_is_compared(name: str, value: object) -> None:
    argv = flags(Path("model"), Path("images"), Path("out"))
    args, other = (parse_args(argv) for _ in range(2))
    assert getattr(other, name) != value
    setattr(other, name, value)
    mine, others = (describe_settings(one, [], [], [], [], 1) for one in (args, other))
    found = differences(others, mine)
    assert len(found) == 1 and found[0].startswith(f"{name} "), found


def test_a_batch_may_be_split_anew_when_a_run_is_resumed(base_model: Path, tmp_path: Path) -> None:
    """As after running out of memory: four images in a batch become four batches of one."""
    images = draw_images(tmp_path / "images", 4)
    options = {"learning_rate": 1e-2, "lr_scheduler": "constant", "max_train_steps": 5, "checkpointing_steps": 3}
    whole = {"train_batch_size": 4, "gradient_accumulation_steps": 1}
    train(flags(base_model, images, tmp_path / "whole", **options, **whole))
    train(flags(base_model, images, tmp_path / "split", **(options | {"max_train_steps": 3}), **whole))
    split = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "resume_from_checkpoint": "latest"}
    train(flags(base_model, images, tmp_path / "split", **options, **split))
    expected, found = (learned(tmp_path / name) for name in ("whole", "split"))
    start = learned(tmp_path / "whole" / "checkpoint-3")
    assert relative_difference(expected, found, start) < 0.02
