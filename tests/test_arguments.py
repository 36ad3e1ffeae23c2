"""The command line: the example's flags, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

import train_custom_diffusion
from custom_diffusion.errors import UserError
from tests.conftest import ROOT, draw_images, flags, run_script
from train_custom_diffusion import build_parser

# The command line of diffusers' example: name, type, default, choices.
EXAMPLE_FLAGS = """
pretrained_model_name_or_path str None -
revision str None -
variant str None -
tokenizer_name str None -
instance_data_dir str None -
class_data_dir str None -
instance_prompt str None -
class_prompt str None -
validation_prompt str None -
num_validation_images int 2 -
validation_steps int 50 -
with_prior_preservation switch False -
real_prior switch False -
prior_loss_weight float 1.0 -
num_class_images int 200 -
output_dir str custom-diffusion-model -
seed int 42 -
resolution int 512 -
center_crop switch False -
train_batch_size int 4 -
sample_batch_size int 4 -
num_train_epochs int 1 -
max_train_steps int None -
checkpointing_steps int 250 -
checkpoints_total_limit int None -
resume_from_checkpoint str None -
gradient_accumulation_steps int 1 -
gradient_checkpointing switch False -
learning_rate float 1e-05 -
scale_lr switch False -
dataloader_num_workers int 2 -
freeze_model str crossattn_kv crossattn_kv,crossattn
lr_scheduler str constant -
lr_warmup_steps int 500 -
use_8bit_adam switch False -
adam_beta1 float 0.9 -
adam_beta2 float 0.999 -
adam_weight_decay float 0.01 -
adam_epsilon float 1e-08 -
max_grad_norm float 1.0 -
push_to_hub switch False -
hub_token str None -
hub_model_id str None -
logging_dir str logs -
allow_tf32 switch False -
report_to str tensorboard -
mixed_precision str None no,fp16,bf16
prior_generation_precision str None no,fp32,fp16,bf16
concepts_list str None -
local_rank int -1 -
enable_xformers_memory_efficient_attention switch False -
set_grads_to_none switch False -
modifier_token str None -
initializer_token str ktn+pll+ucd -
hflip switch False -
noaug switch False -
no_safe_serialization switch False -
"""


# Not given, as many class images are generated at once as the memory holds.
OTHER_DEFAULTS = {"sample_batch_size": "None"}


@pytest.mark.parametrize("line", EXAMPLE_FLAGS.strip().splitlines())
def test_every_flag_of_the_example_is_there_with_its_default(line: str) -> None:
    name, kind, default, choices = line.split()
    action = build_parser()._option_string_actions[f"--{name}"]
    assert str(action.default) == OTHER_DEFAULTS.get(name, default)
    if kind == "switch":
        assert parse(f"--{name}")[name] is True
        assert parse(f"--{name}=True")[name] is True, "as the documentation of the example writes --real_prior"
        assert parse(f"--{name}=False")[name] is False
    else:
        value = choices.split(",")[-1] if choices != "-" else {"str": "linear", "int": "3", "float": "0.5"}[kind]
        if name == "report_to":
            value = "wandb"
        assert str(parse(f"--{name}={value}")[name]) == value
    if choices != "-":
        assert list(action.choices) == choices.split(",")


def parse(flag: str) -> dict[str, object]:
    return vars(build_parser().parse_args(["--pretrained_model_name_or_path=model", flag]))


def write_list(path: Path, concepts: object) -> Path:
    path.write_text(concepts if isinstance(concepts, str) else json.dumps(concepts))
    return path


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where weights are read: all these mistakes can be seen before."""
    for model in (CLIPTextModel, UNet2DConditionModel, AutoencoderKL, DiffusionPipeline):
        monkeypatch.setattr(model, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))


def missing_folder(tmp: Path, **_: Path) -> dict[str, object]:
    return {"instance_data_dir": tmp / "nowhere"}


def empty_folder(tmp: Path, **_: Path) -> dict[str, object]:
    (tmp / "empty").mkdir()
    return {"instance_data_dir": tmp / "empty"}


def folder_without_images(tmp: Path, **_: Path) -> dict[str, object]:
    (tmp / "texts").mkdir()
    (tmp / "texts" / "notes.txt").write_text("no image")
    return {"instance_data_dir": tmp / "texts"}


