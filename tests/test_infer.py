"""infer.py: from a training run's folder to images one can look at."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextModel

import export
import infer
import merge
import train_custom_diffusion
from custom_diffusion.command_line import SCHEDULERS
from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.cards import model_card
from custom_diffusion.concept.files import find_base_model, load_concept, save_concept
from custom_diffusion.errors import UserError
from custom_diffusion.models import drawing
from custom_diffusion.models.base_model import BaseModel
from tests.conftest import ROOT, flags, run_script

FEW = ["--num_inference_steps", "3"]


def images_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("0*.png"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def test_the_prompt_is_enough_after_a_default_training_run(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "custom-diffusion-model", ignore=shutil.ignore_patterns("checkpoint-*"))
    result = run_script("python", ROOT / "infer.py", "--prompt", "<new1> cat", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "1 images in samples" in result.stdout
    (path,) = images_of(tmp_path / "samples")
    assert path.name == "00000_new1-cat_seed42.png"
    assert Image.open(tmp_path / "samples" / "contact_sheet.png").size == (256, 280)


def test_it_makes_the_documented_image(trained: Path, base_model: Path, tmp_path: Path) -> None:
    infer.main(["--prompt", "<new1> cat", "--model_dir", str(trained), "--output_dir", str(tmp_path), "--seed", "5"])
    pipeline = StableDiffusionPipeline.from_pretrained(base_model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    apply_concepts(pipeline, load_concept(trained))
    generator = torch.Generator().manual_seed(5)
    image = pipeline("<new1> cat", num_inference_steps=100, guidance_scale=6.0, eta=1.0, generator=generator).images[0]
    assert np.array_equal(pixels(images_of(tmp_path)[0]), np.asarray(image))


def test_an_image_depends_on_its_seed_not_on_its_batch(trained: Path, tmp_path: Path) -> None:
    common = ["--prompt", "<new1> cat", "a <new1> dog", "--model_dir", str(trained), *FEW, "--num_images", "3"]
    for batch in ("1", "2", "6"):
        infer.main([*common, "--batch_size", batch, "--output_dir", str(tmp_path / batch)])
    infer.main([*common[:1], common[2], *common[3:], "--seed", "44", "--output_dir", str(tmp_path / "one")])
    for number, path in enumerate(images_of(tmp_path / "1")):
        for batch in ("2", "6"):
            assert np.abs(pixels(path) - pixels(images_of(tmp_path / batch)[number])).max() <= 2
    assert len({path.read_bytes() for path in images_of(tmp_path / "1")}) == 6
    # Image 2 of seed 42 and image 0 of seed 44 are the same.
    third_dog, first_dog = images_of(tmp_path / "1")[5], images_of(tmp_path / "one")[0]
    assert np.array_equal(pixels(third_dog), pixels(first_dog))


def test_metadata_says_how_an_image_was_made(trained: Path, tmp_path: Path) -> None:
    prompt = "<new1> cat, été, 猫"
    argv = ["--prompt", prompt, "--model_dir", str(trained), "--output_dir", str(tmp_path), *FEW, "--num_images", "2"]
    infer.main([*argv, "--negative_prompt", "dog", "--scheduler", "euler"])
    text = Image.open(images_of(tmp_path)[1]).text
    assert (text["prompt"], text["seed"]) == (prompt, "43")
    settings = json.loads(text["settings"])
    assert settings["scheduler"] == "euler"
    assert settings["negative_prompt"] == "dog"
    assert settings["num_inference_steps"] == 3


def test_earlier_images_are_never_replaced(trained: Path, tmp_path: Path) -> None:
    argv = ["--prompt", "<new1> cat", "--model_dir", str(trained), "--output_dir", str(tmp_path), *FEW]
    infer.main(argv)
    first = images_of(tmp_path)[0].read_bytes()
    infer.main([*argv, "--scale", "0"])
    names = [path.name for path in images_of(tmp_path)]
    assert names == ["00000_new1-cat_seed42.png", "00001_new1-cat_seed42.png"]
    assert images_of(tmp_path)[0].read_bytes() == first
    assert not np.array_equal(*map(pixels, images_of(tmp_path)))


def test_prompts_of_a_file_and_of_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a <new1> cat\n\n<new1> in a box\n")
    argv = ["--prompts_file", str(tmp_path / "prompts.txt"), "--model_dir", str(trained / "checkpoint-3"), *FEW]
    infer.main([*argv, "--output_dir", str(tmp_path / "out"), "--height", "32", "--width", "64"])
    assert [pixels(path).shape for path in images_of(tmp_path / "out")] == [(32, 64, 3)] * 2


@pytest.mark.parametrize(("side", "shape"), [("--width", (64, 128, 3)), ("--height", (128, 64, 3))])
def test_a_side_that_is_not_given_is_the_base_models(
    side: str, shape: tuple[int, ...], trained: Path, tmp_path: Path
) -> None:
    argv = ["--prompt", "<new1>", "--model_dir", str(trained), "--output_dir", str(tmp_path), *FEW]
    infer.main([*argv, side, "128"])
    assert [pixels(path).shape for path in images_of(tmp_path)] == [shape]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name: str, trained: Path, tmp_path: Path) -> None:
    argv = ["--prompt", "<new1>", "--model_dir", str(trained), "--output_dir", str(tmp_path), *FEW]
    infer.main([*argv, "--scheduler", name])
    assert pixels(images_of(tmp_path)[0]).std() > 1


def test_bfloat16(trained: Path, tmp_path: Path) -> None:
    argv = ["--prompt", "<new1>", "--model_dir", str(trained), *FEW]
    infer.main([*argv, "--output_dir", str(tmp_path / "fp32")])
    infer.main([*argv, "--output_dir", str(tmp_path / "bf16"), "--dtype", "bf16"])
    exact, rounded = (pixels(images_of(tmp_path / name)[0]) for name in ("fp32", "bf16"))
    assert not np.array_equal(exact, rounded)
    assert rounded.std() > 1, "no black image"


@pytest.mark.parametrize(
    ("device", "has_bf16", "widths", "precision"),
    [
        ("cuda:1", True, (320, 640), "fp16"),
        ("cpu", True, (320, 640), "bf16"),
        ("cpu", True, (96, 160), "bf16"),
        ("cpu", True, (16, 32), "fp32"),
        ("cpu", False, (320, 640), "fp32"),
        ("mps", True, (320, 640), "fp32"),
    ],
)
def test_the_precision_is_the_fastest(
    device: str, has_bf16: bool, widths: tuple[int, ...], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "computes_bf16", lambda: has_bf16)
    model: Any = SimpleNamespace(unet_configuration=lambda: {"block_out_channels": widths})
    assert drawing.fast_precision(model, device) == precision


def test_bfloat16_is_taken_and_named_where_it_is_faster(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing, "computes_bf16", lambda: True)
    monkeypatch.setattr(drawing, "WIDE_ENOUGH_FOR_BF16", 1)
    argv = ["--prompt", "<new1>", "--model_dir", str(trained), "--device", "cpu", *FEW]
    said = {}
    for name, more in (("default", []), ("bf16", ["--dtype=bf16"]), ("fp32", ["--dtype=fp32"])):
        infer.main([*argv, "--output_dir", str(tmp_path / name), *more])
        said[name] = "In bf16, which is faster on this CPU; --dtype fp32" in capsys.readouterr().out
    assert said == {"default": True, "bf16": False, "fp32": False}
    made = {name: images_of(tmp_path / name)[0] for name in said}
    assert np.array_equal(pixels(made["default"]), pixels(made["bf16"]))
    used = {name: json.loads(Image.open(path).text["settings"])["dtype"] for name, path in made.items()}
    assert used == {"default": "bf16", "bf16": "bf16", "fp32": "fp32"}


def test_each_prompt_is_encoded_once(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    forward = CLIPTextModel.forward

    def count(self: CLIPTextModel, *args: Any, **options: Any) -> Any:
        read.append(1)
        return forward(self, *args, **options)

    monkeypatch.setattr(CLIPTextModel, "forward", count)
    argv = ["--prompt", "<new1> cat", "<new1> dog", "--num_images=3", "--batch_size=2", "--model_dir", str(trained)]
    infer.main([*argv, *FEW, "--output_dir", str(tmp_path / "guided")])
    assert len(read) == 2 * 2, "each prompt, and the empty one beside it"
    infer.main([*argv, *FEW, "--output_dir", str(tmp_path / "unguided"), "--guidance_scale=1"])
    assert len(read) == 2 * 2 + 2
    assert len(images_of(tmp_path / "unguided")) == 6


def test_a_prompt_without_a_token_gets_a_warning(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--prompt", "a cat", "<new1> cat", "<NEW1> cat", "--model_dir", str(trained), *FEW]
    infer.main([*argv, "--output_dir", str(tmp_path)])
    assert warnings(capsys) == ["warning: 'a cat' has none of the learned tokens (<new1>)"]
    lower, upper = images_of(tmp_path)[1:]
    assert np.array_equal(pixels(lower), pixels(upper)), "the tokenizer folds case, and so does the check"


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "warning" in line.lower()]


def test_prompts_that_are_too_long_get_a_warning(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = "cat " * 75
    prompts = [
        f"<new1> {filler}on a red sofa, in the Sun",
        f"{filler} on a hill",
        f"{filler}at night with a <New1> cat",
    ]
    argv = ["--prompt", *prompts, "--model_dir", str(trained), "--output_dir", str(tmp_path), *FEW]
    infer.main([*argv, "--negative_prompt", f"{filler}blurred, grey and dark"])
    cut, without, cut_too, lost, negative = warnings(capsys)
    assert cut.endswith(
        "is too long for the text encoder, which does not read its end: 'cat on a red sofa, in the Sun'"
    )
    assert without.endswith("has none of the learned tokens (<new1>)")
    assert cut_too.endswith("which does not read its end: 'on a hill'")
    assert "names <new1> after the 77 tokens that the text encoder reads, so the image will not show it" in lost
    assert negative.startswith("warning: --negative_prompt is too long") and negative.endswith(
        "'blurred, grey and dark'"
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--model_dir", "nowhere"], ["'nowhere'", "--output_dir of a training run"]),
        (["--pretrained_model_name_or_path", "nowhere"], ["no base model folder 'nowhere'"]),
        (["--pretrained_model_name_or_path", "{other}"], ["(16, 32)", "(16, 48)"]),
        (["--device", "toaster"], ["--device 'toaster'"]),
        (["--output_dir", "{file}/out"], ["--output_dir", "cannot be made"]),
        (["--model_dir", "{trained}", "{trained}"], ["'<new1>' is a token of", "merge.py"]),
        (["--tokenizer_name", "{file}"], ["cannot load the tokenizer", "--tokenizer_name"]),
    ],
)
def test_a_mistake_gets_one_line(
    wrong: list[str], words: list[str], trained: Path, base_model_v: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    wrong = [word.format(other=base_model_v, file=tmp_path / "file", trained=trained) for word in wrong]
    with pytest.raises(UserError) as caught:
        infer.main(
            ["--prompt", "<new1>", "--model_dir", str(trained), "--output_dir", str(tmp_path / "out"), *FEW, *wrong]
        )
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([], ["give a prompt"]),
        (["--prompts_file", "nowhere.txt"], ["nowhere.txt", "cannot be read"]),
        (["--prompt", "x", "--num_images", "0"], ["--num_images", "less than 1"]),
        (["--prompt", "x", "--height", "100"], ["--height 100", "multiple of 8"]),
        (["--prompt", "x", "--scheduler", "fast"], ["--scheduler", "ddim"]),
    ],
)
def test_a_wrong_argument(wrong: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        infer.main(wrong)
    assert caught.value.code == 2
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage:")
    for word in words:
        assert word in error


def test_a_card_without_base_model_asks_for_it(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*", "README.md"))
    with pytest.raises(UserError, match="names no base model: give --pretrained_model_name_or_path"):
        infer.main(["--prompt", "<new1>", "--model_dir", str(tmp_path / "copy"), "--output_dir", str(tmp_path / "out")])


def test_a_run_is_repeated_by_the_file_beside_it(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a <new1> dog\n")
    argv = ["--prompt", "<new1> cat", "--prompts_file", str(tmp_path / "prompts.txt"), "--seed", "7", *FEW]
    infer.main([*argv, "--model_dir", str(trained), "--output_dir", str(tmp_path / "out")])
    config = tmp_path / "out" / "00000_config.yaml"
    infer.main(["--config", str(config), "--output_dir", str(tmp_path / "again")])
    first, again = images_of(tmp_path / "out"), images_of(tmp_path / "again")
    assert [path.name for path in first] == ["00000_new1-cat_seed7.png", "00001_a-new1-dog_seed7.png"]
    assert [path.name for path in again] == [path.name for path in first]
    assert all(np.array_equal(pixels(one), pixels(other)) for one, other in zip(first, again, strict=True))
    infer.main(["--config", str(config), "--prompt", "<new1> on a hill"])
    assert images_of(tmp_path / "out")[-1].name == "00002_new1-on-a-hill_seed7.png"
    assert len(images_of(tmp_path / "out")) == 3, "a prompt on the command line replaces those of the file"


# --- what training was told ----------------------------------------------------------------------


def test_what_training_was_told_is_not_forgotten(
    base_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained with --variant=fp16 and --tokenizer_name: the printed command works, and so do all the others."""
    base, words, model = (tmp_path / name for name in ("base", "words", "model"))
    StableDiffusionPipeline.from_pretrained(base_model).save_pretrained(base, variant="fp16")
    (base / "tokenizer").rename(words)
    (base / "tokenizer").mkdir()
    shutil.copy(words / "tokenizer_config.json", base / "tokenizer")
    told = {"variant": "fp16", "tokenizer_name": words, "checkpointing_steps": 1}
    train_custom_diffusion.main(flags(base, images, model, **told))
    python, script, *printed = shlex.split(capsys.readouterr().out.split("See your concept:")[1])
    assert (python, script) == ("python", "infer.py")

    infer.main([*printed, *FEW, "--output_dir", str(tmp_path / "images")])
    infer.main(
        [
            "--prompt",
            "<new1>",
            "--model_dir",
            str(model / "checkpoint-1"),
            *FEW,
            "--output_dir",
            str(tmp_path / "images"),
        ]
    )
    merge.main(["--model_dir", str(model), "--prior_weight=1", "--output_dir", str(tmp_path / "weighed")])
    infer.main(
        ["--prompt", "<new1>", "--model_dir", str(tmp_path / "weighed"), *FEW, "--output_dir", str(tmp_path / "images")]
    )
    assert len(images_of(tmp_path / "images")) == 3
    for form in ("lora", "pipeline"):
        export.main(["--model_dir", str(model), f"--format={form}", "--output_dir", str(tmp_path / form)])
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f'variant="fp16", tokenizer=CLIPTokenizer.from_pretrained("{words}")' in card
    # Cards name files that are there; checkpoints have no .bin.
    for folder in (model, model / "checkpoint-1", tmp_path / "weighed"):
        named = re.findall(r'weight_name="(.+?)"', (folder / "README.md").read_text())
        assert len(named) == 2 and all((folder / name).is_file() for name in named)


