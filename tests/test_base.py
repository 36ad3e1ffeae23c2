"""The base model that ships with the project: its layout, its size, and that the concepts are new to it."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from benchmarks.learning import load_designs
from tests.conftest import ROOT
from tools.base import train_decoder, train_unet, world
from tools.base.progress import MatrixOptimizer, Training, learning_rate
from tools.base.score import generated
from tools.base.tokenizer import clip_merges, merges_for, write_tokenizer
from tools.base.train_text_encoder import TokenizedCaption
from tools.base.train_vae import as_tensor

BASE = ROOT / "base"


def one_design_each(value: int) -> dict[str, np.ndarray]:
    """A drawing of every noun: squares whose channels, RGBA, are all `value`."""
    return {f"fxemoji/{names[0]}": np.full((80, 80, 4), value, np.uint8) for names in world.NOUNS.values()}


def test_it_is_small() -> None:
    sizes = [path.stat().st_size for path in BASE.rglob("*") if path.is_file()]
    assert sum(sizes) <= 40_000_000
    assert max(sizes) <= 30_000_000
    assert not list(BASE.rglob("*.py")), "what made it is in tools/base"


def test_it_loads_as_stable_diffusion_does_and_draws_what_it_is_asked_for() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    assert pipeline.unet.dtype == torch.float32
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        ["photo of a cat on a red background", "photo of a cat on a blue background"],
        num_inference_steps=25,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="np",
    ).images
    assert images.shape == (2, 64, 64, 3)
    (red, _, not_blue), (not_red, _, blue) = images[:, :6, :6].mean(axis=(1, 2))
    assert red > 0.6 > not_red and blue > 0.6 > not_blue


def test_landscapes_are_drawn_as_wide_as_asked_for() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    assert generated(pipeline, ["photo of a cat"], seed=1, steps=1, width=128).shape == (1, 64, 128, 3)


def test_its_weights_are_half_precision() -> None:
    from safetensors import safe_open

    for part in ("unet", "vae", "text_encoder"):
        (file,) = (BASE / part).glob("*.safetensors")
        with safe_open(file, "pt") as weights:
            types = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert types <= {"F16", "I64"}


def test_rare_entries_are_in_the_vocabulary_and_no_text_becomes_them() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    vocabulary = json.loads((BASE / "tokenizer" / "vocab.json").read_text())
    for entry in ("ktn", "pll", "ucd"):
        assert tokenizer.convert_tokens_to_ids(entry) == vocabulary[entry]
        assert vocabulary[entry] not in tokenizer(entry).input_ids
    assert len(tokenizer("cat", add_special_tokens=False).input_ids) == 1


def test_a_part_of_the_merges_splits_the_kept_words_as_the_whole_does(tmp_path: Path) -> None:
    words = ["strawberry", "photo", "watermelon", "background"]
    write_tokenizer(tmp_path / "whole", clip_merges())
    write_tokenizer(tmp_path / "part", merges_for(words, clip_merges(), most_frequent=100))
    whole, part = (CLIPTokenizer.from_pretrained(tmp_path / name) for name in ("whole", "part"))
    assert [part.tokenize(word) for word in words] == [whole.tokenize(word) for word in words]


def test_held_out_designs_never_enter_training() -> None:
    icons = load_designs()
    sets = {name.split("/")[0] for name in world.designs(icons, "cat")}
    assert sets == {"fluent-emoji", "fluent-emoji-flat", "fxemoji"}
    assert "noto/potted-plant" not in world.designs(icons, "plant")
    assert "noto/potted-plant" in world.designs(icons, "plant", held_out=True)
    # A held-out drawing as a loud colour: no image of the VAE's pool may show it.
    loud = {
        name: np.full((80, 80, 4), (255, 0, 255, 255) if name in world.HELD_OUT else (0, 0, 0, 255), np.uint8)
        for name in icons
    }
    images = world.any_drawing(loud, 200, seed=0).reshape(200, -1, 3)
    assert not (images == (255, 0, 255)).all(axis=2).mean(axis=1).max() > 0.05


@pytest.mark.parametrize(("wide", "landscape"), [(0.0, False), (1.0, False), (0.6, True)])
def test_captions_say_what_the_images_show(wide: float, landscape: bool) -> None:
    icons = one_design_each(128)
    made = world.examples(icons, 300, wide, seed=0, landscape=landscape)
    for example in made:
        for attribute in example.attributes:
            if attribute[:2] in ("1:", "2:"):
                assert attribute.split(":")[-1] in example.caption
        for number, (start, end) in enumerate(example.phrases, 1):
            assert f"{number}:{example.caption[start:end].split()[-1]}" in example.attributes
        assert example.image.shape == (64, 128 if landscape else 64, 3)
        assert len(example.phrases) == 2 or not landscape
    assert [e.caption for e in made] == [e.caption for e in world.examples(icons, 300, wide, 0, landscape)]


def test_two_things_in_a_landscape_are_as_large_as_one_in_a_square() -> None:
    icons = one_design_each(255)
    for example in world.examples(icons, 50, 1.0, seed=0, landscape=True):
        if "white" in example.caption or "snow" in example.caption or "dye" in str(example.attributes):
            continue
        white = (example.image == 255).all(axis=2)
        for half in np.split(white, 2, axis=1):
            assert 45**2 <= half.sum() <= 64**2


@pytest.mark.parametrize("unknown", [(), (900, None), (None, 901), (900, 901)])
def test_tokenized_captions_take_unknown_words_before_their_nouns(unknown: tuple[int | None, ...]) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    example = world.Example(np.zeros((64, 64, 3), np.uint8), "a red cat next to a cup", (), ((2, 9), (20, 23)), ())
    ids, unchanged, nouns = TokenizedCaption.of(tokenizer, example).ids(len(tokenizer), unknown)
    first, second = (*unknown, None, None)[:2]
    words = ["a", first, "red", "cat", "next", "to", "a", second, "cup"]
    known = [tokenizer(w, add_special_tokens=False).input_ids[0] if isinstance(w, str) else w for w in words]
    known = [word for word in known if word is not None]
    assert ids == [tokenizer.bos_token_id, *known, *[tokenizer.eos_token_id] * (31 - len(known))]
    plain = tokenizer(example.caption, padding="max_length").input_ids
    assert all(plain[there] == here for here, there in zip(ids, unchanged, strict=True) if there >= 0)
    assert tokenizer.convert_ids_to_tokens([ids[position] for position in nouns]) == ["cat</w>", "cup</w>"]
    assert unchanged.count(-1) == 3 * (first is not None) + 2 * (second is not None)


def test_every_design_has_a_word_that_no_caption_says() -> None:
    icons, tokenizer = load_designs(), CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    word_of = train_unet.design_words(tokenizer, icons)
    assert set(word_of) == set(icons) - set(world.HELD_OUT)
    assert len(set(word_of.values())) == len(word_of)
    icons = one_design_each(128)
    word_of, generator, said = train_unet.design_words(tokenizer, icons), np.random.default_rng(0), 0
    for example in world.examples(icons, 100, wide=1.0, seed=0):
        caption, names = TokenizedCaption.of(tokenizer, example), [word_of[design] for design in example.designs]
        ids = train_unet.caption_ids(caption, generator, len(tokenizer), 0, names)
        spoken = [id for id in ids if id in word_of.values()]
        assert set(spoken) <= set(names)
        said += len(spoken)
        for (start, _), name in zip(example.phrases, names, strict=True):
            if name in spoken:
                before = tokenizer(example.caption[:start], add_special_tokens=False).input_ids
                here = [id for id in ids if id not in word_of.values() or id == name]
                assert here.index(name) == 1 + len(before)
    assert said > 20


@pytest.fixture
def finished_parts(tmp_path: Path) -> tuple[Path, Path]:
    """The folders in which training a UNet finds VAE and text encoder, with those of the shipped model."""
    shutil.copytree(BASE / "vae", tmp_path / "vae" / "first")
    shutil.copytree(BASE / "text_encoder", tmp_path / "text" / "trained")
    shutil.copytree(BASE / "tokenizer", tmp_path / "text" / "tokenizer")
    return tmp_path / "vae", tmp_path / "text"


def test_a_finished_unet_can_be_trained_on(finished_parts: tuple[Path, Path], tmp_path: Path) -> None:
    train_unet.train(one_design_each(128), *finished_parts, tmp_path / "unet", steps=2, pool=300, start=BASE / "unet")
    (line,) = (tmp_path / "unet" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] < 0.4


@pytest.fixture
def before_the_decoder(finished_parts: tuple[Path, Path], tmp_path: Path) -> Path:
    """The folder in which the decoder is trained, with the shipped model's parts."""
    shutil.copytree(BASE / "unet", tmp_path / "unet" / "trained")
    shutil.copytree(BASE / "scheduler", tmp_path / "unet" / "scheduler")
    return tmp_path