def broken_list(tmp: Path, **_: Path) -> dict[str, object]:
    return {"concepts_list": write_list(tmp / "list.json", "[{")}


def list_that_is_no_list(tmp: Path, **_: Path) -> dict[str, object]:
    return {"concepts_list": write_list(tmp / "list.json", {"instance_prompt": "a"})}


def one_concept_beside_none(tmp: Path, images: Path) -> dict[str, object]:
    entry = {"instance_prompt": "a <new1> cat", "instance_data_dir": str(images)}
    return {"concepts_list": write_list(tmp / "list.json", [entry]), "cutmix_probability": 0.2}


def others(folder: Path, caption: str = "") -> dict[str, object]:
    """Other images to show beside a concept, one of them with a caption where there is one."""
    draw_images(folder, 2)
    if caption:
        (folder / "0.txt").write_text(caption)
    return {"cutmix_data_dir": folder, "cutmix_probability": 0.5}


def other_images_without_caption(tmp: Path, **_: Path) -> dict[str, object]:
    return others(tmp / "others", "photo of a dog")


def other_images_of_the_concept(tmp: Path, **_: Path) -> dict[str, object]:
    flags = others(tmp / "others", "photo of a <new1> dog")
    (tmp / "others" / "1.txt").write_text("photo of a dog")
    return flags


def no_other_images(tmp: Path, **_: Path) -> dict[str, object]:
    return {"cutmix_data_dir": tmp / "nowhere", "cutmix_probability": 0.5}


def prompts_too_long_for_one(tmp: Path, images: Path) -> dict[str, object]:
    draw_images(tmp / "second", 1)
    entries = [
        {"instance_prompt": f"<new1> {number} " + "cat " * 40, "instance_data_dir": str(folder)}
        for number, folder in enumerate((images, tmp / "second"))
    ]
    return {"concepts_list": write_list(tmp / "list.json", entries), "cutmix_probability": 0.2}


def list_without_a_key(tmp: Path, images: Path) -> dict[str, object]:
    entry = {"instance_prompt": "a <new1> cat", "instance_data_dir": str(images), "class_prompt": "cat"}
    return {"concepts_list": write_list(tmp / "list.json", [entry]), "with_prior_preservation": True}


def missing_list(tmp: Path, **_: Path) -> dict[str, object]:
    return {"concepts_list": tmp / "nowhere.json"}


def too_few_real_class_images(tmp: Path, **_: Path) -> dict[str, object]:
    draw_images(tmp / "real" / "images", 2)
    (tmp / "real" / "images.txt").write_text("".join(f"{tmp}/real/images/{i}.png\n" for i in range(2)))
    (tmp / "real" / "caption.txt").write_text("a cat\nanother cat\n")
    return real_prior(tmp / "real", num_class_images=3)


def captions_that_do_not_fit(tmp: Path, **_: Path) -> dict[str, object]:
    values = too_few_real_class_images(tmp)
    (tmp / "real" / "caption.txt").write_text("a cat\n")
    return values | {"num_class_images": 2}


def no_retrieved_images(tmp: Path, **_: Path) -> dict[str, object]:
    return real_prior(tmp / "nowhere", num_class_images=3)


def real_prior(folder: Path, num_class_images: int) -> dict[str, object]:
    return {
        "with_prior_preservation": True,
        "real_prior": True,
        "class_prompt": "a black cat",
        "class_data_dir": folder,
        "num_class_images": num_class_images,
    }


def real_images_without_the_flag(tmp: Path, **_: Path) -> dict[str, object]:
    return too_few_real_class_images(tmp) | {"real_prior": False, "output_dir": tmp}


def unwritable_output(tmp: Path, **_: Path) -> dict[str, object]:
    (tmp / "file").write_text("")
    return {"output_dir": tmp / "file" / "out"}


