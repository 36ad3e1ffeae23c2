"""Training on Stable Diffusion XL: what the UNet is told, what is trained, and none of the authors' script's faults."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image

import train_custom_diffusion
from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.files import Concept, load_concept
from custom_diffusion.data.views import Renderer, View
from custom_diffusion.errors import UserError
from custom_diffusion.models.families import StableDiffusionXL
from custom_diffusion.training.run import Run, training_batches
from tests.conftest import draw_images, flags, prepare, train
from tests.test_base_models import edit
from tests.test_distributed import relative_difference, two_processes

Train = Callable[[list[str]], None]
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@pytest.fixture
def model(base_model_xl: Path, tmp_path: Path) -> Path:
    """A copy of the base model whose files may be replaced, but not written to."""
    return Path(shutil.copytree(base_model_xl, tmp_path / "model", copy_function=os.link))


@pytest.fixture(scope="session")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real class images with captions, as retrieve.py leaves it; none of them is a square."""
    folder = tmp_path_factory.mktemp("real")
    draw_images(folder / "images", 4, (120, 90))
    names = [f"images/{number}.png" for number in range(4)]
    (folder / "images.txt").write_text("".join(f"{folder / name}\n" for name in names))
    (folder / "caption.txt").write_text("".join(f"a cat, number {number}\n" for number in range(4)))
    return folder


def with_prior(class_images: Path) -> dict[str, object]:
    return {
        "with_prior_preservation": True,
        "real_prior": True,
        "class_data_dir": class_images,
        "class_prompt": "cat",
        "num_class_images": 4,
    }


@pytest.fixture
def two_concepts(images: Path, class_images: Path, tmp_path: Path) -> Path:
    """A list of two concepts with class images."""
    others = draw_images(tmp_path / "pots", 2, (64, 128))
    common = {"class_data_dir": str(class_images), "class_prompt": "cat"}
    concepts = [
        {"instance_prompt": "photo of a <new1> cat", "instance_data_dir": str(images), **common},
        {"instance_prompt": "photo of a <new2> pot", "instance_data_dir": str(others), **common},
    ]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(concepts))
    return path


def plain_pipeline(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_untrained_words(folder: Path, starts: dict[str, str]) -> StableDiffusionXLPipeline:
    """The base model with new words as they are before training, put in by nothing of ours."""
    pipeline = plain_pipeline(folder)
    pairs = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
    for tokenizer, text_encoder in pairs:
        tokenizer.add_tokens(list(starts))
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = text_encoder.get_input_embeddings().weight.data
        for word, start in starts.items():
            table[tokenizer.convert_tokens_to_ids(word)] = table[tokenizer.get_vocab()[start]]
    # Else transformers takes the word for the end of the prompt.
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    return pipeline


def first_batch(run: Run) -> dict[str, Any]:
    return next(training_batches(run))


def learned(folder: Path) -> torch.Tensor:
    return torch.cat([value.float().flatten() for value in load_concept(folder).tensors().values()])


# --- what the UNet is told ------------------------------------------------------------------------


def test_prompts_are_encoded_as_the_pipeline_encodes_them(base_model_xl: Path, images: Path, tmp_path: Path) -> None:
    run = prepare(flags(base_model_xl, images, tmp_path))
    pipeline = with_untrained_words(base_model_xl, {"<new1>": "ktn"})
    prompts = ["photo of a <new1> cat", "a dog", "", "a <new1> cat " * 40]
    for prompt in prompts:
        ids = {name: own.unsqueeze(0) for name, own in run.dataset.tokenize(prompt).items()}
        encoded = run.module.encode_prompts(ids)
        features, _, pooled, _ = pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        # Of an empty prompt the pipeline makes zeros only where it stands in for a negative one.
        assert torch.equal(encoded["features"], features)
        assert torch.equal(encoded["pooled"], pooled)


def test_what_sums_up_a_prompt_is_its_end_and_not_the_new_word(
    base_model_xl: Path, images: Path, tmp_path: Path
) -> None:
    train(flags(base_model_xl, images, tmp_path, max_train_steps=1))
    pipeline = plain_pipeline(base_model_xl)

    def pooled(prompt: str) -> torch.Tensor:
        return pipeline.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)[2]

    other = StableDiffusionXLPipeline(**{**pipeline.components, "unet": copy.deepcopy(pipeline.unet)})
    before, end = pooled("a cat"), pipeline.text_encoder_2.config.eos_token_id
    applied = apply_concepts(pipeline, load_concept(tmp_path))
    assert not torch.allclose(pooled("photo of a <new1> cat"), pooled("photo of a <new1> dog"), atol=1e-4)
    assert torch.equal(pooled("a cat"), before), "prompts without new words are summed up as before"
    # Another pipeline with the same text encoders keeps what it needs; the last concept that goes leaves all as before.
    concept = load_concept(tmp_path)
    also = apply_concepts(other, Concept({}, {"<new2>": concept.tokens["<new1>"]}))
    applied.remove()
    assert not torch.allclose(pooled("photo of a <new2> cat"), pooled("photo of a <new2> dog"), atol=1e-4)
    also.remove()
    assert pipeline.text_encoder_2.config.eos_token_id == end


