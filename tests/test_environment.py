"""One truth: flags, accelerate's configuration, and what a choice of a flag needs of the machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train_custom_diffusion
from custom_diffusion.command_line import CONFIG_NAME
from custom_diffusion.errors import UserError
from custom_diffusion.training import run as training_run
from custom_diffusion.training.environment import ACCUMULATION, DYNAMO, PRECISION
from tests.conftest import draw_images, flags, prepare
from train_custom_diffusion import build_parser, parse_args

Train = Callable[[list[str]], None]


def parse(*argv: str) -> object:
    """A command line that is complete, and these flags behind it."""
    return parse_args([*flags(Path("model"), Path("images"), Path("out")), *argv])


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The error line with which these flags are refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage:")
    return error


# --- accelerate's configuration -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "argv", "precision", "steps"),
    [
        ({}, [], "no", 1),
        ({PRECISION: "bf16", ACCUMULATION: "3"}, [], "bf16", 3),
        ({PRECISION: "BF16"}, [], "bf16", 1),
        ({PRECISION: ""}, [], "no", 1),
        ({PRECISION: "fp16", ACCUMULATION: "4"}, ["--mixed_precision=no", "--gradient_accumulation_steps=2"], "no", 2),
        (
            {PRECISION: "fp8", ACCUMULATION: "auto"},
            ["--mixed_precision=no", "--gradient_accumulation_steps=1"],
            "no",
            1,
        ),
        ({ACCUMULATION: "4"}, ["--config={folder}/run.yaml"], "no", 1),
    ],
)
def test_flags_that_are_given_win_and_others_follow_accelerate(
    variables: dict[str, str],
    argv: list[str],
    precision: str,
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "run.yaml").write_text("gradient_accumulation_steps: 1\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    args = parse(*[word.replace("{folder}", str(tmp_path)) for word in argv])
    assert (args.mixed_precision, args.gradient_accumulation_steps) == (precision, steps)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({PRECISION: "fp8"}, ["'fp8'", PRECISION, "--mixed_precision"]),
        ({PRECISION: "fp16", "ACCELERATE_USE_CPU": "true"}, ["fp16", "needs a GPU"]),
        ({PRECISION: "fp16", "ACCELERATE_TORCH_DEVICE": "cpu"}, ["fp16", "needs a GPU"]),
        ({ACCUMULATION: "auto"}, ["'auto'", ACCUMULATION, "--gradient_accumulation_steps"]),
        ({ACCUMULATION: "0"}, ["'0'", ACCUMULATION]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["DeepSpeed", "ACCELERATE_USE_DEEPSPEED"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["FSDP"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["Megatron-LM"]),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, ["parallelism"]),
    ],
)
def test_what_accelerate_asks_for_and_cannot_get_is_refused(
    variables: dict[str, str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = refusal(capsys)
    for word in words:
        assert word in error


def test_what_is_in_force_is_done_said_and_recorded(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    train_here: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    more = {"max_train_steps": 2, "checkpointing_steps": 1, "learning_rate": 1e-2}
    train_here(
        flags(base_model, images, tmp_path / "flags", mixed_precision="bf16", gradient_accumulation_steps=2, **more)
    )
    monkeypatch.setenv(PRECISION, "bf16")
    monkeypatch.setenv(ACCUMULATION, "2")
    monkeypatch.setenv(DYNAMO, "inductor")
    caplog.clear()
    train_here(flags(base_model, images, tmp_path / "variables", **more))

    names = ["pytorch_custom_diffusion_weights.safetensors", "<new1>.safetensors"]
    for name in [*names, "training_settings.json"]:
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("flags", "variables"))
        assert one == other, name
    card = (tmp_path / "variables" / "README.md").read_text()
    assert "| mixed_precision | bf16 |" in card
    assert "| gradient_accumulation_steps | 2 |" in card
    config = (tmp_path / "variables" / CONFIG_NAME).read_text()
    assert "mixed_precision: bf16" in config
    assert "gradient_accumulation_steps: 2" in config
    assert "2 steps of 1 x 1 processes x 2 accumulation, in bf16" in caplog.text
    assert "2 steps in bf16" in capsys.readouterr().out
    assert f"asks for compilation by 'inductor' ({DYNAMO}); without --torch_compile nothing is" in caplog.text

    # And compared on resume.
    monkeypatch.delenv(PRECISION)
    resumed = flags(base_model, images, tmp_path / "variables", **more, resume_from_checkpoint="checkpoint-1")
    with pytest.raises(UserError, match='mixed_precision "bf16" -> "no"'):
        train_here(resumed)
    monkeypatch.setenv(PRECISION, "bf16")
    monkeypatch.delenv(ACCUMULATION)
    with pytest.raises(UserError, match="samples_per_step 2 -> 1"):
        train_here(resumed)


def test_a_configuration_that_flags_contradict_is_named(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    train_here: Train,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(PRECISION, "bf16")
    monkeypatch.setenv(ACCUMULATION, "4")
    argv = flags(base_model, images, tmp_path / "out", mixed_precision="no", gradient_accumulation_steps=1)
    run = prepare(argv)
    assert run.accelerator.gradient_accumulation_steps == 1
    assert run.accelerator.mixed_precision == "no"
    assert run.module.unet.dtype == torch.float32
    assert f"asks for bf16 ({PRECISION}); --mixed_precision=no is in force" in caplog.text
    assert f"asks for 4 accumulation steps ({ACCUMULATION}); --gradient_accumulation_steps=1 is in force" in caplog.text


def test_fp16_on_a_cpu_is_found_wherever_it_comes_from() -> None:
    args = parse()
    args.mixed_precision = "fp16"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        training_run.build_accelerator(args)


# --- every choice of every flag -------------------------------------------------------------------

# Tried elsewhere: the first takes minutes, the second needs a Hub, the third and fourth a GPU, the fifth masks.
NOT_HERE = {"torch_compile", "push_to_hub", "enable_xformers_memory_efficient_attention", "local_rank", "masked_loss"}
CHOICES = [
    (action.dest, choice)
    for action in build_parser()._actions
    for choice in ([True] if action.nargs == "?" else action.choices or [])
    if action.dest not in NOT_HERE
]
NEEDED = {
    "real_prior": {"with_prior_preservation": True, "real_prior": True},
    "prior_generation_precision": {"with_prior_preservation": True},
    "with_prior_preservation": {"with_prior_preservation": True},
    "center_crop": {"with_prior_preservation": True},
}


def as_flag(name: str, choice: object) -> str:
    return f"--{name}" if choice is True else f"--{name}={choice}"


def is_refused(name: str, choice: object, capsys: pytest.CaptureFixture[str]) -> bool:
    needed = [f"--{one}" for one in NEEDED.get(name, ())]
    try:
        parse(*needed, "--class_data_dir=class", "--class_prompt=cat", as_flag(name, choice))
    except SystemExit as refused:
        assert refused.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"--{name}" in error
        print(error)
        return True
    return False


def test_every_choice_works_for_two_steps_or_is_refused_when_parsed(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    train_here: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(training_run, "use_all_cores", lambda: None)
    folder = draw_images(tmp_path / "real" / "images", 2).parent
    (folder / "images.txt").write_text("".join(f"{folder}/images/{number}.png\n" for number in range(2)))
    (folder / "caption.txt").write_text("a cat\nanother cat\n")

    accepted: dict[str, list[object]] = {}
    refused = []
    for name, choice in CHOICES:
        if is_refused(name, choice, capsys):
            refused.append((name, choice))
        else:
            accepted.setdefault(name, []).append(choice)
    assert ("report_to", "aim") in refused
    assert ("report_to", "all") in refused, "Comet, which is installed, needs an account"
    assert ("report_to", "comet_ml") in refused
    assert {"linear", "cosine", "cosine_with_restarts", "polynomial"} < set(accepted["lr_scheduler"])
    assert {"wandb", "tensorboard", "none"} == set(accepted["report_to"])

    # All choices with as few runs as there are choices of one flag: the n-th run takes the n-th choice of each.
    for number in range(max(map(len, accepted.values()))):
        chosen = {name: choices[number % len(choices)] for name, choices in accepted.items()}
        more = {"class_prompt": "cat", "class_data_dir": tmp_path / f"class{number}", "num_class_images": 2}
        if number > 3:  # the first four try the precisions of generated ones
            more["class_data_dir"] = folder
        else:
            del chosen["real_prior"]
        del chosen["keep_latents" if number % 2 else "no_latent_cache"]
        if number > 1:
            del chosen["noaug"]
        if chosen["freeze_model"] == "crossattn":
            del chosen["token_gate"]
        if chosen["optimizer"] in ("prodigy", "adafactor"):
            del chosen["use_8bit_adam"]
        if chosen["optimizer"] == "prodigy":
            del chosen["scale_lr"]
        more |= {"validation_prompt": "<new1> cat", "num_validation_images": 1} if number < 3 else {}
        train_here(flags(base_model, images, tmp_path / f"out{number}", **(more | chosen)))
        assert (tmp_path / f"out{number}" / "pytorch_custom_diffusion_weights.bin").is_file(), chosen
        capsys.readouterr()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr_scheduler=piecewise_constant"], ["--lr_scheduler", "piecewise_constant", "cosine"]),
        (["--lr_scheduler=polynomial", "--learning_rate=1e-7"], ["polynomial ends at 1e-07", "--learning_rate"]),
        (["--learning_rate=-1"], ["--learning_rate -1.0 is not at least 0"]),
        (["--learning_rate=nan"], ["--learning_rate nan"]),
        (["--learning_rate=inf"], ["--learning_rate inf"]),
        (["--adam_beta1=1"], ["--adam_beta1 1.0 is not at least 0 and below 1"]),
        (["--adam_beta2=-0.1"], ["--adam_beta2 -0.1"]),
        (["--adam_epsilon=-1"], ["--adam_epsilon"]),
        (["--adam_weight_decay=nan"], ["--adam_weight_decay"]),
        (["--prior_loss_weight=inf"], ["--prior_loss_weight"]),
        (["--max_grad_norm=0"], ["--max_grad_norm 0.0", "nothing would be learned"]),
        (["--max_grad_norm=nan"], ["--max_grad_norm nan"]),
        (["--report_to=mlflow"], ["--report_to=mlflow needs the package mlflow: pip install mlflow"]),
        (["--report_to=comet_ml"], ["needs an account with comet_ml", "comet login", "COMET_START_ONLINE=0"]),
        (["--report_to=all"], ["--report_to=all (tensorboard, wandb, comet_ml)", "comet_ml"]),
    ],
)
def test_numbers_and_choices_that_cannot_work_are_refused(
    argv: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    error = refusal(capsys, *argv)
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("report_to", "variables", "file"),
    [
        ("wandb", {"WANDB_API_KEY": "k"}, None),
        ("wandb", {"WANDB_MODE": "offline"}, None),
        ("wandb", {}, (".netrc", "machine api.wandb.ai login user password k")),
        ("wandb", {}, (".config/wandb/settings", "[default]\nmode = offline\n")),
        ("comet_ml", {"COMET_API_KEY": "k"}, None),
        ("comet_ml", {"COMET_START_ONLINE": "0"}, None),
        ("comet_ml", {}, (".comet.config", "[comet]\napi_key=k\n")),
        ("all", {"COMET_API_KEY": "k", "WANDB_API_KEY": "k"}, None),
    ],
)
def test_an_account_is_found(
    report_to: str,
    variables: dict[str, str],
    file: tuple[str, str] | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "COMET_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert "needs an account" in refusal(capsys, f"--report_to={report_to}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if file is not None:
        (tmp_path / file[0]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file[0]).write_text(file[1])
    parse(f"--report_to={report_to}")


def test_a_tracker_that_refuses_is_one_line_before_anything_is_loaded(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise RuntimeError("no such\nproject")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(train_custom_diffusion, "build_dataset", lambda *_: pytest.fail("went on"))
    with pytest.raises(UserError, match=r"^--report_to=wandb: no such$"):
        train_here(flags(base_model, images, tmp_path / "out", report_to="wandb"))


def test_a_warm_up_that_is_longer_than_the_run_warns(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(**more: object) -> list[str]:
        caplog.clear()
        prepare(flags(base_model, images, tmp_path / "out", max_train_steps=3, **more))
        return re.findall("--lr_warmup_steps=.*", caplog.text)

    assert not warnings(lr_warmup_steps=500), "the constant schedule has no warm-up"
    assert not warnings(lr_warmup_steps=3, lr_scheduler="linear")
    (warning,) = warnings(lr_warmup_steps=4, lr_scheduler="constant_with_warmup")
    assert "is longer than the run of 3 steps" in warning
    (warning,) = warnings(lr_warmup_steps=500, lr_scheduler="cosine")
    assert json.loads((tmp_path / "out" / "training_settings.json").read_text())["lr_scheduler"] == "cosine"