RETRIEVE = "python retrieve.py --class_prompt 'a black cat' --class_data_dir"


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (missing_folder, ["nowhere", "instance_data_dir"]),
        (empty_folder, ["empty", "no readable image"]),
        (folder_without_images, ["texts", "no readable image"]),
        (missing_list, ["nowhere.json", "cannot be read"]),
        (broken_list, ["list.json", "no valid JSON"]),
        (list_that_is_no_list, ["list.json", "must hold a list"]),
        (list_without_a_key, ["list.json", "concept 1", "class_data_dir"]),
        (one_concept_beside_none, ["--cutmix_probability", "list.json", "one folder"]),
        (other_images_without_caption, ["--cutmix_data_dir", "1.png", "caption", "1.txt"]),
        (other_images_of_the_concept, ["--cutmix_data_dir", "0.png", "'<new1>'", "take it out"]),
        (no_other_images, ["nowhere", "--cutmix_data_dir"]),
        (prompts_too_long_for_one, ["--cutmix_probability", "<new1> 0", "<new1> 1", "too long for the 77 tokens"]),
        (too_few_real_class_images, ["2 readable class images of the 3", RETRIEVE, "--num_class_images 3"]),
        (captions_that_do_not_fit, ["images.txt has 2 lines", "caption.txt has 1", RETRIEVE]),
        (no_retrieved_images, ["images.txt", RETRIEVE]),
        (real_images_without_the_flag, ["real class images", "--real_prior"]),
        ({"modifier_token": "<new2>"}, ["'<new2>'", "no instance prompt", "photo of a <new1> cat"]),
        ({"modifier_token": "<new1>+<new1>"}, ["'<new1>'", "twice"]),
        ({"modifier_token": "<new1>+"}, ["empty"]),
        ({"modifier_token": "cat"}, ["'cat'", "vocabulary already"]),
        ({"modifier_token": "../<new1>", "instance_prompt": "../<new1>"}, ["'../<new1>'", "path"]),
        ({"modifier_token": "a/b", "instance_prompt": "a/b"}, ["'a/b'", "path"]),
        ({"modifier_token": ".hidden", "instance_prompt": ".hidden"}, ["'.hidden'", "path"]),
        ({"modifier_token": "<new 1>", "instance_prompt": "<new 1>"}, ["'<new 1>'", "white space"]),
        ({"modifier_token": "x" * 300, "instance_prompt": "x" * 300}, ["too long"]),
        ({"initializer_token": "zebracat"}, ["'zebracat'", "must be one"]),
        (
            {"modifier_token": "<new1>+<new2>", "initializer_token": "ktn", "instance_prompt": "<new1> <new2>"},
            ["1 entries for 2 modifier tokens"],
        ),
        ({"resume_from_checkpoint": "checkpoint-7"}, ["'checkpoint-7'", "none"]),
        ({"resolution": 60}, ["--resolution 60", "multiple of 8", "56 or 64"]),
        (
            {"resolution": 72, "aspect_buckets": True},
            ["--aspect_buckets", "--resolution", "multiple of 16", "64 or 80"],
        ),
        ({"pretrained_model_name_or_path": "/nowhere/model"}, ["/nowhere/model"]),
        ({"pretrained_model_name_or_path": "nobody/has-this-model"}, ["nobody/has-this-model"]),
        ({"tokenizer_name": "/nowhere/tokenizer"}, ["/nowhere/tokenizer"]),
        (unwritable_output, ["--output_dir", "cannot be made"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mistake_gets_one_line_before_any_weights_are_read(
    wrong: dict[str, object] | Callable[..., dict[str, object]],
    words: list[str],
    base_model: Path,
    images: Path,
    tmp_path: Path,
) -> None:
    values = wrong if isinstance(wrong, dict) else wrong(tmp_path, images=images)
    argv = flags(base_model, images, **({"output_dir": tmp_path / "out"} | values))
    with pytest.raises(UserError) as caught:
        train_custom_diffusion.main(argv)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists(), "a run that never began leaves nothing behind"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"instance_data_dir": None}, ["--instance_data_dir", "--concepts_list"]),
        ({"instance_prompt": None}, ["--instance_prompt"]),
        ({"with_prior_preservation": True}, ["--class_data_dir", "--class_prompt"]),
        ({"real_prior": True}, ["--real_prior", "--with_prior_preservation"]),
        ({"max_train_steps": 0}, ["--max_train_steps", "less than 1"]),
        ({"max_train_steps": 10**20}, ["--max_train_steps", "more than 1000000"]),
        ({"train_batch_size": "two"}, ["--train_batch_size", "two"]),
        ({"freeze_model": "all"}, ["--freeze_model", "crossattn_kv"]),
        ({"hflip": "maybe"}, ["--hflip", "True nor False"]),
        ({"seed": -1}, ["--seed", "-1 is not between 0 and 2^32 - 1"]),
        ({"report_to": "paper"}, ["--report_to", "tensorboard"]),
        ({"report_to": "wandb", "hub_token": "hf_secret"}, ["wandb records the command line", "hf auth login"]),
        ({"mixed_precision": "fp16"}, ["fp16", "needs a GPU", "bf16"]),
        ({"enable_xformers_memory_efficient_attention": True}, ["--enable_xformers", "CUDA GPU"]),
        ({"torch_compile": True}, ["--torch_compile", "g++", "CXX"]),
        ({"keep_latents": True, "no_latent_cache": True}, ["--keep_latents", "--no_latent_cache"]),
        ({"latent_variants": 0}, ["--latent_variants", "less than 1"]),
        ({"padding_mode": "reflect"}, ["--padding_mode", "reflect", "edge"]),
        ({"cutmix_probability": 1.5, "concepts_list": "list.json"}, ["--cutmix_probability 1.5", "between 0 and 1"]),
        ({"cutmix_probability": 0.2}, ["--cutmix_probability", "--concepts_list", "--cutmix_data_dir"]),
        ({"cutmix_data_dir": "others"}, ["--cutmix_data_dir", "--cutmix_probability"]),
        (
            {"cutmix_probability": 0.2, "aspect_buckets": True, "concepts_list": "list.json"},
            ["--cutmix_probability", "squares", "--aspect_buckets"],
        ),
        ({"class_image_scheduler": "ddim"}, ["--class_image_scheduler", "ddim", "dpmsolver++"]),
        ({"class_image_steps": 0}, ["--class_image_steps", "0 is not between 1 and 999"]),
        ({"rank": 0}, ["--rank", "less than 1"]),
        ({"rank_alpha": 4}, ["--rank_alpha has no meaning without --rank"]),
        ({"snr_gamma": 0}, ["--snr_gamma", "0 is not a finite number above 0"]),
        ({"optimizer": "sgd"}, ["--optimizer", "sgd", "adafactor"]),
        ({"use_8bit_adam": True, "optimizer": "prodigy"}, ["--use_8bit_adam", "--optimizer=adamw8bit", "not prodigy:"]),
        ({"optimizer": "adafactor", "adam_beta2": 0.99}, ["--adam_beta2 has no meaning", "adafactor", "leave it out"]),
        ({"optimizer": "prodigy", "scale_lr": True}, ["--scale_lr has no meaning", "prodigy"]),
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, ["--learning_rate 0.0001", "prodigy", "--learning_rate=1"]),
    ],
)
def test_a_wrong_argument_gets_a_usage_line_and_an_error_line(
    wrong: dict[str, object],
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    if "fp16" in wrong.values() or "enable_xformers_memory_efficient_attention" in wrong:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has the GPU that the message asks for")
    with pytest.raises(SystemExit) as caught:
        train_custom_diffusion.main(flags(tmp_path, tmp_path, tmp_path, **wrong))
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage:")
    for word in words:
        assert word in error


def test_a_user_sees_no_traceback(base_model: Path, tmp_path: Path) -> None:
    result = run_script(
        "python", ROOT / "train_custom_diffusion.py", *flags(base_model, tmp_path / "nowhere", tmp_path / "out")
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert (
        result.stderr.splitlines()[-1] == f"error: there is no folder {str(tmp_path / 'nowhere')!r} (instance_data_dir)"
    )


@pytest.mark.long
def test_two_processes_say_it_once(base_model: Path, tmp_path: Path) -> None:
    argv = flags(base_model, tmp_path / "nowhere", tmp_path / "out")
    script = ROOT / "train_custom_diffusion.py"
    result = run_script("torchrun", "--nproc_per_node=2", script, *argv, ACCELERATE_USE_CPU="true")
    assert result.returncode != 0
    assert result.stderr.count("error: there is no folder") == 1


def test_a_broken_model_folder_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "image.png").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "model" / "image.png")
    with pytest.raises(UserError, match=r"cannot load the model_index.json in the folder .*model"):
        train_custom_diffusion.main(flags(tmp_path / "model", images, tmp_path / "out"))