def test_the_second_tokenizer_pads_by_itself(base_model_xl: Path, images: Path, tmp_path: Path) -> None:
    run = prepare(flags(base_model_xl, images, tmp_path))
    ids = run.dataset.tokenize("a <new1> cat")
    assert ids["text_encoder"][5:].unique().tolist() == [49407]
    assert ids["text_encoder_2"][5:].unique().tolist() == [0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_a_reference_by_hand(
    prediction_type: str, base_model_xl: Path, model: Path, images: Path, class_images: Path, tmp_path: Path
) -> None:
    edit(model / "scheduler" / "scheduler_config.json", prediction_type=prediction_type)
    argv = flags(model, images, tmp_path / "out", train_batch_size=3, prior_loss_weight=0.7, **with_prior(class_images))
    run = prepare(argv)
    batch = first_batch(run)
    latents = run.latents.draw(batch)
    ours = [loss.item() for loss in run.model(latents, **batch)]

    pipeline = with_untrained_words(base_model_xl, {"<new1>": "ktn"})
    samples = [run.dataset.draw(position) for position in range(3)]
    prompts = [sample.instance_prompt for sample in samples] + [sample.class_prompt for sample in samples]
    views = [sample.instance for sample in samples] + [sample.class_image for sample in samples]
    features, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    scheduler = DDPMScheduler.from_pretrained(model / "scheduler")
    noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    told = {"text_embeds": pooled, "time_ids": torch.stack([run.dataset.renderer.time_ids(view) for view in views])}
    predicted = pipeline.unet(noisy, batch["timesteps"], features, added_cond_kwargs=told).sample
    target = batch["noise"]
    if prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, batch["noise"], batch["timesteps"])
    error, mask = (predicted - target).square(), batch["mask"]
    instance = torch.stack([(error[i] * mask[i]).sum() / mask[i].sum() for i in range(3)]).mean().item()
    prior = error[3:].mean().item()
    assert ours == pytest.approx([instance + 0.7 * prior, instance, prior], rel=1e-5)


def view(path: Path, scale: int | None, top: float = 0.0, left: float = 0.0) -> View:
    return View(path, False, scale, top, left)


@pytest.fixture
def landscape(tmp_path: Path) -> Path:
    Image.new("RGB", (300, 200)).save(tmp_path / "landscape.png")
    return tmp_path / "landscape.png"