def test_the_card_of_a_run_that_writes_only_bin_files(base_model: Path, images: Path, tmp_path: Path) -> None:
    train_custom_diffusion.main(flags(base_model, images, tmp_path, no_safe_serialization=True))
    named = re.findall(r'weight_name="(.+?)"', (tmp_path / "README.md").read_text())
    assert len(named) == 2 and all((tmp_path / name).is_file() for name in named)


def card_of(trained: Path, folder: Path, **more: str | None) -> Path:
    concept = replace(load_concept(trained), **more)
    save_concept(concept, folder)
    (folder / "README.md").write_text(model_card(concept, ["photo of a <new1> cat"], {}))
    return folder


def test_the_command_line_wins_over_the_card(
    trained: Path, base_model: Path, base_model_v: Path, tmp_path: Path
) -> None:
    told = {"base_revision": "old", "base_variant": "fp16", "base_tokenizer": "some/tokenizer"}
    concepts = [load_concept(card_of(trained, tmp_path / "one", **told))]
    here = str(base_model)
    assert find_base_model(None, None, None, concepts) == BaseModel(here, "old", "fp16", "some/tokenizer")
    assert find_base_model(here, None, None, concepts) == BaseModel(here, "old", "fp16", "some/tokenizer")
    assert find_base_model(None, "new", "bf16", concepts, "mine") == BaseModel(here, "new", "bf16", "mine")
    # Of another model than the card's it knows nothing.
    assert find_base_model(str(base_model_v), None, None, concepts) == BaseModel(str(base_model_v))