def test_the_decoder_learns_from_latents_that_the_unet_leaves(before_the_decoder: Path) -> None:
    denoiser = train_decoder.load_denoiser(before_the_decoder, torch.device("cpu"))
    latents, images = train_decoder.pairs(denoiser, one_design_each(128), count=8, seed=1)
    again, _ = train_decoder.pairs(denoiser, one_design_each(128), count=8, seed=1)
    assert torch.equal(latents, again)
    clean = denoiser.vae.encode(as_tensor(images, torch.device("cpu"))).latent_dist.mean
    differ = (latents.float() - clean).square().mean(dim=(1, 2, 3)) / clean.square().mean(dim=(1, 2, 3))
    assert differ.min() > 1e-4, "they are denoised, not only encoded"
    assert differ.max() < 0.5, "they still show what the images do"


def test_training_the_decoder_leaves_the_latents_as_they_are(before_the_decoder: Path) -> None:
    train_decoder.train(one_design_each(128), before_the_decoder, steps=5, pool=8)
    before, after = (
        AutoencoderKL.from_pretrained(before_the_decoder / "vae" / stage).state_dict() for stage in ("first", "trained")
    )
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {"decoder", "post_quant_conv"}


def test_the_concept_list_works_as_it_stands() -> None:
    for concept in json.loads((ROOT / "concept_list.json").read_text()):
        assert len(list((ROOT / concept["instance_data_dir"]).glob("*.png"))) == 5