def test_time_ids_say_what_is_shown(landscape: Path) -> None:
    renderer = Renderer(size=100, mask_size=12)
    # Whole: the middle square of 200, half as large, so that a quarter of 300 x 0.5 is away on the left.
    assert renderer.time_ids([view(landscape, 100)]).tolist() == [200, 300, 0, 25, 100, 100]
    # Small on a canvas: nothing but the sides of the square is away.
    assert renderer.time_ids([view(landscape, 40, 0.3, 0.9)]).tolist() == [200, 300, 0, 10, 100, 100]
    # Zoomed in: 140 pixels, of which the last 100 are seen.
    assert renderer.time_ids([view(landscape, 140, 0.5, 0.999)]).tolist() == [200, 300, 20, 35 + 40, 100, 100]
    # A class image: a square of the shorter side, from anywhere.
    assert renderer.time_ids([view(landscape, None, 0.0, 0.999)]).tolist() == [200, 300, 0, 50, 100, 100]
    # Two beside each other are an image of twice the width.
    pair = [view(landscape, 100), view(landscape, 100)]
    assert renderer.time_ids(pair).tolist() == [100, 200, 0, 0, 100, 200]


def test_an_image_on_its_side_is_told_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("photo.jpg", "photo.png"):
        Image.new("RGB", (300, 200)).save(tmp_path / name, exif=exif)
        assert Renderer(100, 12).time_ids([view(tmp_path / name, 100)]).tolist() == [300, 200, 25, 0, 100, 100]


def test_every_sample_has_its_own_conditioning(
    base_model_xl: Path, two_concepts: Path, class_images: Path, tmp_path: Path
) -> None:
    """Captions, words for the size and the sizes themselves, of single images and of pairs, cached and not."""
    more = {"concepts_list": two_concepts, "modifier_token": "<new1>+<new2>", "cutmix_probability": 0.5}
    more |= dict.fromkeys(("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt"))
    values = {
        **with_prior(class_images),
        **more,
        "train_batch_size": 2,
        "max_train_steps": 6,
        "dataloader_num_workers": 0,
    }
    cached = prepare(flags(base_model_xl, Path(), tmp_path / "one", **values))
    # An image's own caption, so that class texts differ.
    assert set(cached.dataset.conditioning) == {"class"}
    assert {tensor for own in cached.dataset.conditioning["class"].values() for tensor in own} == {"features", "pooled"}
    widths = set()
    for number, batch in enumerate(training_batches(cached)):
        samples = [cached.dataset.draw(position) for position in (2 * number, 2 * number + 1)]
        views = [sample.instance for sample in samples] + [sample.class_image for sample in samples]
        expected = [cached.dataset.renderer.time_ids(shown).tolist() for shown in views]
        assert batch["time_ids"].tolist() == expected
        widths |= {int(row[5]) for row in expected}
        told = cached.module.encode_prompts(batch["input_ids"])
        pooled = torch.cat([told["pooled"], batch["conditioning"]["pooled"]])
        prompts = [sample.instance_prompt for sample in samples] + [sample.class_prompt for sample in samples]
        for prompt, row in zip(prompts, pooled, strict=True):
            ids = {name: own.unsqueeze(0) for name, own in cached.dataset.tokenize(prompt).items()}
            assert torch.allclose(cached.module.encode_prompts(ids)["pooled"][0], row, atol=1e-6)
    assert widths == {64, 128}


# --- what is trained ------------------------------------------------------------------------------