@pytest.mark.parametrize(
    ("attribute", "flag"), [("base_revision", "--revision"), ("base_tokenizer", "--tokenizer_name")]
)
def test_cards_that_disagree_are_named(attribute: str, flag: str, trained: Path, base_model: Path) -> None:
    one = load_concept(trained)
    other = replace(one, source="the other", **{attribute: "v2"})
    with pytest.raises(UserError, match=f"'the other' with 'v2'.*give {flag}") as caught:
        find_base_model(None, None, None, [one, other])
    assert "\n" not in str(caught.value)


# --- safety checker ------------------------------------------------------------------------------


def test_an_image_that_the_safety_checker_blackens_is_named(
    trained: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = sizes | {"image_size": 32, "patch_size": 16, "projection_dim": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=sizes, projection_dim=8))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)  # a threshold that every image is above
    size = {"height": 32, "width": 32}
    pipeline = StableDiffusionPipeline.from_pretrained(
        base_model, safety_checker=checker, feature_extractor=CLIPImageProcessor(size=size, crop_size=size)
    )
    pipeline.save_pretrained(tmp_path / "base")
    argv = [
        "--prompt",
        "<new1> cat",
        "--num_images=2",
        "--model_dir",
        str(trained),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    argv += ["--pretrained_model_name_or_path", str(tmp_path / "base"), *FEW]
    infer.main(argv)
    said = warnings(capsys)
    assert len(said) == 2
    for path, line in zip(images_of(tmp_path / "out"), said, strict=True):
        assert pixels(path).max() == 0
        assert str(path) in line and "is black" in line and "--no_safety_checker" in line
    infer.main([*argv, "--no_safety_checker"])
    assert warnings(capsys) == []
    assert all(pixels(path).std() > 1 for path in images_of(tmp_path / "out")[2:])


def test_a_tokenizer_that_knows_no_length(trained: Path, base_model: Path, tmp_path: Path) -> None:
    shutil.copytree(base_model, tmp_path / "base")
    config = tmp_path / "base" / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "model_max_length"}))
    argv = ["--prompt", "<new1> cat", "--model_dir", str(trained), *FEW]
    infer.main([*argv, "--output_dir", str(tmp_path / "plain")])
    infer.main(
        [*argv, "--output_dir", str(tmp_path / "out"), "--pretrained_model_name_or_path", str(tmp_path / "base")]
    )
    assert np.array_equal(pixels(images_of(tmp_path / "plain")[0]), pixels(images_of(tmp_path / "out")[0]))


