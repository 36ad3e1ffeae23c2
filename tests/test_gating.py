"""Concepts that act at their own words alone: at which positions, in training, in files and in pipelines."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTokenizer

import export
import infer
import merge
from benchmarks.gate import main as measure_speed
from custom_diffusion import UserError, apply_concepts, load_concept, save_concept
from custom_diffusion.concept.closed_form import UNGATE_RIDGE
from custom_diffusion.concept.files import WEIGHTS_STEM
from custom_diffusion.concept.gating import GatedWeights, GatedWords, TokenGate, class_of
from custom_diffusion.concept.parts import Part
from custom_diffusion.concept.projections import original_projections
from custom_diffusion.concept.text_features import TextModels
from custom_diffusion.models.base_model import BaseModel
from tests.conftest import MakeOnce, draw_images, flags, prepare, train

CAT, POT = GatedWords(("<new1>",), ("cat",)), GatedWords(("<new2>",), ("wooden pot",))


@pytest.fixture(scope="module")
def words(base_model: Path) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(base_model / "tokenizer")
    tokenizer.add_tokens(["<new1>", "<new2>"])
    return tokenizer


def gated(tokenizer: CLIPTokenizer, prompt: str, *concepts: GatedWords) -> list[list[str]]:
    """The tokens at which each concept acts."""
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    mask = TokenGate(tokenizer, concepts).mask(ids)
    assert mask.shape == (1, 77, len(concepts))
    pieces = tokenizer.convert_ids_to_tokens(ids[0])
    return [
        [piece.removesuffix("</w>") for piece, on in zip(pieces, row, strict=True) if on] for row in mask[0].T.tolist()
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("photo of a <new1> cat", ["<new1>", "cat"]),
        ("a <NEW1> Cat, on grass", ["<new1>", "cat"]),
        ("two <new1> cats.", ["<new1>", "cats"]),
        ("the <new1>'s eyes", ["<new1>"]),
        ("a <new1>, cat", ["<new1>"]),
        ("a <new1>", ["<new1>"]),
        ("a <new1> sitting cat", ["<new1>"]),
        ("a <new1> cat and a <new1> cat", ["<new1>", "cat"] * 2),
        ("a cat on the grass", []),
        ("", []),
        ("cat " * 74 + "<new1> cat", ["<new1>"]),
        ("cat " * 75 + "<new1> cat", []),
    ],
)
def test_a_concept_acts_at_its_words(words: CLIPTokenizer, prompt: str, expected: list[str]) -> None:
    assert gated(words, prompt, CAT) == [expected]


def test_each_concept_acts_at_its_own_words(words: CLIPTokenizer) -> None:
    prompt = "a <new1> cat in two <new2> wooden pots beside a cat and a wooden pot"
    assert gated(words, prompt, CAT, POT) == [["<new1>", "cat"], ["<new2>", "wooden", "pots"]]


def test_a_word_of_several_tokens_is_gated_whole(words: CLIPTokenizer) -> None:
    pieces = [piece.removesuffix("</w>") for piece in words.tokenize("tortoiseplushie")]
    assert len(pieces) > 1
    for classes in (("tortoiseplushie",), ()):
        own = GatedWords(("<new1>",), classes)
        assert gated(words, "a <new1> tortoiseplushie on grass", own) == [["<new1>", *pieces]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("<new1> kitten on grass", ["<new1>", "kitten"]), ("<new1>, kitten", ["<new1>"]), ("<new1> <new2>", ["<new1>"])],
)
def test_without_class_words_it_is_the_word_that_follows(
    words: CLIPTokenizer, prompt: str, expected: list[str]
) -> None:
    assert gated(words, prompt, GatedWords(("<new1>",)))[0] == expected


def test_the_class_words_are_those_of_a_class_prompt() -> None:
    assert [class_of(text) for text in ("cat", "a photo of a wooden pot", "The Cat")] == ["cat", "wooden pot", "cat"]


# --- trained -------------------------------------------------------------------------------------


def train_gated(base_model: Path, images: Path, folder: Path, **more: Any) -> None:
    options = {"token_gate": True, "learning_rate": 1e-2, "max_train_steps": 3, "checkpointing_steps": 2}
    train(flags(base_model, images, folder / "out", **(options | more)))


@pytest.fixture(scope="module")
def cat(base_model: Path, images: Path, make_once: MakeOnce) -> Path:
    options = {"validation_prompt": "<new1> cat in a bucket", "validation_steps": 2, "num_validation_images": 1}
    return make_once("gated-cat", lambda folder: train_gated(base_model, images, folder, **options)) / "out"


@pytest.fixture(scope="module")
def plant(base_model: Path, images: Path, make_once: MakeOnce) -> Path:
    options = {"modifier_token": "<new2>", "instance_prompt": "photo of a <new2> plant", "rank": 2, "seed": 7}
    return make_once("gated-plant", lambda folder: train_gated(base_model, images, folder, **options)) / "out"


@pytest.fixture
def pipeline(base_model: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(base_model, safety_checker=None)


def draw(pipeline: Any, prompts: str | Sequence[str], **more: Any) -> torch.Tensor:
    count = 1 if isinstance(prompts, str) else len(prompts)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt", "height": 64, "width": 64, "guidance_scale": 4.0}
    generators = [torch.Generator().manual_seed(n) for n in range(count)]
    return pipeline(prompts, generator=generators, **(options | more)).images


def test_the_file_says_where_a_concept_acts(cat: Path, plant: Path, tmp_path: Path) -> None:
    for folder, words in ((cat, GatedWords(("<new1>",), ("cat",))), (plant, GatedWords(("<new2>",), ("plant",)))):
        concept = load_concept(folder)
        assert [gate.words for gate in concept.gates] == [words]
        assert not concept.projections()
        assert any(change.abs().max() > 0 for change in concept.gates[0].whole().values())
        assert str(words) in (folder / "README.md").read_text()
        with safetensors.safe_open(folder / f"{WEIGHTS_STEM}.safetensors", "pt") as file:
            assert file.metadata()["token_gate"] == str(words)
        save_concept(concept, tmp_path / folder.parent.name, safetensors_too=False)
        again = load_concept(tmp_path / folder.parent.name)
        assert again.gates[0].words == words
        assert all(torch.equal(value, again.tensors()[name]) for name, value in concept.tensors().items())


def test_a_prompt_without_the_new_word_gives_the_base_models_image(
    cat: Path, plant: Path, pipeline: StableDiffusionPipeline
) -> None:
    other, own = "a cat in a bucket", "a <new1> cat in a bucket"
    before, without_dog = draw(pipeline, other), draw(pipeline, other, negative_prompt="a dog")
    assert not torch.equal(before, without_dog)
    applied = apply_concepts(pipeline, load_concept(cat), load_concept(plant))
    assert torch.equal(draw(pipeline, other), before)
    assert torch.equal(draw(pipeline, other, negative_prompt="a dog"), without_dog)
    assert not torch.allclose(draw(pipeline, other, negative_prompt="a <new1> cat"), before, atol=1e-3)
    one = draw(pipeline, own)
    assert not torch.allclose(one, before, atol=1e-3)
    # A batch has each prompt's image.
    both = draw(pipeline, [own, other])
    torch.testing.assert_close(both[0], one[0], atol=1e-4, rtol=0)
    applied.remove()
    assert torch.equal(draw(pipeline, other), before)
    assert not pipeline.unet._forward_pre_hooks
    assert not any("gated" in name for name, _ in pipeline.unet.named_buffers())


def test_concepts_that_were_trained_apart_do_not_touch_each_other(
    cat: Path, plant: Path, pipeline: StableDiffusionPipeline
) -> None:
    own, both = "a <new1> cat in a bucket", "a <new1> cat beside a <new2> plant"
    applied = apply_concepts(pipeline, load_concept(cat))
    alone = draw(pipeline, own)
    applied.remove()
    applied = apply_concepts(pipeline, load_concept(cat), load_concept(plant))
    assert torch.equal(draw(pipeline, own), alone)
    together = draw(pipeline, both)
    applied.remove()
    apply_concepts(pipeline, load_concept(cat), load_concept(plant), scale=[1.0, 0.0])
    assert torch.equal(draw(pipeline, own), alone)
    assert not torch.equal(draw(pipeline, both), together)


@pytest.fixture(scope="module")
def pot(cat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A third concept: other words, and another change."""
    concept, folder = load_concept(cat), tmp_path_factory.mktemp("gated-pot")
    changes = {key: -change.flip(0) for key, change in concept.gates[0].whole().items()}
    tokens = {"<new3>": {name: vector.flip(0) for name, vector in concept.tokens["<new1>"].items()}}
    gate = GatedWeights(GatedWords(("<new3>",), ("wooden pot",)), changes)
    shutil.copy(cat / "README.md", folder)  # which names the base model
    save_concept(replace(concept, tokens=tokens, gates=(gate,)), folder)
    return folder


