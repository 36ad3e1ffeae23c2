"""export.py: other programs' files make the images that our own make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import export
import infer
from custom_diffusion.concept import formats
from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.compression import Decomposition, decompose
from custom_diffusion.concept.exporting import embedding_names, lora_name, rename_tokens
from custom_diffusion.concept.files import Concept, load_concept, save_concept
from custom_diffusion.concept.projections import original_projections
from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel
from tests.conftest import flags, train
from tests.test_concept import load, make_image


@pytest.fixture(scope="module")
def cat(base_model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cat")
    train(flags(base_model, images, folder, learning_rate=1e-2, max_train_steps=4))
    return folder


@pytest.fixture(scope="module")
def face(base_model_v: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries and outputs too, on the other model."""
    folder = tmp_path_factory.mktemp("face")
    train(flags(base_model_v, images, folder, freeze_model="crossattn", learning_rate=1e-2))
    return folder


def ours(base: Path, concept: Concept) -> np.ndarray:
    pipeline = load(base)
    apply_concepts(pipeline, concept)
    return make_image(pipeline)


def with_lora(base: Path, folder: Path) -> StableDiffusionPipeline:
    pipeline = load(base)
    pipeline.load_lora_weights(folder, weight_name=f"{folder.name}.safetensors")
    pipeline.load_textual_inversion(folder, weight_name="new1.safetensors", token="<new1>")
    return pipeline


def run(*argv: object) -> None:
    export.main([str(word) for word in argv])


# --- LoRA ----------------------------------------------------------------------------------------


