"""Base models: whatever trains can be drawn with, and everything else is one line before anything is written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import train_custom_diffusion
from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel, read_configuration
from custom_diffusion.models.recognizing import missing_weights
from tests.conftest import ROOT, flags
from tests.single_file import single_file

Train = Callable[[list[str]], None]


@pytest.fixture
def model(base_model: Path, tmp_path: Path) -> Path:
    """A copy of the base model whose files may be replaced, but not written to."""
    return Path(shutil.copytree(base_model, tmp_path / "model", copy_function=os.link))


def edit(path: Path, **changes: object) -> None:
    """Change a JSON file; None takes an entry out."""
    content = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def rename(folder: Path, old: str, new: str) -> None:
    for path in folder.glob(f"*/*{old}"):
        path.rename(path.with_name(path.name.removesuffix(old) + new))


def check(model: Path, images: Path, train: Train, **more: object) -> str:
    """The one line with which a model is refused, before weights are read and anything is written."""
    out = model.parent / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(train_custom_diffusion, "open_output_dir", lambda *_: pytest.fail("it was not refused"))
        train(flags(model, images, out, **more))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def draws(model: Path | str) -> bool:
    """Whether images can be drawn with a base model, as infer.py does."""
    pipeline = BaseModel(str(model)).pipeline(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(
        ["a cat"], negative_prompt=["a dog"], num_inference_steps=1, guidance_scale=6.0, eta=1.0, height=64, width=64
    )
    return drawn.images[0].size == (64, 64)


# --- what cannot be trained -----------------------------------------------------------------------


def unet(**changes: object) -> Callable[[Path], None]:
    return lambda model: edit(model / "unet" / "config.json", **changes)


def index(**changes: object) -> Callable[[Path], None]:
    return lambda model: edit(model / "model_index.json", **changes)


def part(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda model: edit(next((model / name).glob("*config.json")), **changes)


def bert(model: Path) -> None:
    index(text_encoder=["transformers", "BertModel"])(model)
    part("text_encoder", model_type="bert", architectures=["BertModel"])(model)


def another_vocabulary(model: Path) -> None:
    part("text_encoder", vocab_size=30000)(model)


def no_vocabulary(model: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (model / "tokenizer" / name).unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unet(in_channels=9), ["takes 9 channels in place of 4", "inpainting", "take the model that it was made from"]),
        (unet(in_channels=8), ["takes 8 channels", "InstructPix2Pix"]),
        (unet(in_channels=5), ["takes 5 channels", "depth map"]),
        (unet(in_channels=7), ["takes 7 channels", "enlarges"]),
        (unet(in_channels=3, out_channels=6), ["takes 3 channels", "more than text"]),
        (unet(out_channels=8), ["predicts 8 channels"]),
        (unet(time_cond_proj_dim=256), ["distilled"]),
        (unet(class_embed_type="projection"), ["class_embed_type='projection'"]),
        (unet(num_class_embeds=1000), ["num_class_embeds=1000"]),
        (unet(addition_embed_type="text_time"), ["addition_embed_type"]),
        (unet(encoder_hid_dim_type="text_proj"), ["encoder_hid_dim_type"]),
        (unet(attention_type="gated"), ["attention_type='gated'"]),
        (unet(_class_name="UNetMotionModel"), ["unet is a UNetMotionModel"]),
        (unet(cross_attention_dim=64), ["gives 32 features, and its UNet takes 64"]),
        (bert, ["text_encoder is a BertModel in place of a CLIPTextModel"]),
        (part("text_encoder", model_type="bert"), ["text encoder is a bert model"]),
        (part("text_encoder", model_type="t5"), ["text encoder is a t5 model"]),
        (index(text_encoder=["transformers", "CLIPTextModelWithProjection"]), ["CLIPTextModelWithProjection"]),
        (index(text_encoder=[None, None]), ["it has no text_encoder"]),
        (index(tokenizer=["transformers", "BertTokenizer"]), ["tokenizer is a BertTokenizer"]),
        (index(vae=["diffusers", "AutoencoderTiny"]), ["vae is a AutoencoderTiny"]),
        (part("vae", _class_name="AsymmetricAutoencoderKL"), ["vae is a AsymmetricAutoencoderKL"]),
        (part("vae", in_channels=6), ["VAE takes 6 channels"]),
        (part("vae", latent_channels=16), ["takes 4 channels in place of 16"]),
        (index(unet=["diffusers", "OnnxRuntimeModel"]), ["unet is a OnnxRuntimeModel"]),
        (index(_class_name="LatentConsistencyModelPipeline"), ["distilled"]),
        (index(_class_name="LatentConsistencyModelImg2ImgPipeline"), ["distilled"]),
        (part("scheduler", _class_name="FlowMatchEulerDiscreteScheduler"), ["FlowMatchEulerDiscreteScheduler"]),
        (part("scheduler", _class_name="EDMEulerScheduler"), ["EDMEulerScheduler"]),
        (part("scheduler", _class_name="CMStochasticIterativeScheduler"), ["CMStochasticIterativeScheduler"]),
        (part("scheduler", prediction_type="sample"), ["predicts 'sample'"]),
        (index(unet=None, transformer=["diffusers", "FluxTransformer2DModel"], _class_name="FluxPipeline"),
         ["a FluxPipeline, is of a family that is not supported"]),
        (index(unet=None, transformer=["diffusers", "SD3Transformer2DModel"], _class_name="StableDiffusion3Pipeline"),
         ["a StableDiffusion3Pipeline, is of a family that is not supported"]),
        (index(unet=None, _class_name="KandinskyPriorPipeline"), ["KandinskyPriorPipeline"]),
        (index(unet=None, unet_2=["diffusers", "UNet2DConditionModel"]), ["not supported"]),
        (another_vocabulary, ["has 49408 entries", "has 30000"]),
        (no_vocabulary, ["tokenizer"]),
    ],
)  # fmt: skip
def test_a_model_that_cannot_work_is_named(
    change: Callable[[Path], None], words: list[str], model: Path, images: Path, train_here: Train
) -> None:
    change(model)
    message = check(model, images, train_here)
    assert str(model) in message
    for word in words:
        assert word in message


def test_a_refiner_is_no_base_model(model: Path, images: Path, train_here: Train) -> None:
    index(
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=[None, None],
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
    )(model)
    check(model, images, train_here)


def test_another_models_tokenizer_that_does_not_fit(model: Path, images: Path, train_here: Train) -> None:
    (model.parent / "empty").mkdir()
    message = check(model, images, train_here, tokenizer_name=model.parent / "empty")
    assert "--tokenizer_name" in message


# --- what is no model's folder --------------------------------------------------------------------


def a_folder(model: Path, name: str, content: dict[str, object] | None = None) -> Path:
    folder = model.parent / "other"
    folder.mkdir()
    (folder / name).write_text(json.dumps(content or {}))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", {"_class_name": "ControlNetModel"}, "is a ControlNetModel, not a whole model"),
        ("config.json", {"model_type": "llama"}, "is a llama, not a whole model"),
        ("pytorch_lora_weights.safetensors", None, "is a LoRA"),
        ("adapter_config.json", None, "is a LoRA"),
        ("learned_embeds.bin", None, "is a textual inversion"),
        ("pytorch_custom_diffusion_weights.bin", None, "is a learned concept (infer.py --model_dir)"),
        ("modular_model_index.json", None, "is a modular pipeline"),
        ("notes.txt", None, "cannot load the model_index.json in the folder"),
        ("model.ckpt", None, "is damaged"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_is(
    name: str, content: dict[str, object] | None, words: str, model: Path, images: Path, train_here: Train
) -> None:
    assert words in check(a_folder(model, name, content), images, train_here)


def test_a_part_of_a_model_names_the_whole(model: Path, images: Path, train_here: Train) -> None:
    message = check(model / "unet", images, train_here)
    assert f"is a UNet2DConditionModel, not a whole model: it belongs to the model {str(model)!r}" in message


@pytest.mark.parametrize("where", ["model", "snapshots/0123"])
def test_a_folder_around_a_model_names_it(where: str, model: Path, images: Path, train_here: Train) -> None:
    outer = model.parent / "outer"
    (outer / where).parent.mkdir(parents=True)
    model.rename(outer / where)
    assert f"its folder {str(outer / where)!r} is a model" in check(outer, images, train_here)


# --- weights that are not there -------------------------------------------------------------------


def test_weights_of_a_variant_are_named(
    model: Path, images: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename(model, ".safetensors", ".fp16.safetensors")
    message = check(model, images, train_here)
    assert (
        f"{str(model / 'unet')!r} has no weights (.safetensors or .bin); those that are there are of --variant=fp16"
        in (message)
    )
    assert "no weights of the variant 'bf16'" in check(model, images, train_here, variant="bf16")
    train_here(flags(model, images, model.parent / "trained", variant="fp16", max_train_steps=1))
    rename(model, ".fp16.safetensors", ".safetensors")
    assert "are of no variant: leave --variant out" in check(model, images, train_here, variant="fp16")


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_weights_that_are_missing_or_cut(name: str, model: Path, images: Path, train_here: Train) -> None:
    (path,) = (model / name).glob("*.safetensors")
    content = path.read_bytes()
    path.unlink()
    assert f"{str(model / name)!r} has no weights" in check(model, images, train_here)
    path.write_bytes(content[: len(content) // 2])
    assert f"{str(path)!r} is damaged, or was not downloaded whole" in check(model, images, train_here)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is only a pointer to the real file: fetch that with `git lfs pull`" in check(model, images, train_here)
    shutil.rmtree(model / name)
    assert f"cannot load the {name} in the folder" in check(model, images, train_here)


def test_weights_in_several_files(model: Path) -> None:
    (path,) = (model / "unet").glob("*.safetensors")
    for number in (1, 2):
        os.link(path, path.with_name(f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"))
        os.link(path, path.with_name(f"diffusion_pytorch_model.bf16-0000{number}-of-00002.safetensors"))
    path.unlink()
    assert not missing_weights(model, ["unet"], None)
    assert not missing_weights(model, ["unet"], "bf16")
    assert missing_weights(model, ["unet"], "fp16")


# --- single files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(base_model: Path) -> dict[str, torch.Tensor]:
    return single_file(base_model)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_a_single_file_is_named_with_the_command_that_converts_it(
    ending: str,
    checkpoint: dict[str, torch.Tensor],
    base_model: Path,
    images: Path,
    tmp_path: Path,
    train_here: Train,
) -> None:
    path = tmp_path / f"it's a model.{ending}"
    if ending == "ckpt":
        torch.save({"state_dict": checkpoint, "global_step": 1}, path)
    else:
        save_file(checkpoint, path)
    message = check(path, images, train_here)
    assert (
        "is a single-file checkpoint of Stable Diffusion 1.x; make a folder of it, and give that: python -c" in message
    )
    # The command, with what the message says of machines without the Hub.
    command = message.split("give that: ")[1].split(" (it fetches")[0]
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    name = json.dumps(str(path))
    exec(code.replace(name, f"{name}, config={str(base_model)!r}"))
    folder = tmp_path / "it's a model"
    for part_name in ("unet", "vae"):
        one, other = (load_file(next((root / part_name).glob("*.safetensors"))) for root in (folder, base_model))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    if ending == "safetensors":
        train_here(flags(folder, images, tmp_path / "trained", max_train_steps=1))
        assert draws(folder)
    # A second conversion would not write into the first one's folder.
    command = check(path, images, train_here).split("give that: ")[1].split(" (it fetches")[0]
    assert "it's a model-diffusers" in shlex.split(command)[2]


def test_a_folder_with_a_single_file_is_named(
    checkpoint: dict[str, torch.Tensor], images: Path, tmp_path: Path, train_here: Train
) -> None:
    (tmp_path / "download").mkdir()
    save_file(checkpoint, tmp_path / "download" / "model.safetensors")
    (tmp_path / "download" / "README.md").touch()
    message = check(tmp_path / "download", images, train_here)
    assert "model.safetensors' is a single-file checkpoint" in message


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
XL = {"first_stage_model.x": (1,), "conditioner.embedders.0.x": (1,), "conditioner.embedders.1.x": (1,)}
WHOLE = {"first_stage_model.x": (1,), "cond_stage_model.transformer.x": (1,)}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (WHOLE | {FIRST: (8, 4, 3, 3)}, "single-file checkpoint of Stable Diffusion 1.x"),
        ({FIRST: (8, 4, 3, 3), "first_stage_model.x": (1,), "cond_stage_model.model.x": (1,)}, "Stable Diffusion 2.x"),
        (WHOLE | {FIRST: (8, 9, 3, 3)}, "a checkpoint that fills in parts of images (inpainting)"),
        (WHOLE | {FIRST: (8, 8, 3, 3)}, "a checkpoint that edits images"),
        ({FIRST: (8, 4, 3, 3)}, "is not a whole model"),
        ({"first_stage_model.encoder.conv_in.weight": (1,)}, "is not a whole model"),
        ({"conv_in.weight": (8, 4, 3, 3)}, "is not a whole model"),
        (XL | {FIRST: (8, 4, 3, 3)}, "single-file checkpoint of Stable Diffusion XL; make a folder of it"),
        (XL | {FIRST: (8, 4, 3, 3)}, "StableDiffusionXLPipeline.from_single_file("),
        (XL | {FIRST: (8, 9, 3, 3)}, "a checkpoint that fills in parts of images (inpainting)"),
        ({FIRST: (8, 4, 3, 3), "conditioner.embedders.0.x": (1,), "conditioner.embedders.1.x": (1,)}, "not a whole"),
        ({FIRST: (8, 4, 3, 3), "conditioner.embedders.0.x": (1,)}, "Stable Diffusion XL's refiner"),
        ({"double_blocks.0.img_attn.proj.weight": (1,)}, "is a Flux model"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "is a Stable Diffusion 3 model"),
        ({"lora_unet_down_blocks_0.lora_up.weight": (1,)}, "is a LoRA"),
        ({"unet.down_blocks.0.attn2.to_k.lora_A.weight": (1,)}, "is a LoRA"),
        ({"control_model.input_blocks.0.0.weight": (1,)}, "is a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (1,)}, "is a ControlNet"),
        ({"emb_params": (1, 8)}, "is a textual inversion"),
        ({"<new1>": (8,)}, "is a textual inversion"),
        ({"down.attn2.processor.to_k_custom_diffusion.weight": (1, 1)}, "is a learned concept"),
    ],
)
def test_a_file_says_what_it_is(
    shapes: dict[str, tuple[int, ...]], words: str, images: Path, tmp_path: Path, train_here: Train
) -> None:
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    assert words in check(path, images, train_here)


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("it ran",))


def test_files_that_cannot_be_used(images: Path, tmp_path: Path, train_here: Train) -> None:
    for name, content, words in (
        ("a.safetensors", b"x" * 100, "is damaged, was not downloaded whole"),
        ("b.safetensors", b"", "is damaged"),
        ("c.ckpt", b"x" * 100, "is damaged"),
        ("d.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("e.gguf", b"GGUF", "is a file: give the folder of a model"),
        ("f.txt", b"", "is a file"),
    ):
        (tmp_path / name).write_bytes(content)
        assert words in check(tmp_path / name, images, train_here)
    torch.save({"state_dict": Dangerous()}, tmp_path / "g.ckpt")
    assert "or holds more than tensors" in check(tmp_path / "g.ckpt", images, train_here)
    assert "there is no model folder" in check(tmp_path / "nowhere.safetensors", images, train_here)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="there is no model folder"):
        patch.chdir(tmp_path)
        train_here(flags(Path("x/y.ckpt"), images, tmp_path / "out"))


# --- what trains can be drawn with ----------------------------------------------------------------


def no_length(model: Path) -> None:
    edit(model / "tokenizer" / "tokenizer_config.json", model_max_length=None)


def too_long(model: Path) -> None:
    edit(model / "tokenizer" / "tokenizer_config.json", model_max_length=512)
    index(tokenizer=["transformers", "CLIPTokenizerFast"])(model)


def image_to_image(model: Path) -> None:
    index(_class_name="StableDiffusionImg2ImgPipeline")(model)
    part("scheduler", _class_name="EulerDiscreteScheduler")(model)


def inpainting_with_four_channels(model: Path) -> None:
    index(_class_name="StableDiffusionInpaintPipeline")(model)
    part("scheduler", _class_name="LCMScheduler")(model)


def saved_with_a_controlnet(model: Path) -> None:
    index(_class_name="StableDiffusionControlNetPipeline", controlnet=["diffusers", "ControlNetModel"])(model)
    (model / "controlnet").mkdir()


@pytest.mark.parametrize(
    "change", [no_length, too_long, image_to_image, inpainting_with_four_channels, saved_with_a_controlnet]
)
def test_whatever_trains_can_be_drawn_with(
    change: Callable[[Path], None], model: Path, images: Path, train_here: Train
) -> None:
    change(model)
    out = model.parent / "out"
    prompt = {"validation_prompt": "<new1> cat", "num_validation_images": 1} if change is no_length else {}
    train_here(flags(model, images, out, max_train_steps=1, **prompt))
    assert (out / "image_0.png").is_file() == bool(prompt)
    assert draws(model)
    tokenizers = BaseModel(str(model)).tokenizers(BaseModel(str(model)).family())
    assert tokenizers["text_encoder"].model_max_length == 77


def test_the_small_model_is_one() -> None:
    # With latents of 24 channels, texts of 32 tokens and a vocabulary of its own.
    model = BaseModel(str(ROOT / "base"))
    assert read_configuration(model, 256).latent_channels == 24
    assert model.tokenizers(model.family())["text_encoder"].model_max_length == 32


def test_a_pipeline_draws_with_the_other_vae(base_model_xl: Path, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(base_model_xl / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 2
    vae.save_pretrained(tmp_path / "vae")
    pipeline = BaseModel(str(base_model_xl), other_vae=str(tmp_path / "vae")).pipeline(torch.float32)
    assert torch.equal(pipeline.vae.decoder.conv_out.weight, vae.decoder.conv_out.weight)