def test_each_of_three_concepts_is_as_alone_when_all_are_loaded(
    cat: Path, plant: Path, pot: Path, tmp_path: Path
) -> None:
    own = {cat: "a <new1> cat in a bucket", plant: "a <new2> plant in a bucket", pot: "a <new3> wooden pot in a bucket"}

    def images(name: str, *concepts: Path) -> dict[str, np.ndarray]:
        prompts = [prompt for concept, prompt in own.items() if concept in concepts]
        argv = ["--model_dir", *map(str, concepts), "--prompt", *prompts, f"--output_dir={tmp_path / name}"]
        infer.main([*argv, "--num_inference_steps=2", "--height=64", "--width=64"])
        files = [next((tmp_path / name).glob(f"{number:05d}_*.png")) for number in range(len(prompts))]
        return {prompt: np.asarray(Image.open(file)) for prompt, file in zip(prompts, files, strict=True)}

    together = images("together", *own)
    for number, (concept, prompt) in enumerate(own.items()):
        assert np.array_equal(together[prompt], images(f"alone-{number}", concept)[prompt])
    assert len({image.tobytes() for image in together.values()}) == 3


def test_keys_and_values_are_those_of_the_formula(cat: Path, pipeline: StableDiffusionPipeline) -> None:
    """``K = W0 c + scale m dW c``, with the positions found from the features alone."""
    concept, prompt = load_concept(cat), "a <new1> cat in a bucket"
    key, change = next(item for item in concept.gates[0].whole().items() if "to_k" in item[0])
    layer = pipeline.unet.get_submodule(key.split(".processor")[0]).to_k
    apply_concepts(pipeline, concept, scale=0.5)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    draw(pipeline, prompt, num_inference_steps=1)
    features, keys = seen[0]
    expected = torch.nn.functional.linear(features, layer.weight)
    expected[1, 2:4] += 0.5 * features[1, 2:4] @ change.T  # the second half of guidance; start, "a", then the words
    torch.testing.assert_close(keys, expected)