def test_making_it_again_says_what_is_missing_or_that_the_folder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for more, message in (
        ((), "error: the emoji come from npm's registry"),
        (("--seed=1",), f"error: '{tmp_path}' is of a run with other settings"),
    ):
        monkeypatch.setattr(sys, "argv", ["make", "--short", "--work", str(tmp_path), *more])
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("tools.base.make", run_name="__main__")
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("give another --work, or remove it")
    assert "seed" in str(caught.value)


class TwoLayers(torch.nn.Module):
    """A convolution and what follows it, with a weight of each kind that the optimizer tells apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 6, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, step: int) -> torch.Tensor:
        """A loss of its own at every step."""
        images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        return (self.second(self.first(images)) - images.mean()).square().mean()


def trained_for(folder: Path, steps: int, stop: int) -> TwoLayers:
    """Two layers after `stop` of `steps` steps, which `folder` then holds."""
    torch.manual_seed(0)
    module = TwoLayers()
    optimizer = MatrixOptimizer(module, 0.01, apart=("first.",))
    training = Training(folder, module, optimizer, steps, average=0.9, hold=0.5)
    for step in training:
        training.update(module(step), peak=1e-2, losses={})
        if step + 1 == stop:
            training.save()
            break
    return module


def test_a_training_that_goes_on_ends_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole = trained_for(tmp_path / "whole", 8, stop=8)
    trained_for(tmp_path / "parts", 8, stop=3)
    parts = trained_for(tmp_path / "parts", 8, stop=8)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value)
    assert not torch.equal(whole.second.weight, trained_for(tmp_path / "other", 8, stop=3).second.weight)


def test_before_the_rate_falls_a_training_can_be_made_longer_or_shorter(tmp_path: Path) -> None:
    for step, steps, kept in ((3, 20, True), (3, 6, True), (3, 5, False), (5, 20, False)):
        folder = tmp_path / f"{step}-{steps}"
        trained_for(folder, 8, stop=step)
        module = TwoLayers()
        optimizer = MatrixOptimizer(module, 0.01, apart=("first.",))
        training = Training(folder, module, optimizer, steps, average=0.9, hold=0.5)
        assert training.step == (step if kept else 0)


def test_matrices_move_as_far_in_every_direction() -> None:
    module = TwoLayers()
    optimizer = MatrixOptimizer(module, weight_decay=0.0, apart=("first.",))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = [layer.weight.detach().clone() for layer in (module.first, module.second)]
    module(0).backward()
    optimizer.step()
    layers = zip((module.first, module.second), before, strict=True)
    first, second = (layer.weight.detach() - old for layer, old in layers)
    moved = torch.linalg.svdvals(second.flatten(1))
    assert moved.max() < 2 * moved.min(), "Muon"
    assert torch.allclose(first.abs(), torch.full_like(first, 0.1), rtol=1e-3), "AdamW's first step"


def test_a_pool_comes_back_from_its_file(tmp_path: Path) -> None:
    icons, tokenizer = one_design_each(128), CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    word_of = train_unet.design_words(tokenizer, icons)
    vae = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float32)
    pool = train_unet.Pool.of(world.examples(icons, 5, 0.6, seed=0, landscape=True), tokenizer, word_of, vae)
    pool.save(tmp_path / "pool.safetensors")
    again = train_unet.Pool.load(tmp_path / "pool.safetensors")
    assert again[:2] == pool[:2]
    assert all(torch.equal(one, other) for one, other in zip(again[2:], pool[2:], strict=True))


def test_the_rate_stays_at_its_peak_before_it_falls() -> None:
    rates = [learning_rate(step, 1000, 2.0, warmup=100, hold=0.7) for step in range(1000)]
    assert rates[0] < rates[50] < rates[100] == rates[699] == 2.0
    assert rates[699] > rates[800] > rates[999] > 0
    assert rates[850] == pytest.approx(1.0)