def test_a_word_has_a_row_in_each_encoder_from_its_own_vocabulary(
    model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    """The authors' script looks both rows up with the second tokenizer's ids, and leaves the last untrained."""
    argv = flags(
        model, images, tmp_path, modifier_token="<new1>+<new2>", initializer_token="cat</w>+ktn", max_train_steps=2
    )
    argv += ["--instance_prompt=photo of a <new1> cat with a <new2> dog", "--learning_rate=1e-2"]
    start = prepare([*argv, f"--output_dir={tmp_path / 'start'}"]).learned()
    pipeline = plain_pipeline(model)
    for name, tokenizer in zip(TEXT_ENCODERS, (pipeline.tokenizer, pipeline.tokenizer_2), strict=True):
        table = getattr(pipeline, name).get_input_embeddings().weight
        for token, entry in (("<new1>", "cat</w>"), ("<new2>", "ktn")):
            assert torch.equal(start.tokens[token][name], table[tokenizer.get_vocab()[entry]])
    train_here([*argv, f"--output_dir={tmp_path / 'out'}"])
    concept = load_concept(tmp_path / "out")
    for token, own in concept.tokens.items():
        for name, vector in own.items():
            assert not torch.equal(vector, start.tokens[token][name]), f"{token} of {name} is trained"
    assert {key.split(".processor.")[1] for key in concept.attention} == {
        f"to_{one}_custom_diffusion.weight" for one in "kv"
    }
    layers = [name for name, _ in pipeline.unet.named_modules() if name.endswith("attn2")]
    assert len(concept.attention) == 2 * len(layers)


def test_words_of_two_tokens_are_refused_as_starts(
    base_model_xl: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    with pytest.raises(UserError, match="is 3 tokens and must be one"):
        train_here(flags(base_model_xl, images, tmp_path / "out", initializer_token="rare wombats"))


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        {"freeze_model": "crossattn"},
        {"noaug": True, "hflip": True, "center_crop": True},
        {"gradient_checkpointing": True},
        {"no_latent_cache": True},
        {"mixed_precision": "bf16", "validation_prompt": "<new1> cat", "num_validation_images": 1},
        {"mixed_precision": "bf16", "no_latent_cache": True, "validation_prompt": "<new1>", "num_validation_images": 1},
        {"use_8bit_adam": True},
        {"modifier_token": None, "instance_prompt": "photo of a cat"},
        {"no_safe_serialization": True, "padding_mode": "edge", "keep_latents": True, "scale_lr": True},
    ],
    ids=lambda more: "-".join(more),
)
def test_flags(
    more: dict[str, Any], base_model_xl: Path, images: Path, class_images: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(flags(base_model_xl, images, tmp_path, learning_rate=1e-2, **{**with_prior(class_images), **more}))
    concept = load_concept(tmp_path)
    assert torch.isfinite(learned(tmp_path)).all()
    assert all(value.dtype == torch.float32 for value in concept.tensors().values())
    if "validation_prompt" in more:
        drawn = Image.open(tmp_path / "image_0.png")
        assert drawn.size == (64, 64)
        assert np.asarray(drawn).std() > 1, "no flat grey"


def test_class_images_are_generated(base_model_xl: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    more = with_prior(tmp_path / "class") | {"real_prior": None, "num_class_images": 2}
    train_here(flags(base_model_xl, images, tmp_path / "out", **more))
    assert len(list((tmp_path / "class").glob("*.jpg"))) == 2


@pytest.mark.long
def test_gradient_checkpointing_changes_nothing(
    base_model_xl: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    for name, more in (("plain", {}), ("less", {"gradient_checkpointing": True})):
        train_here(flags(base_model_xl, images, tmp_path / name, learning_rate=1e-2, **more))
    assert relative_difference(learned(tmp_path / "plain"), learned(tmp_path / "less")) < 1e-5


def test_a_resumed_run_ends_bit_equal(
    base_model_xl: Path, images: Path, class_images: Path, tmp_path: Path, train_here: Train
) -> None:
    """The authors' script never reads --resume_from_checkpoint."""
    argv = flags(
        base_model_xl,
        images,
        tmp_path / "out",
        learning_rate=1e-2,
        max_train_steps=4,
        checkpointing_steps=2,
        **with_prior(class_images),
    )
    train_here(argv)
    whole = learned(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    train_here([*argv, "--resume_from_checkpoint=latest"])
    assert torch.equal(learned(tmp_path / "out"), whole)


@pytest.mark.long
def test_two_processes_equal_one_with_the_double_batch(
    base_model_xl: Path, images: Path, class_images: Path, tmp_path: Path, train_here: Train
) -> None:
    more = {"learning_rate": 1e-3, "max_train_steps": 3, **with_prior(class_images)}
    printed = two_processes(*flags(base_model_xl, images, tmp_path / "two", train_batch_size=1, **more))
    assert "difference 0.0\n" in printed
    train_here(flags(base_model_xl, images, tmp_path / "one", train_batch_size=2, **more))
    start = prepare(flags(base_model_xl, images, tmp_path / "start", **more)).learned().tensors().values()
    one, start = learned(tmp_path / "one"), torch.cat([value.float().flatten() for value in start])
    assert (one - start).abs().max() > 1e-3, "there is something to compare"
    assert relative_difference(one, learned(tmp_path / "two"), start) < 3e-4


# --- sizes and the VAE ----------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "resolution"), [(None, 1024), (512, 512), (64, 64)])
def test_the_resolution_that_is_not_given(
    given: int | None, resolution: int, base_model_xl: Path, base_model: Path
) -> None:
    argv = flags(base_model_xl, Path(), Path(), resolution=given)
    args = train_custom_diffusion.parse_args(argv)
    configuration = train_custom_diffusion.read_model(args, train_custom_diffusion.given_flags(argv))
    assert (args.resolution, configuration.latent_size) == (resolution, resolution // 8)
    args.pretrained_model_name_or_path = str(base_model)
    train_custom_diffusion.read_model(args, train_custom_diffusion.given_flags(argv))
    assert args.resolution == (given or 512)


@pytest.mark.parametrize("compute_type", [torch.float32, torch.bfloat16, torch.float16])
def test_the_vae_says_whether_it_works_in_16_bits(compute_type: torch.dtype) -> None:
    family = StableDiffusionXL()
    assert family.vae_dtype({"force_upcast": True}, compute_type) == torch.float32
    assert family.vae_dtype({}, compute_type) == torch.float32  # as diffusers reads it
    assert family.vae_dtype({"force_upcast": False}, compute_type) == compute_type


@pytest.mark.parametrize("whole_model", [True, False])
def test_another_vae_is_used_and_remembered(
    whole_model: bool, base_model_xl: Path, model: Path, images: Path, tmp_path: Path
) -> None:
    """madebyollin/sdxl-vae-fp16-fix is such a one: it need not be in fp32."""
    edit(model / "vae" / "config.json", force_upcast=False)
    other = model if whole_model else model / "vae"
    more = {"pretrained_vae_model_name_or_path": other, "no_latent_cache": True, "mixed_precision": "bf16"}
    run = prepare(flags(base_model_xl, images, tmp_path / "out", **more))
    assert run.latents.vae is not None
    assert run.latents.vae.dtype == torch.bfloat16
    assert run.learned().base_vae == str(other)
    own = prepare(flags(base_model_xl, images, tmp_path / "own", no_latent_cache=True, mixed_precision="bf16"))
    assert own.latents.vae is not None
    assert own.latents.vae.dtype == torch.float32


def test_a_vae_that_is_none(base_model_xl: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    argv = flags(base_model_xl, images, tmp_path / "out", pretrained_vae_model_name_or_path=images)
    with pytest.raises(UserError, match=r"cannot load the VAE .* \(--pretrained_vae_model_name_or_path\)"):
        train_here(argv)
    assert not (tmp_path / "out").exists()


# --- what cannot be trained -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "it is a refiner"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"in_channels": 8}, "InstructPix2Pix"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type=None"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "distilled"),
        ("unet/config.json", {"cross_attention_dim": 48}, "give 32 + 48 features, and its UNet takes 48"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 64}, "is told 64 values"),
        ("text_encoder_2/config.json", {"model_type": "t5"}, "text_encoder_2 is a t5 model"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "in place of a CLIPTextModelWith"),
        ("vae/config.json", {"in_channels": 6}, "VAE takes 6 channels"),
    ],
)
def test_what_cannot_be_trained_gets_one_line(
    part: str, changes: dict[str, Any], words: str, model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    edit(model / part, **changes)
    with pytest.raises(UserError) as caught:
        train_here(flags(model, images, tmp_path / "out"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