def test_a_run_beside_another_replaces_none_of_its_images(
    trained: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that start at once count the images that are there before either has written one."""
    monkeypatch.setattr(infer, "_first_free_number", lambda folder: 0)
    for scale in ("1", "0"):
        infer.main(
            [
                "--model_dir",
                str(trained),
                "--prompt",
                "<new1> cat",
                "--scale",
                scale,
                "--output_dir",
                str(tmp_path),
                *FEW,
            ]
        )
    images = sorted(path.name for path in tmp_path.glob("0*.png"))
    assert images == ["00000_new1-cat_seed42.png", "00001_new1-cat_seed42.png"]
    assert not np.array_equal(*(pixels(tmp_path / name) for name in images)), "the first is still the first"


def test_samplers_and_negative_prompts_change_the_image(trained: Path, tmp_path: Path) -> None:
    more = {"plain": [], "not": ["--negative_prompt", "a dog on the grass"]}
    more |= {name: ["--scheduler", name] for name in SCHEDULERS if name != "ddim"}
    for name, options in more.items():
        argv = ["--prompt", "<new1>", "--model_dir", str(trained), "--output_dir", str(tmp_path / name), *FEW]
        infer.main([*argv, *options])
    assert len({pixels(images_of(tmp_path / name)[0]).tobytes() for name in more}) == len(more)