def test_training_and_pipelines_compute_the_same(base_model: Path, images: Path, cat: Path) -> None:
    run = prepare(flags(base_model, images, cat.parent / "again", token_gate=True))
    module = run.module
    module.restore(load_concept(cat))
    ids = run.dataset.tokenize("photo of a <new1> cat")
    latents, time = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    module.eval()
    with torch.no_grad():
        features = module.encode_prompts({name: own[None] for name, own in ids.items()})["features"]
        trained = module.unet(latents, time, features).sample
        pipeline = StableDiffusionPipeline.from_pretrained(base_model, safety_checker=None)
        apply_concepts(pipeline, load_concept(cat))
        plain, _ = pipeline.encode_prompt("photo of a <new1> cat", "cpu", 1, False)
        torch.testing.assert_close(pipeline.unet(latents, time, plain).sample, trained, atol=1e-5, rtol=1e-4)


def test_other_pipelines_that_share_the_models_are_gated_too(cat: Path, pipeline: StableDiffusionPipeline) -> None:
    img2img = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    options = {"image": image, "num_inference_steps": 4, "height": None, "width": None}
    options = {name: value for name, value in options.items() if value is not None}

    def redraw(prompt: str) -> torch.Tensor:
        img2img.set_progress_bar_config(disable=True)
        return img2img(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **options).images

    before = redraw("a cat")
    apply_concepts(pipeline, load_concept(cat))
    assert torch.equal(redraw("a cat"), before)
    assert not torch.allclose(redraw("a <new1> cat"), before, atol=1e-3)