def test_at_full_rank_diffusers_makes_our_image(cat: Path, base_model: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format", "lora", "--energy", "1", "--dtype", "fp32", "--output_dir", tmp_path / "full")
    expected = ours(base_model, load_concept(cat))
    difference = np.abs(make_image(with_lora(base_model, tmp_path / "full")) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.1
    words_only = load(base_model)
    words_only.load_textual_inversion(tmp_path / "full", weight_name="new1.safetensors", token="<new1>")
    assert np.abs(make_image(words_only) - expected).mean() > 1, "the attention makes a difference"


@pytest.mark.parametrize(("concept", "base"), [("cat", "base_model"), ("face", "base_model_v")])
def test_names_and_values_are_those_of_kohya(
    concept: str, base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, model = request.getfixturevalue(concept), request.getfixturevalue(base)
    run("--model_dir", folder, "--format=lora", "--energy=1", "--dtype=fp32", "--output_dir", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "lora.safetensors")
    # kohya-ss' loader: "lora_unet_" and the module's name in the UNet, dots as underscores; scale is alpha / rank.
    modules = {f"lora_unet_{name}".replace(".", "_"): module for name, module in load(model).unet.named_modules()}
    learned = load(model)
    apply_concepts(learned, load_concept(folder))
    after = {f"lora_unet_{name}".replace(".", "_"): module for name, module in learned.unet.named_modules()}
    names = {key.split(".")[0] for key in tensors}
    assert len(tensors) == 3 * len(names)
    assert len(names) == len([name for name in modules if name.endswith(("attn2_to_k", "attn2_to_v"))]) * (
        2 if concept == "face" else 1
    )
    for name in names:
        down, up, alpha = (tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        change = up @ down * (alpha / len(down))
        assert torch.allclose(change, after[name].weight - modules[name].weight, atol=1e-6)


def test_less_energy_is_smaller_and_errs_as_it_says(
    cat: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    originals = original_projections(BaseModel(str(base_model)), load_concept(cat).attention)
    sizes, errors = [], []
    for energy in (0.3, 0.6, 0.9):
        folder = tmp_path / f"e{energy}"
        run("--model_dir", cat, "--format", "lora", "--energy", energy, "--dtype", "fp32", "--output_dir", folder)
        said = capsys.readouterr().out.split("relative error of the change ")[1].split("%")[0]
        pipeline = load(base_model)
        pipeline.load_lora_weights(folder, weight_name=f"{folder.name}.safetensors")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        from_lora = dict(pipeline.unet.named_parameters())
        lost = whole = 0.0
        for key, weight in load_concept(cat).attention.items():
            name = formats.parameter_name(key)
            lost += (from_lora[name] - weight).square().sum().item()
            whole += (weight - originals[key]).square().sum().item()
        errors.append((lost / whole) ** 0.5)
        assert 100 * errors[-1] == pytest.approx(float(said), abs=0.06)
        sizes.append((folder / f"{folder.name}.safetensors").stat().st_size)
    assert sizes == sorted(sizes)
    assert 1 > errors[0] > errors[1] > errors[2] > 0

    run("--model_dir", cat, "--table")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [row[0] for row in rows] == ["| 5%", "| 10%", "| 20%", "| 40%", "| 60%", "| 80%", "| 90%", "| 100%"]
    assert float(rows[4][-1].rstrip(" |%")) == pytest.approx(100 * errors[1], abs=0.06)
    assert rows[-1][-1] == "0.0% |"


def test_default_is_the_papers_energy_and_a_rank_can_be_given(cat: Path, base_model: Path, tmp_path: Path) -> None:
    concept = load_concept(cat)
    decompositions = decompose(concept, original_projections(BaseModel(str(base_model)), concept.attention))
    run("--model_dir", cat, "--format", "lora", "--output_dir", tmp_path / "default")
    tensors = load_file(tmp_path / "default" / "default.safetensors")
    for key, value in tensors.items():
        if key.endswith("lora_down.weight"):
            assert value.dtype == torch.float16
            match = next(
                d for k, d in decompositions.items()
                if formats.parameter_name(k).removesuffix(".weight").replace(".", "_") in key
            )  # fmt: skip
            share = match.s[: len(value)].sum() / match.s.sum()
            assert share >= 0.6 > match.s[: len(value) - 1].sum() / match.s.sum()
    run("--model_dir", cat, "--format", "lora", "--rank", "3", "--output_dir", tmp_path / "three")
    tensors = load_file(tmp_path / "three" / "three.safetensors")
    assert {len(value) for key, value in tensors.items() if "lora_down" in key} == {3}
    with safetensors.safe_open(tmp_path / "three" / "three.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "3"
    assert np.abs(make_image(with_lora(base_model, tmp_path / "three")) - ours(base_model, concept)).mean() > 0


def test_the_word_is_in_the_form_that_all_programs_read(cat: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format", "lora", "--output_dir", tmp_path / "lora")
    path = tmp_path / "lora" / "new1.safetensors"
    content = load_file(path)
    # One tensor only (AUTOMATIC1111 refuses more), of two dimensions (ComfyUI and kohya-ss take it as it is).
    assert list(content) == ["emb_params"]
    assert torch.equal(content["emb_params"], load_concept(cat).tokens["<new1>"]["text_encoder"].unsqueeze(0))
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert "lora" in card.data.tags
    # ComfyUI, AUTOMATIC1111 and InvokeAI, in this order.
    for prompt in ("photo of a embedding:new1 cat", "photo of a new1 cat <lora:lora:1>", "photo of a <new1> cat"):
        assert f"`{prompt}`" in card.text
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["token"] == "<new1>", "the token itself is inside"


@pytest.fixture(scope="module")
def clip(base_model: Path) -> CLIPTokenizer:
    """CLIP's own tokenizer, as programs have it."""
    return CLIPTokenizer.from_pretrained(base_model / "tokenizer")


@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        (["<new1>"], ["new1"]),
        (["<new1>", "<new2>"], ["new1", "new2"]),
        (["sks-dog!"], ["my-sks-dog"]),
        (["<cat>", "<CAT-toy>"], ["my-cat", "my-CAT-toy"]),
        (["<new1>", "new1*", "[NEW1]"], ["new1", "new1-2", "NEW1-3"]),
        (["<>", "***"], ["word1", "word2"]),
        (["<my_cat_>", "<--a1--b2-->"], ["my-cat", "a1-b2"]),
        (["<猫1>", "<Ünlü7>"], ["猫1", "Ünlü7"]),
    ],
)
def test_names_of_embeddings(tokens: list[str], names: list[str], clip: CLIPTokenizer) -> None:
    given = embedding_names(tokens, [clip])
    assert list(given) == tokens
    assert list(given.values()) == names
    assert not any(f"{name.lower()}</w>" in clip.get_vocab() for name in names), "no word of the language"


@pytest.mark.parametrize(
    "token", ["<new1>", "<cat>", "sks-dog!", "<my_cat_>", "<>", "<zz-top>", "<new10>", "a.b", "<猫>"]
)
def test_names_stay_what_they_are_beside_punctuation(token: str, clip: CLIPTokenizer) -> None:
    # AUTOMATIC1111 and others look for the name's tokens among the prompt's.
    name = embedding_names([token], [clip])[token]

    def ids(text: str) -> list[int]:
        return clip(text, add_special_tokens=False).input_ids

    for mark in (",", ".", "'", "!", "-", ":", ")", "'s", ">", ";", "?"):
        assert ids(f"{name}{mark}") == ids(name) + ids(mark), mark
        assert ids(f"a ({name}{mark} b") == [*ids("a ("), *ids(name), *ids(mark), *ids("b")], mark
    if token == "<new1>":
        assert ids(f"{token},") != ids(token) + ids(","), "with brackets it is not so"


def test_the_loras_name_never_is_a_words(tmp_path: Path) -> None:
    assert lora_name(tmp_path / "new1", ["new1"]) == "new1-lora.safetensors"
    assert lora_name(tmp_path / "NEW1", ["new1"]) == "NEW1-lora.safetensors", "some file systems ignore case"
    assert lora_name(tmp_path / "cat", ["new1"]) == "cat.safetensors"


@pytest.mark.parametrize("form", ["lora", "pipeline", "delta"])
def test_a_token_is_renamed_in_every_format(form: str, cat: Path, base_model: Path, tmp_path: Path) -> None:
    whole = ["--energy=1"] if form == "lora" else []
    run("--model_dir", cat, "--format", form, *whole, "--token_name", "<my-pet>", "--output_dir", tmp_path / "out")
    expected = ours(base_model, load_concept(cat))
    if form == "lora":
        pipeline = load(base_model)
        pipeline.load_lora_weights(tmp_path / "out", weight_name="out.safetensors")
        pipeline.load_textual_inversion(tmp_path / "out", weight_name="my-pet.safetensors", token="<my-pet>")
        card = ModelCard.load(tmp_path / "out" / "README.md")
        assert card.data.instance_prompt == "photo of a <my-pet> cat"
        assert "<new1>" not in card.text
    elif form == "pipeline":
        pipeline = load(tmp_path / "out")
    else:
        pipeline = load(base_model)
        apply_concepts(pipeline, load_concept(tmp_path / "out"))
    assert np.abs(make_image(pipeline, "photo of a <my-pet> cat") - expected).max() <= 2


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["<a>", "<b>"], r"--token_name has 2 names for 1 tokens \(<new1>\)"),
        (["a/b"], "would be a path"),
        (["Cat"], r"'Cat' \(--token_name\) is in the tokenizer's vocabulary already, as 'cat'"),
    ],
)
def test_a_name_that_cannot_be_used(names: list[str], words: str, cat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        run("--model_dir", cat, "--format=lora", "--token_name", *names, "--output_dir", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_two_tokens_get_two_names(base_model: Path) -> None:
    vector = {"text_encoder": torch.ones(32)}
    both = Concept({}, {"<new1>": vector, "<new2>": vector}, instance_prompt="a <new1> cat, a <new2> pot")
    swapped = rename_tokens(both, ["<new2>", "<new1>"], BaseModel(str(base_model)))
    assert list(swapped.tokens) == ["<new2>", "<new1>"]
    assert swapped.instance_prompt == "a <new2> cat, a <new1> pot"
    with pytest.raises(UserError, match="a name twice"):
        rename_tokens(both, ["<a>", "<A>"], None)


def test_the_cards_python_makes_the_image(cat: Path, base_model: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format=lora", "--energy=1", "--dtype=fp32", "--output_dir", tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "`pip install peft`" in card
    code = card.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(tmp_path / 'lora')!r}")
    seen: dict[str, Any] = {}
    exec(code.split("image = ")[0], seen)
    pipeline = seen["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = load(base_model).scheduler
    assert np.abs(make_image(pipeline) - ours(base_model, load_concept(cat))).max() <= 2


def test_what_a_lora_cannot_hold_is_said(face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--model_dir", face, "--format", "lora", "--output_dir", tmp_path / "lora")
    warning = capsys.readouterr().err
    assert "trained biases of 4 output projections are left out" in warning
    assert "--format pipeline or delta" in warning


# --- pipeline ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("concept", "base"), [("cat", "base_model"), ("face", "base_model_v")])
def test_the_pipeline_folder_needs_nothing_else(
    concept: str, base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, model = request.getfixturevalue(concept), request.getfixturevalue(base)
    run("--model_dir", folder, "--format", "pipeline", "--output_dir", tmp_path / "whole")
    assert np.array_equal(make_image(load(tmp_path / "whole")), ours(model, load_concept(folder)))
    assert not list(tmp_path.glob(".*")), "no temporary folder stays"


# --- delta ---------------------------------------------------------------------------------------


def authors_load(pipeline: StableDiffusionPipeline, path: Path, compress: bool = False) -> None:
    """What the authors' pipeline does with a delta.bin: tokens behind the vocabulary, then every attn2 parameter."""
    content = torch.load(path)
    for token, vector in content["modifier_token"].items():
        assert pipeline.tokenizer.add_tokens(token) == 1
        pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
        table = pipeline.text_encoder.get_input_embeddings().weight.data
        table[pipeline.tokenizer.convert_tokens_to_ids(token)] = vector
    found = 0
    for name, parameter in pipeline.unet.named_parameters():
        if "attn2" in name and compress and ("to_k" in name or "to_v" in name):
            parameter.data += content["unet"][name]["u"] @ content["unet"][name]["v"]
            found += 1
        elif "attn2" in name and name in content["unet"]:
            parameter.data.copy_(content["unet"][name])
            found += 1
    assert found == len(content["unet"])


@pytest.mark.parametrize(("concept", "base"), [("cat", "base_model"), ("face", "base_model_v")])
def test_the_authors_code_makes_our_image(
    concept: str, base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, model = request.getfixturevalue(concept), request.getfixturevalue(base)
    run("--model_dir", folder, "--format", "delta", "--output_dir", tmp_path / "delta")
    pipeline = load(model)
    authors_load(pipeline, tmp_path / "delta" / "delta.bin")
    assert np.array_equal(make_image(pipeline), ours(model, load_concept(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_delta_to_ours_to_delta_is_bit_equal(dtype: torch.dtype, cat: Path, tmp_path: Path) -> None:
    concept = load_concept(cat)
    # As the authors' code saves it: parameters of the UNet, tokens as views into the whole embedding table.
    table = torch.randn(5, 32, dtype=dtype)
    unet = {formats.parameter_name(key): value.to(dtype) for key, value in concept.attention.items()}
    theirs = {"unet": unet, "modifier_token": {"<new1>": table[3], "<new2>": table[4]}}
    torch.save(theirs, tmp_path / "delta.bin")
    for number, (safetensors_too, bin_too) in enumerate([(True, False), (False, True)]):
        own, back = tmp_path / f"own{number}", tmp_path / f"back{number}"
        save_concept(load_concept(tmp_path), own, safetensors_too, bin_too)
        run("--model_dir", own, "--format", "delta", "--output_dir", back)
        again = torch.load(back / "delta.bin", weights_only=True)
        for part in ("unet", "modifier_token"):
            assert again[part].keys() == theirs[part].keys()
            for name, value in theirs[part].items():
                assert again[part][name].dtype == dtype
                assert torch.equal(again[part][name], value)


def test_infer_reads_a_delta_folder_and_file(cat: Path, base_model: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format", "delta", "--output_dir", tmp_path / "delta")
    common = ["--prompt", "<new1> cat", "--num_inference_steps", "3"]
    own = ["--pretrained_model_name_or_path", str(base_model)]
    infer.main([*common, "--model_dir", str(cat), "--output_dir", str(tmp_path / "a")])
    infer.main([*common, *own, "--model_dir", str(tmp_path / "delta"), "--output_dir", str(tmp_path / "b")])
    file = tmp_path / "delta" / "delta.bin"
    infer.main([*common, *own, "--model_dir", str(file), "--output_dir", str(tmp_path / "c")])
    pixels = [Image.open(next((tmp_path / name).glob("0*.png"))).tobytes() for name in "abc"]
    assert pixels[0] == pixels[1] == pixels[2]


def test_the_compressed_form_both_ways(
    cat: Path, base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base_flags = ["--pretrained_model_name_or_path", base_model]
    capsys.readouterr()
    run("--model_dir", cat, "--format", "delta", "--energy", "1", "--output_dir", tmp_path / "all")
    assert 'call load_model before .to("cuda")' in capsys.readouterr().out, "their loader adds on one device only"
    read = load_concept(tmp_path / "all")
    assert read.differences
    assert not read.attention
    assert np.abs(ours(base_model, read) - ours(base_model, load_concept(cat))).max() <= 1
    pipeline = load(base_model)
    authors_load(pipeline, tmp_path / "all" / "compressed_delta.bin", compress=True)
    assert np.abs(make_image(pipeline) - ours(base_model, load_concept(cat))).max() <= 1
    # A compressed one can be exported to every format.
    run("--model_dir", tmp_path / "all", "--format", "delta", *base_flags, "--output_dir", tmp_path / "back")
    for key, value in load_concept(tmp_path / "back").attention.items():
        assert torch.allclose(value, load_concept(cat).attention[key], atol=1e-6)
    run("--model_dir", tmp_path / "all", "--format", "pipeline", *base_flags, "--output_dir", tmp_path / "whole")
    assert np.abs(make_image(load(tmp_path / "whole")) - ours(base_model, load_concept(cat))).max() <= 1
    save_concept(read, tmp_path / "own")
    for key, difference in load_concept(tmp_path / "own").differences.items():
        assert torch.equal(difference.whole(), read.differences[key].whole())


def test_the_authors_first_format_is_read(tmp_path: Path) -> None:
    names = {
        "input_blocks.1.1": "down_blocks.0.attentions.0",
        "input_blocks.8.1": "down_blocks.2.attentions.1",
        "middle_block.1": "mid_block.attentions.0",
        "output_blocks.3.1": "up_blocks.1.attentions.0",
        "output_blocks.11.1": "up_blocks.3.attentions.2",
    }
    rest = "transformer_blocks.0.attn2"
    state = {f"model.diffusion_model.{name}.{rest}.to_k.weight": torch.randn(4, 3) for name in names}
    torch.save({"state_dict": state | {"embed": torch.randn(2, 3)}}, tmp_path / "delta.ckpt")
    concept = load_concept(tmp_path / "delta.ckpt")
    assert list(concept.tokens) == ["<new1>", "<new2>"]
    for theirs, name in names.items():
        key = f"{name}.{rest}.processor.to_k_custom_diffusion.weight"
        assert torch.equal(concept.attention[key], state[f"model.diffusion_model.{theirs}.{rest}.to_k.weight"])


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"unet": {}, "modifier_token": {"<new1>": [torch.ones(3)] * 3}}, "has 3 vectors for '<new1>'"),
        ({"unet": {}, "modifier_token": {}, "text_encoder": {}}, "a whole text encoder"),
        ({"unet": {"conv_in.weight": torch.ones(2)}}, "'conv_in.weight' is no cross-attention projection"),
        ({"unet": {}, "modifier_token": {"../x": torch.ones(3)}}, "would be a path"),
        ({"unet": {"a.attn2.to_k.weight": {"u": torch.ones(3, 2), "v": torch.ones(1, 3)}}}, "do not fit each other"),
        ({"x": torch.ones(2)}, "holds no 'unet' table"),
        ({"unet": {"a.attn2.to_k.weight": torch.full((2, 2), float("nan"))}}, "not finite"),
        ({"unet": {}, "modifier_token": {"<new1>": Decomposition}}, "could run code when read"),
    ],
)  # fmt: skip
def test_a_bad_delta_gets_one_line(content: dict, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "delta.bin")
    with pytest.raises(UserError) as caught:
        load_concept(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give --format lora, pipeline or delta"),
        (["--format", "lora", "--table"], "or else --table"),
        (["--format", "lora", "--energy", "1.5"], "--energy 1.5"),
        (["--format", "lora", "--energy", "0.5", "--rank", "2"], "not both"),
        (["--format", "pipeline", "--rank", "2"], "whole weights"),
    ],
)
def test_a_wrong_argument(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        export.main(argv)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_base_model_is_refused(cat: Path, base_model_v: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the base model that it was trained on"):
        run("--model_dir", cat, "--table", "--pretrained_model_name_or_path", base_model_v)


def test_a_pipeline_is_exported_into_the_folder_that_one_is_in(
    cat: Path, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    run("--model_dir", cat, "--format", "pipeline", "--output_dir", ".")
    expected = ours(base_model, load_concept(cat))
    assert np.abs(make_image(load(tmp_path / "new")) - expected).max() <= 2
    assert not [path.name for path in (tmp_path / "new").iterdir() if path.name.startswith(".")]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_pipeline_in_half_precision(cat: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format", "pipeline", "--dtype", "fp16", "--output_dir", tmp_path / "half")
    (weights,) = (tmp_path / "half" / "unet").glob("*.safetensors")
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
