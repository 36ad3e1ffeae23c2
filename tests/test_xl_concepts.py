"""Concepts of Stable Diffusion XL: their files, in pipelines, merged, and for other programs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export
import infer
import merge
from custom_diffusion.concept import files
from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.files import Concept, load_concept, save_concept
from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.families import StableDiffusionXL
from tests.conftest import flags, run_script, train
from tests.test_concept import make_image

WEIGHTS = "pytorch_custom_diffusion_weights.safetensors"


@pytest.fixture(scope="module")
def cat(base_model_xl: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cat")
    train(flags(base_model_xl, images, folder, learning_rate=1e-2, max_train_steps=4))
    return folder


@pytest.fixture(scope="module")
def face(base_model_xl: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries and outputs too."""
    folder = tmp_path_factory.mktemp("face")
    train(flags(base_model_xl, images, folder, freeze_model="crossattn", learning_rate=1e-2))
    return folder


def load(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def load_words(pipeline: StableDiffusionXLPipeline, path: Path, token: str = "<new1>") -> None:
    """As diffusers does it for XL."""
    word = load_file(path)
    pipeline.load_textual_inversion(
        word["clip_l"], token=token, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
    )
    pipeline.load_textual_inversion(
        word["clip_g"], token=token, text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
    )
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id  # as the card says


def ours(base: Path, folder: Path) -> np.ndarray:
    pipeline = load(base)
    apply_concepts(pipeline, load_concept(folder))
    return make_image(pipeline)


def state(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    models = ("unet", "text_encoder", "text_encoder_2")
    return {
        f"{name}.{key}": value.clone() for name in models for key, value in getattr(pipeline, name).state_dict().items()
    }


def run(*argv: object) -> None:
    export.main([str(word) for word in argv])


# --- files ----------------------------------------------------------------------------------------


def test_a_words_file_has_both_vectors_as_rows(cat: Path) -> None:
    word = load_file(cat / "<new1>.safetensors")
    assert {key: tuple(rows.shape) for key, rows in word.items()} == {"clip_l": (1, 32), "clip_g": (1, 48)}
    pickled = torch.load(cat / "<new1>.bin", weights_only=True)
    assert all(torch.equal(pickled[key], word[key]) for key in word)
    assert (cat / "<new1>.bin").stat().st_size < 10_000
    own = load_concept(cat).tokens["<new1>"]
    assert torch.equal(own["text_encoder"], word["clip_l"][0])
    assert torch.equal(own["text_encoder_2"], word["clip_g"][0])


@pytest.mark.parametrize("missing", ["clip_l", "clip_g"])
def test_a_word_that_lacks_a_vector_gets_one_line(missing: str, cat: Path, tmp_path: Path) -> None:
    word = load_file(cat / "<new1>.safetensors")
    del word[missing]
    save_file(word, tmp_path / "<new1>.safetensors")
    with pytest.raises(UserError, match=rf"<new1>.safetensors lacks {missing}: a word of Stable Diffusion XL has"):
        load_concept(tmp_path)


def test_vectors_without_a_dimension_for_rows_are_read(cat: Path, tmp_path: Path) -> None:
    word = {key: rows[0].clone() for key, rows in load_file(cat / "<new1>.safetensors").items()}
    save_file(word, tmp_path / "<new1>.safetensors")
    assert torch.equal(load_concept(tmp_path).tokens["<new1>"]["text_encoder_2"], word["clip_g"])


def test_the_largest_concept_may_be_downloaded() -> None:
    all_projections = 545_700_000 * 4  # queries, keys, values and outputs in fp32
    assert all_projections < files.MOST_DOWNLOADED_BYTES < 2 * all_projections


def test_tensors_that_share_memory_are_written_apart(cat: Path, tmp_path: Path) -> None:
    concept = load_concept(cat)
    key, weight = next(iter(concept.attention.items()))
    shared = {key: weight, key.replace("to_k", "to_q"): weight, key.replace("to_k", "to_v"): weight[:, :8]}
    save_concept(Concept(shared, concept.tokens), tmp_path)
    read = load_concept(tmp_path).attention
    assert all(torch.equal(value, shared[name]) for name, value in read.items())
    assert read.keys() == shared.keys()


WRITES = """
import resource, sys, torch
from custom_diffusion.concept.files import Concept, save_concept
key = "down_blocks.1.attentions.{}.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
concept = Concept({key.format(n): torch.ones(1250, 2000) for n in range(40)}, {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_concept(concept, sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.long
def test_writing_takes_no_second_copy(tmp_path: Path) -> None:
    result = run_script(sys.executable, "-c", WRITES, tmp_path)
    assert result.returncode == 0, result.stderr
    # 400 MB of weights, of which one matrix at a time may be looked at.
    assert int(result.stdout) < 80_000, "kilobytes"


# --- in pipelines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("concept", ["cat", "face"])
def test_the_image_is_that_of_diffusers_alone(
    concept: str, base_model_xl: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(concept)
    argv = ["--prompt", "photo of a <new1> cat", "--model_dir", folder, "--output_dir", tmp_path, "--seed=0"]
    infer.main([*map(str, argv), "--num_inference_steps=4"])
    pipeline = load(base_model_xl)
    plain = make_image(pipeline)
    # `load_attn_procs` silently loads nothing without `_pipeline`.
    pipeline.unet.load_attn_procs(folder, weight_name=WEIGHTS, _pipeline=pipeline)
    load_words(pipeline, folder / "<new1>.safetensors")
    expected = make_image(pipeline)
    drawn = np.asarray(Image.open(next(tmp_path.glob("0*.png"))), dtype=int)
    assert np.abs(drawn - expected).max() <= 1
    assert np.abs(plain - expected).mean() > 1, "there is something to see"


def test_a_concept_comes_out_exactly(cat: Path, base_model_xl: Path) -> None:
    pipeline = load(base_model_xl)
    before, image, words = state(pipeline), make_image(pipeline), len(pipeline.tokenizer_2)
    applied = apply_concepts(pipeline, load_concept(cat), scale=0.7)
    assert not np.array_equal(make_image(pipeline), image)
    applied.remove()
    assert all(torch.equal(value, before[name]) for name, value in state(pipeline).items())
    assert len(pipeline.tokenizer_2) == words
    assert np.array_equal(make_image(pipeline), image)


@pytest.mark.long
def test_image_to_image(cat: Path, base_model_xl: Path) -> None:
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pipe(load(base_model_xl))
    apply_concepts(pipeline, load_concept(cat))
    generator = torch.Generator().manual_seed(0)
    start = Image.new("RGB", (64, 64), "red")
    drawn = pipeline("<new1> cat", image=start, strength=0.5, num_inference_steps=4, generator=generator).images[0]
    assert drawn.size == (64, 64)


def test_the_cards_python_makes_the_image(cat: Path, base_model_xl: Path) -> None:
    card = (cat / "README.md").read_text()
    assert "stable-diffusion-xl" in card
    code = card.split("```python\n")[1].split("```")[0].replace('model = "."', f"model = {str(cat)!r}")
    code = code.replace("float16", "float32").replace('.to("cuda")', "").split("image = ")[0]
    seen: dict[str, Any] = {}
    exec(code, seen)
    pipeline = seen["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = load(base_model_xl).scheduler
    assert np.abs(make_image(pipeline) - ours(base_model_xl, cat)).max() <= 1


def test_the_vae_of_training_is_loaded_again(cat: Path, base_model_xl: Path, tmp_path: Path) -> None:
    model = BaseModel(str(base_model_xl), other_vae=str(base_model_xl / "vae"))
    save_concept(load_concept(cat).trained_on(model), tmp_path / "cat")
    from custom_diffusion.concept.cards import model_card

    concept = load_concept(cat).trained_on(model)
    (tmp_path / "cat" / "README.md").write_text(model_card(concept, ["<new1> cat"], {}))
    read = load_concept(tmp_path / "cat")
    assert read.base_vae == str(base_model_xl / "vae")
    assert files.find_base_model(None, None, None, [read]) == model
    assert read.without_local_paths().base_vae is None


# --- what does not fit ----------------------------------------------------------------------------


def test_a_concept_of_another_family_gets_one_line(
    cat: Path, trained: Path, base_model: Path, base_model_xl: Path, tmp_path: Path
) -> None:
    for folder, model in ((cat, base_model), (trained, base_model_xl)):
        argv = ["--prompt=<new1>", "--model_dir", str(folder), "--pretrained_model_name_or_path", str(model)]
        with pytest.raises(UserError) as caught:
            infer.main([*argv, "--output_dir", str(tmp_path)])
        assert re.search(r"was trained on .*: give the base model that it was trained on$", str(caught.value))
        assert "\n" not in str(caught.value)


def test_a_word_alone_of_another_family_gets_one_line(cat: Path, base_model: Path) -> None:
    word = Concept({}, load_concept(cat).tokens, base_model="some/xl")
    pipeline = BaseModel(str(base_model)).pipeline(torch.float32)
    with pytest.raises(
        UserError, match=r"has '<new1>' for text_encoder, text_encoder_2; .* is of Stable Diffusion 1.x"
    ):
        apply_concepts(pipeline, word)


def test_concepts_of_two_families_are_not_merged(cat: Path, trained: Path, tmp_path: Path) -> None:
    argv = ["--model_dir", str(cat), str(trained), "--class_words", "cat", "dog"]
    with pytest.raises(UserError, match="have different layers: other base models"):
        merge.main([*argv, "--output_dir", str(tmp_path / "merged")])


# --- merging --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dog(base_model_xl: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dog")
    more = {"instance_prompt": "photo of a <new1> dog", "learning_rate": 1e-2, "seed": 7}
    train(flags(base_model_xl, images, folder, **more))
    return folder


def test_merged_words_keep_their_keys_and_values(cat: Path, dog: Path, base_model_xl: Path, tmp_path: Path) -> None:
    merge.main(["--model_dir", str(cat), str(dog), "--output_dir", str(tmp_path / "merged")])
    merged, first = load_concept(tmp_path / "merged"), load_concept(cat)
    assert list(merged.tokens) == ["<new1>", "<new2>"]
    key = next(iter(merged.attention))
    # The features of the words as a pipeline makes them, at the new word and the class behind it.
    pipeline = load(base_model_xl)
    applied = apply_concepts(pipeline, first)
    features = pipeline.encode_prompt("<new1> cat", device="cpu", do_classifier_free_guidance=False)[0][0, 1:3]
    applied.remove()
    expected, reached = features @ first.attention[key].T, features @ merged.attention[key].T
    assert torch.allclose(reached, expected, atol=1e-4)
    assert np.isfinite(ours(base_model_xl, tmp_path / "merged")).all()


def test_too_few_captions_are_told_how_many(cat: Path, dog: Path, tmp_path: Path) -> None:
    argv = ["--model_dir", str(cat), str(dog), "--num_captions=4", "--output_dir", str(tmp_path / "merged")]
    with pytest.raises(UserError) as caught:
        merge.main(argv)
    match = re.search(
        r"the 4 captions have (\d+) words, too few for .* of width 80: give some (\d+) ", str(caught.value)
    )
    assert match is not None
    assert int(match[2]) == -(-80 * 4 // int(match[1]))
    assert not (tmp_path / "merged").exists()


# --- for other programs ---------------------------------------------------------------------------


NAMES = """
    down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k input_blocks_4_1_transformer_blocks_0_attn2_to_k
    down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_v input_blocks_8_1_transformer_blocks_9_attn2_to_v
    mid_block.attentions.0.transformer_blocks.3.attn2.to_q middle_block_1_transformer_blocks_3_attn2_to_q
    up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0 output_blocks_2_1_transformer_blocks_0_attn2_to_out_0
    up_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k output_blocks_4_1_transformer_blocks_1_attn2_to_k
"""


@pytest.mark.parametrize("line", NAMES.strip().splitlines())
def test_layers_have_kohyas_names(line: str) -> None:
    """Those that kohya-ss' scripts give to Stability's own modules of the real model."""
    name, expected = line.split()
    assert StableDiffusionXL().kohya_name(name, {"layers_per_block": 2}) == expected


def test_diffusers_loads_the_lora(cat: Path, base_model_xl: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format=lora", "--energy=1", "--dtype=fp32", "--output_dir", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "lora.safetensors")
    # Two blocks of two layers each side; the lower one has two transformer blocks in each attention.
    layers = ["input_blocks_4_1", "input_blocks_5_1", "middle_block_1", *(f"output_blocks_{n}_1" for n in range(3))]
    expected = {
        f"lora_unet_{layer}_transformer_blocks_{block}_attn2_{one}"
        for layer in layers
        for block in (0, 1)
        for one in ("to_k", "to_v")
    }
    assert {key.split(".")[0] for key in tensors} == expected
    card = (tmp_path / "lora" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(tmp_path / 'lora')!r}")
    seen: dict[str, Any] = {}
    exec(code.split("image = ")[0], seen)
    pipeline = seen["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = load(base_model_xl).scheduler
    difference = np.abs(make_image(pipeline) - ours(base_model_xl, cat))
    assert difference.max() <= 2
    with safe_open(tmp_path / "lora" / "lora.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"


def test_a_bundle_has_the_words_in_the_loras_file(cat: Path, trained: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format=lora", "--bundle", "--output_dir", tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").glob("*.safetensors")] == ["lora.safetensors"]
    tensors = load_file(tmp_path / "lora" / "lora.safetensors")
    word = load_concept(cat).tokens["<new1>"]
    assert torch.equal(tensors["bundle_emb.new1.clip_l"][0], word["text_encoder"])
    assert torch.equal(tensors["bundle_emb.new1.clip_g"][0], word["text_encoder_2"])
    assert "`photo of a new1 cat <lora:lora:1>`" in (tmp_path / "lora" / "README.md").read_text()
    # Of a single text encoder, AUTOMATIC1111 takes the only tensor there is.
    run("--model_dir", trained, "--format=lora", "--bundle", "--output_dir", tmp_path / "one")
    bundled = {key for key in load_file(tmp_path / "one" / "one.safetensors") if key.startswith("bundle_emb")}
    assert bundled == {"bundle_emb.new1.emb_params"}


def test_a_pipeline_needs_nothing_else(cat: Path, base_model_xl: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format=pipeline", "--output_dir", tmp_path / "whole")
    assert np.array_equal(make_image(load(tmp_path / "whole")), ours(base_model_xl, cat))


def test_the_authors_layout_both_ways(cat: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format=delta", "--output_dir", tmp_path / "delta")
    content = torch.load(tmp_path / "delta" / "delta.bin", weights_only=True)
    assert [tuple(vector.shape) for vector in content["modifier_token"]["<new1>"]] == [(32,), (48,)]
    assert all(re.fullmatch(r".+\.attn2\.to_[kv]\.weight", name) for name in content["unet"])
    back, concept = load_concept(tmp_path / "delta"), load_concept(cat)
    assert back.tensors().keys() == concept.tensors().keys()
    assert all(torch.equal(value, concept.tensors()[name]) for name, value in back.tensors().items())


@pytest.mark.long
def test_the_authors_compressed_layout_both_ways(cat: Path, base_model_xl: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format=delta", "--energy=1", "--output_dir", tmp_path / "small")
    content = torch.load(tmp_path / "small" / "compressed_delta.bin", weights_only=True)
    assert all(set(factors) == {"u", "v"} for factors in content["unet"].values())
    argv = ["--model_dir", tmp_path / "small", "--pretrained_model_name_or_path", base_model_xl]
    run(*argv, "--format=pipeline", "--output_dir", tmp_path / "whole")
    assert np.abs(make_image(load(tmp_path / "whole")) - ours(base_model_xl, cat)).max() <= 2