@pytest.mark.parametrize("kind", ["inpainting", "ControlNet"])
def test_inpainting_and_controlnet(cat: Path, pipeline: StableDiffusionPipeline, kind: str) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    if kind == "inpainting":
        other: Any = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
        mask = torch.zeros(1, 1, 64, 64)
        mask[..., 16:48, 16:48] = 1
        given = {"image": image, "mask_image": mask, "strength": 1.0}
    else:
        controlnet = ControlNetModel.from_unet(pipeline.unet)
        for block in controlnet.controlnet_down_blocks:  # zeros in a new one, which would change nothing
            torch.nn.init.normal_(block.weight, std=0.1, generator=torch.Generator().manual_seed(2))
        other = StableDiffusionControlNetPipeline(
            **pipeline.components, controlnet=controlnet, requires_safety_checker=False
        )
        given = {"image": image}

    def redraw(*prompts: str, **more: Any) -> torch.Tensor:
        repeated = {
            name: own.repeat(len(prompts), 1, 1, 1) if torch.is_tensor(own) else own for name, own in given.items()
        }
        return draw(other, list(prompts), **repeated, **more)

    plain, with_negative = redraw("a cat", "a dog"), redraw("a cat", "a dog", negative_prompt=["a bird", "a bird"])
    assert not torch.allclose(plain, draw(pipeline, ["a cat", "a dog"]), atol=1e-3), "another pipeline"
    applied = apply_concepts(other, load_concept(cat))
    assert torch.equal(redraw("a cat", "a dog"), plain)
    mixed = redraw("a <new1> cat", "a dog")
    assert torch.equal(mixed[1], plain[1])
    assert not torch.allclose(mixed[0], plain[0], atol=1e-3)
    torch.testing.assert_close(mixed[:1], redraw("a <new1> cat"), atol=1e-4, rtol=0)
    negative = redraw("a cat", "a dog", negative_prompt=["a <new1> bird", "a bird"])
    assert torch.equal(negative[1], with_negative[1])
    assert not torch.allclose(negative[0], with_negative[0], atol=1e-3)
    applied.remove()
    assert torch.equal(redraw("a cat", "a dog"), plain)


def test_embeddings_of_the_pipeline_are_known_and_others_refused(cat: Path, pipeline: StableDiffusionPipeline) -> None:
    apply_concepts(pipeline, load_concept(cat))
    positive, negative = pipeline.encode_prompt("a <new1> cat", "cpu", 1, True)
    known = draw(pipeline, "a <new1> cat")
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(
        pipeline(
            **given, generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="pt",
            height=64, width=64, guidance_scale=4.0,
        ).images,
        known,
    )  # fmt: skip
    with pytest.raises(UserError, match="not made by this pipeline's text encoder"):
        pipeline(prompt_embeds=positive * 1.1, negative_prompt_embeds=negative, num_inference_steps=1)


def test_fused_projections_are_refused_rather_than_passed_by(cat: Path, pipeline: StableDiffusionPipeline) -> None:
    apply_concepts(pipeline, load_concept(cat))
    pipeline.fuse_qkv_projections(vae=False)
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        draw(pipeline, "a <new1> cat")


def test_merging_and_exporting_say_what_to_use_instead(cat: Path, plant: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs no merging"):
        merge.main(["--model_dir", str(cat), str(plant), "--output_dir", str(tmp_path / "merged")])
    for name in ("lora", "delta", "pipeline"):
        with pytest.raises(UserError, match=r"infer\.py or apply_concepts.*--ungate"):
            export.main(["--model_dir", str(cat), "--format", name, "--output_dir", str(tmp_path / name)])
    assert not list(tmp_path.iterdir())


def test_two_gated_concepts_need_words_of_their_own(cat: Path, pipeline: StableDiffusionPipeline) -> None:
    other = replace(load_concept(cat), source="other")
    with pytest.raises(UserError, match="another --modifier_token"):
        apply_concepts(pipeline, load_concept(cat), other)
    assert not pipeline.unet._forward_pre_hooks


@pytest.mark.long
def test_the_benchmark_of_speed_runs(base_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--height", "64", "--width", "64", "--steps", "2", "--repeats", "1", "--device", "cpu"]
    measure_speed(["--base_model_dir", str(base_model), *size])
    assert "(median of 1)" in capsys.readouterr().out


# --- exported ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(cat: Path, plant: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two gated concepts in one folder, one of whole matrices and one of low rank."""
    one, other = load_concept(cat), load_concept(plant)
    folder = tmp_path_factory.mktemp("both")
    shutil.copy(cat / "README.md", folder)
    save_concept(replace(one, tokens=one.tokens | other.tokens, gates=one.gates + other.gates), folder)
    return folder


PROMPTS = ("a <new1> cat in the snow", "two <new1> cats", "a <new2> plant", "a cat in the snow", "a dog beside a plant")


def ungate(concept: Path, base_model: Path, folder: Path, *more: str) -> None:
    (folder.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--ungate", "--prompts_file", str(folder.parent / "prompts.txt"), "--output_dir", str(folder)]
    export.main(["--model_dir", str(concept), "--pretrained_model_name_or_path", str(base_model), *options, *more])


def relative(part: torch.Tensor, whole: torch.Tensor) -> float:
    return (part.norm() / whole.norm()).item()


def test_an_export_without_gate_is_the_least_squares_solution_and_says_what_it_lacks(
    base_model: Path, both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ungate(both, base_model, tmp_path / "delta", "--format", "delta")
    said = re.search(r"misses ([\d.]+)% .* moves keys and values by ([\d.]+)% ", capsys.readouterr().out)
    assert said is not None
    concept, plain = load_concept(both), load_concept(tmp_path / "delta")
    assert not plain.gates
    originals = original_projections(BaseModel(str(base_model)), plain.attention)

    models = TextModels.load(BaseModel(str(base_model)))
    models.add_tokens([Part(concept, {})])
    ids = models.tokenize(PROMPTS)
    with torch.no_grad():
        features = models.family.encode(models.text_encoders, ids)["features"].double()
    mask = TokenGate(models.tokenizers["text_encoder"], [gate.words for gate in concept.gates]).mask(
        ids["text_encoder"]
    )
    # Prompts with the words and prompts without weigh the same.
    weights = torch.tensor([1 / 3] * 3 + [1 / 2] * 2, dtype=torch.float64).sqrt()[:, None, None]
    rows, words = (features * weights).flatten(0, 1), mask.any(-1).flatten()
    ridge = UNGATE_RIDGE * rows.square().sum(0).mean() * torch.eye(rows.shape[1], dtype=torch.float64)
    missed, learned, moved, known = [], [], [], []
    for key, original in originals.items():
        acts = [gate.whole()[key].double() for gate in concept.gates]
        wanted = sum((mask[..., n, None] * weights * (features @ act.T)).flatten(0, 1) for n, act in enumerate(acts))
        zeros = torch.zeros(rows.shape[1], len(original), dtype=torch.float64)
        best = torch.linalg.lstsq(torch.cat([rows, ridge.sqrt()]), torch.cat([wanted, zeros])).solution
        change = plain.attention[key].double() - original.double()
        torch.testing.assert_close(change, best.T, atol=1e-5, rtol=1e-3)
        missed.append((rows @ change.T - wanted)[words])
        learned.append(wanted[words])
        moved.append((rows @ change.T)[~words])
        known.append((rows @ original.double().T)[~words])
    figures = [
        100 * relative(torch.cat(part, 1), torch.cat(whole, 1)) for part, whole in ((missed, learned), (moved, known))
    ]
    assert figures == pytest.approx([float(text) for text in said.groups()], abs=0.051)
    assert 0 < figures[0] < 90


def test_every_format_holds_the_ungated_weights(base_model: Path, cat: Path, tmp_path: Path) -> None:
    full = {"lora": ["--energy", "1", "--dtype", "fp32"], "delta": [], "pipeline": []}
    prompt = "a <new1> cat in the snow"
    images = {}
    for name, more in full.items():
        ungate(cat, base_model, tmp_path / name, "--format", name, *more)
        card = (tmp_path / name / "README.md").read_text()
        assert "load_attn_procs" in card
        assert re.search(r"misses [\d.]+% of what was learned", card)
        pipeline = StableDiffusionPipeline.from_pretrained(
            tmp_path / name if name == "pipeline" else base_model, safety_checker=None
        )
        if name == "lora":
            pipeline.load_lora_weights(tmp_path / name, weight_name="lora.safetensors")
            pipeline.load_textual_inversion(tmp_path / name, weight_name="new1.safetensors", token="<new1>")
        if name == "delta":
            apply_concepts(pipeline, load_concept(tmp_path / name))
        images[name] = draw(pipeline, prompt)
    assert torch.equal(images["pipeline"], images["delta"])
    torch.testing.assert_close(images["lora"], images["delta"], atol=2 / 255, rtol=0)
    words_only = StableDiffusionPipeline.from_pretrained(base_model, safety_checker=None)
    apply_concepts(words_only, replace(load_concept(cat), gates=()))
    assert not torch.allclose(draw(words_only, prompt), images["delta"], atol=2 / 255)


def test_without_prompts_it_is_captions_with_the_concept_and_without(
    base_model: Path, cat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export.main(["--model_dir", str(cat), "--table", "--ungate"])
    said = re.search(r"over (\d+) prompts with these words and (\d+) without", capsys.readouterr().out)
    assert said is not None
    assert int(said[1]) > 500, "alone, and beside what captions show"
    assert int(said[2]) == 500


def test_what_cannot_be_ungated_is_refused(
    base_model: Path, cat: Path, both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, options = tmp_path / "prompts.txt", ["--format=delta", f"--output_dir={tmp_path / 'out'}"]
    path.write_text("a <new1> cat\na dog")
    with pytest.raises(UserError, match="no prompt has <new2>"):
        export.main([f"--model_dir={both}", "--ungate", f"--prompts_file={path}", *options])
    with pytest.raises(UserError, match=r"--prompts_file .* cannot be read"):
        export.main([f"--model_dir={both}", "--ungate", f"--prompts_file={tmp_path / 'none.txt'}", *options])
    save_concept(replace(load_concept(cat), gates=()), tmp_path / "plain")
    with pytest.raises(UserError, match="has no gate"):
        export.main([f"--model_dir={tmp_path / 'plain'}", "--ungate", *options])
    with pytest.raises(SystemExit):
        export.main([f"--model_dir={cat}", f"--prompts_file={path}", *options])
    assert "--prompts_file is for --ungate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{}, pytest.param({"no_latent_cache": True, "gradient_checkpointing": True}, marks=pytest.mark.long)]
)
def test_a_resumed_run_ends_with_the_same_weights(
    base_model: Path, images: Path, cat: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    options = {"learning_rate": 1e-2, "token_gate": True, **more}
    train(flags(base_model, images, tmp_path / "whole", max_train_steps=3, **options))
    train(flags(base_model, images, tmp_path / "parts", max_train_steps=2, checkpointing_steps=2, **options))
    rest = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    train(flags(base_model, images, tmp_path / "parts", **rest, **options))
    whole, parts = (load_concept(tmp_path / name).tensors() for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_each_concept_of_a_list_has_weights_of_its_own(base_model: Path, images: Path, tmp_path: Path) -> None:
    others = draw_images(tmp_path / "pots", 3)
    entries = [
        {"instance_prompt": "photo of a <new1> cat", "class_prompt": "cat", "instance_data_dir": str(images)},
        {"instance_prompt": "photo of a <new2> wooden pot", "class_prompt": "wooden pot",
         "instance_data_dir": str(others)},
    ]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(entries))
    options = {"concepts_list": tmp_path / "list.json", "modifier_token": "<new1>+<new2>", "instance_prompt": None}
    options |= {"instance_data_dir": None, "cutmix_probability": 0.5, "learning_rate": 1e-2, "max_train_steps": 4}
    train(flags(base_model, images, tmp_path / "out", token_gate=True, **options))
    concept = load_concept(tmp_path / "out")
    assert [gate.words for gate in concept.gates] == [CAT, POT]
    one, other = (gate.whole() for gate in concept.gates)
    assert all(change.abs().max() > 0 for changes in (one, other) for change in changes.values())
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_one_concept_is_taught_beside_other_images(base_model: Path, images: Path, tmp_path: Path) -> None:
    """With masks and everything encoded ahead; and what is taught depends on the other images."""
    folder = draw_images(tmp_path / "others", 2)
    results = []
    for number, noun in enumerate(("dog", "tree", "tree")):
        for path in folder.glob("*.png"):
            path.with_suffix(".txt").write_text(f"photo of a {noun}")
        options = {"cutmix_probability": 0.5, "cutmix_data_dir": folder, "noaug": True}
        output = tmp_path / f"out{number}"
        more = {"max_train_steps": 4, "learning_rate": 1e-2, "no_latent_cache": number == 2}
        train(flags(base_model, images, output, token_gate=True, **options, **more))
        results.append(load_concept(output).gates[0].whole())
    assert all(change.abs().max() > 0 for change in results[0].values())
    for key, change in results[1].items():
        assert torch.equal(change, results[2][key]), "encoding ahead changes nothing"
        assert not torch.equal(change, results[0][key])


def test_class_captions_are_cached_with_their_gate(base_model: Path, images: Path, tmp_path: Path) -> None:
    options = {"with_prior_preservation": True, "class_data_dir": images, "class_prompt": "cat", "num_class_images": 5}
    train_gated(base_model, images, tmp_path, max_train_steps=2, **options)
    assert load_concept(tmp_path / "out").gates[0].words == CAT


def test_xl(base_model_xl: Path, images: Path, tmp_path: Path) -> None:
    train_gated(base_model_xl, images, tmp_path, max_train_steps=2)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base_model_xl)
    before = draw(pipeline, "a cat")
    apply_concepts(pipeline, load_concept(tmp_path / "out"))
    assert torch.equal(draw(pipeline, "a cat"), before)
    assert not torch.allclose(draw(pipeline, "a <new1> cat"), before, atol=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [({"modifier_token": None}, "give --modifier_token"), ({"freeze_model": "crossattn"}, "leave out --freeze_model")],
)
def test_what_cannot_be_gated_is_refused(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        train(flags(base_model, images, tmp_path / "out", token_gate=True, **more))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_broken_words_are_refused(cat: Path, tmp_path: Path) -> None:
    save_concept(load_concept(cat), tmp_path)
    path = tmp_path / f"{WEIGHTS_STEM}.safetensors"
    content = safetensors.torch.load_file(path)
    del content["token_gate"]
    safetensors.torch.save_file(content, path)
    with pytest.raises(UserError, match="at which words"):
        load_concept(tmp_path)


def test_class_words_that_never_follow_the_new_word_are_warned_of(
    base_model: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(flags(base_model, images, tmp_path / "a", token_gate=True, class_prompt="toy cat"))
    assert "'toy cat' never follows <new1> in the prompts, so only the new word itself is gated" in caplog.text
    assert "give --class_prompt='cat'" in caplog.text
    caplog.clear()
    prepare(flags(base_model, images, tmp_path / "b", token_gate=True, class_prompt="cat"))
    assert "never follows" not in caplog.text


def test_words_within_words_and_folders_within_folders_are_told_apart(base_model: Path, tmp_path: Path) -> None:
    draw_images(tmp_path / "cats", 2)
    draw_images(tmp_path / "cats" / "pots", 2)
    entries = [
        {"instance_prompt": f"photo of a {token}", "instance_data_dir": str(folder)}
        for token, folder in (("newcat", tmp_path / "cats"), ("newcat2", tmp_path / "cats" / "pots"))
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    options = {"concepts_list": tmp_path / "list.json", "modifier_token": "newcat+newcat2", "instance_prompt": None}
    run = prepare(flags(base_model, tmp_path, tmp_path / "out", token_gate=True, instance_data_dir=None, **options))
    assert [one.tokens for one in run.module.gate.concepts] == [("newcat",), ("newcat2",)]


@pytest.mark.parametrize("more", [{"token_gate": True}, {"rank": 2}])
def test_another_base_model_of_the_same_name_is_not_resumed_on(
    more: dict[str, Any], base_model: Path, images: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base_model, model)
    train(flags(model, images, tmp_path / "out", max_train_steps=1, checkpointing_steps=1, **more))
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    for parameter in unet.parameters():
        parameter.data.mul_(1.5)
    unet.save_pretrained(model / "unet")
    rest = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match="another base model of the same name, whose weights are different"):
        train(flags(model, images, tmp_path / "out", **rest, **more))


def test_a_concept_that_cannot_be_applied_leaves_nothing_behind(
    cat: Path, pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    hooks = [dict(module._forward_hooks) for module in pipeline.text_encoder.modules()]
    buffers = [name for name, _ in pipeline.unet.named_buffers()]
    monkeypatch.setattr("custom_diffusion.concept.applying.GatedUNet", fail)
    with pytest.raises(MemoryError):
        apply_concepts(pipeline, load_concept(cat))
    assert [name for name, _ in pipeline.unet.named_buffers()] == buffers
    assert [dict(module._forward_hooks) for module in pipeline.text_encoder.modules()] == hooks


def test_a_gated_concept_beside_one_that_acts_everywhere(
    trained: Path, plant: Path, pipeline: StableDiffusionPipeline
) -> None:
    plain = load_concept(trained)
    applied = apply_concepts(pipeline, plain)
    alone = draw(pipeline, "a <new1> cat")
    applied.remove()
    apply_concepts(pipeline, plain, load_concept(plant))
    assert torch.equal(draw(pipeline, "a <new1> cat"), alone)
    assert not torch.allclose(draw(pipeline, "a <new2> plant"), draw(pipeline, "a plant"), atol=1e-3)


def test_each_concept_has_its_scale(cat: Path, plant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_dir", str(cat), str(plant), "--prompt", "a <new1> cat", "--num_inference_steps=2"]
    for name, scales in (("both", ["1", "1"]), ("cat", ["1", "0"]), ("plant", ["0", "1"])):
        infer.main([*argv, "--scale", *scales, f"--output_dir={tmp_path / name}"])
    both, own, other = (Image.open(next((tmp_path / n).glob("0*.png"))).tobytes() for n in ("both", "cat", "plant"))
    assert both == own != other
    with pytest.raises(SystemExit):
        infer.parse_args([*argv, "--scale", "1", "1", "1"])
    assert "--scale has 3 values, --model_dir 2" in capsys.readouterr().err
