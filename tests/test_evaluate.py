"""evaluate.py: the field's numbers, to the digit, from folders that people have."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision import transforms
from transformers import AutoModel, CLIPModel, CLIPTokenizer

import evaluate
import infer
from custom_diffusion.concept.files import load_concept, save_concept
from custom_diffusion.errors import UserError
from custom_diffusion.evaluation.choosing import choose
from custom_diffusion.evaluation.encoders import ClipEncoder, ImageEncoder
from custom_diffusion.evaluation.evaluating import find_checkpoints
from custom_diffusion.evaluation.layouts import find_generated
from custom_diffusion.evaluation.prompts import fill_in, own_prompts, read_prompts, without_tokens
from custom_diffusion.evaluation.scores import grouped_image_alignment, image_alignment, kid, text_alignment
from tests.conftest import MakeOnce, draw_images
from tests.encoders import write_clip, write_dino, write_dinov2
from tools.base.save_encoder import difference, save_encoder

# One at a time, so that an image is the same to the bit whichever others are made.
FEW = ["--num_inference_steps", "2", "--num_images", "1", "--batch_size", "1", "--device", "cpu"]


@pytest.fixture(scope="session")
def clip(make_once: MakeOnce, tokenizer: CLIPTokenizer) -> Path:
    return make_once("tiny-clip", lambda folder: write_clip(folder, tokenizer))


@pytest.fixture(scope="session")
def dino(make_once: MakeOnce) -> Path:
    return make_once("tiny-dino", write_dino)


@pytest.fixture(scope="session")
def dinov2(make_once: MakeOnce) -> Path:
    return make_once("tiny-dinov2", write_dinov2)


def features(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 0.3


def unit(rows: torch.Tensor) -> np.ndarray:
    """As the authors' script does it."""
    values = rows.numpy()
    return values / np.sqrt(np.sum(values**2, axis=1, keepdims=True))


# --- scores --------------------------------------------------------------------------------------


def test_text_alignment_is_the_authors_formula() -> None:
    images, texts = features(20), features(20, seed=1)
    cosines = np.sum(unit(images) * unit(texts), axis=1)
    assert (cosines < 0).any(), "some are cut off at 0"
    assert text_alignment(images, texts) == pytest.approx(np.mean(2.5 * np.clip(cosines, 0, None)), abs=1e-6)


def test_image_alignment_is_the_authors_formula() -> None:
    images, targets = features(20), features(5, seed=1)
    assert image_alignment(images, targets) == pytest.approx(np.mean(unit(images) @ unit(targets).T), abs=1e-6)


def test_image_alignment_with_targets_of_ones_own() -> None:
    images, targets = features(3), [features(2, seed=1), features(4, seed=2), features(1, seed=3)]
    rows = [np.mean(unit(one) @ unit(image[None]).T) for image, one in zip(images, targets, strict=True)]
    assert grouped_image_alignment(images, targets) == pytest.approx(np.mean(rows), abs=1e-6)


def test_kid_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    one, other = features(60), features(80, seed=1) + 0.2
    theirs = kid_features_to_metric(one, other, kid_subsets=7, kid_subset_size=30, verbose=False)
    ours = kid(one, other, subset_size=30, subsets=7)
    assert ours.mean / 1000 == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert ours.spread / 1000 == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)
    assert ours.mean > kid(one, features(80, seed=5), subset_size=30, subsets=7).mean
    with pytest.raises(UserError, match=r"subsets of 30 images, and there are 5 real class images.*--kid_subset_size"):
        kid(one, other[:5], subset_size=30)


# --- encoders ------------------------------------------------------------------------------------


def photographs(folder: Path) -> list[Path]:
    """Images of several shapes, with fine detail."""
    folder.mkdir()
    for number, size in enumerate([(70, 50), (41, 97), (64, 64)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def theirs(resize: int, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Path], torch.Tensor]:
    """The preprocessing of CustomConcept101's script, for a smaller encoder."""
    steps = [
        transforms.Resize(resize, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    return lambda path: transforms.Compose(steps)(Image.open(path).convert("RGB"))


def test_clip_sees_what_it_sees_in_the_authors_script(clip: Path, tmp_path: Path) -> None:
    paths = photographs(tmp_path / "images")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.stack([theirs(32, 32, mean, std)(path) for path in paths])
    expected = CLIPModel.from_pretrained(clip).get_image_features(pixel_values=pixels)
    found = ClipEncoder("--clip", str(clip), "cpu", batch_size=2).images(paths)
    assert torch.allclose(found, getattr(expected, "pooler_output", expected), atol=1e-6)


def test_clips_texts_do_not_depend_on_their_batch(clip: Path, tokenizer: CLIPTokenizer) -> None:
    encoder = ClipEncoder("--clip", str(clip), "cpu", batch_size=2)
    prompts = ["a cat", "a cat in a bucket, far away", "word " * 200]
    alone = torch.cat([encoder.texts([prompt]) for prompt in prompts])
    assert torch.allclose(encoder.texts(prompts), alone, atol=1e-6)
    ids = tokenizer(prompts[1], return_tensors="pt").input_ids
    expected = CLIPModel.from_pretrained(clip).get_text_features(input_ids=ids)
    assert torch.allclose(alone[1:2], getattr(expected, "pooler_output", expected), atol=1e-6), "nor on the padding"


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_sees_what_it_sees_in_the_authors_script(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    paths = photographs(tmp_path / "images")
    resize = theirs(37, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # 256 to 224
    expected = AutoModel.from_pretrained(folder)(pixel_values=torch.stack([resize(path) for path in paths]))
    found = ImageEncoder("--dino", str(folder), "cpu").images(paths)
    assert torch.allclose(found, expected.last_hidden_state[:, 0], atol=1e-6)


def test_the_small_encoder_is_the_one_of_the_tests(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "mobilenet")
    assert difference(folder) < 1e-5
    paths = photographs(tmp_path / "images")
    assert ImageEncoder("--encoder", str(folder), "cpu").images(paths).shape == (3, 1280)


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--clip", "dino", "is a vit model, no CLIP with both its halves"),
        ("--dino", "base_model", "cannot be loaded.*in transformers' layout"),
        ("--dino", "nowhere", "cannot be loaded.*in transformers' layout"),
        ("--clip", "openai/clip-vit-base-patch32", "cannot be loaded.*hf download openai/clip-vit-base-patch32"),
    ],
)
def test_what_is_no_encoder_gets_one_line(flag: str, name: str, message: str, request: pytest.FixtureRequest) -> None:
    name = str(request.getfixturevalue(name)) if name in ("dino", "base_model") else name
    with pytest.raises(UserError, match=message) as raised:
        (ClipEncoder if flag == "--clip" else ImageEncoder)(flag, name, "cpu")
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"{flag} {name!r}")


def test_a_text_model_is_no_image_encoder(base_model: Path) -> None:
    with pytest.raises(UserError, match="no encoder of images"):
        ImageEncoder("--dino", str(base_model / "text_encoder"), "cpu")


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", evaluate.PROMPTS)
def test_twenty_prompts_of_each_kind(kind: str) -> None:
    prompts = own_prompts(kind)
    assert len(prompts) == len(set(prompts)) == 20
    assert all(prompt.count("{}") == 1 for prompt in prompts)


def test_prompts_are_filled_in() -> None:
    assert fill_in("a {} in the snow", ["<new1> cat"]) == "a <new1> cat in the snow"
    assert fill_in("a {} in the snow", ["<new1> cat", "<new2> pot"]) == "a <new1> cat and a <new2> pot in the snow"
    assert fill_in("{1} beside {0}", ["<new1> cat", "<new2> pot"]) == "<new2> pot beside <new1> cat"
    with pytest.raises(UserError, match="only 1 concepts"):
        fill_in("{1} beside {0}", ["<new1> cat"])


def test_scored_prompts_lose_the_new_word() -> None:
    assert without_tokens("photo of a <new1> cat", ["<new1>"]) == "photo of a cat"
    assert without_tokens("photo of a <NEW1>, red", ["<new1>"]) == "photo of a, red"
    assert without_tokens("a <my-cat> and a <x> pot", None) == "a and a pot"


def test_prompts_of_customconcept101(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "cat.txt").write_text("{} in a box\n\n{} on a mat\n")
    (tmp_path / "prompts" / "both.txt").write_text("{0} beside {1}\n")
    cat = {"class_prompt": "cat", "prompt_filename": "prompts/cat.txt"}
    pot = {"class_prompt": "wooden pot", "prompt_filename": "prompts/pot.txt"}
    one, two = tmp_path / "dataset.json", tmp_path / "dataset_multiconcept.json"
    one.write_text(json.dumps([pot, cat]))
    two.write_text(json.dumps([[pot, cat, {}], [cat, pot, {"prompt_filename_compose": "prompts/both.txt"}]]))
    assert read_prompts(str(one), ["cat"]) == ["{} in a box", "{} on a mat"]
    assert read_prompts(str(two), ["cat", "wooden pot"]) == ["{0} beside {1}"]
    with pytest.raises(UserError, match="has no prompts for dog"):
        read_prompts(str(one), ["dog"])


# --- layouts -------------------------------------------------------------------------------------


def save(path: Path, **texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        metadata.add_itxt(name, text)
    Image.new("RGB", (40, 40), (10, 200, 30)).save(path, pnginfo=metadata if path.suffix == ".png" else None)


def test_images_of_infer(trained: Path, tmp_path: Path) -> None:
    argv = ["--prompt", "<new1> cat, été", "--model_dir", str(trained), "--output_dir", str(tmp_path)]
    infer.main([*argv, "--num_inference_steps", "2", "--num_images", "2"])
    found = find_generated(tmp_path)
    assert [image.prompt for image in found] == ["<new1> cat, été"] * 2, "and no contact sheet"


def test_images_of_customconcept101(tmp_path: Path) -> None:
    save(tmp_path / "samples" / "b.png")
    save(tmp_path / "samples" / "a.jpg")
    (tmp_path / "prompts.json").write_text(json.dumps({"a": "a cat", "b": "a dog"}))
    assert [(image.path.name, image.prompt) for image in find_generated(tmp_path)] == [
        ("a.jpg", "a cat"),
        ("b.png", "a dog"),
    ]


def test_images_of_dreambench(tmp_path: Path, dino: Path) -> None:
    for subject, count in (("cat", 2), ("dog", 1)):
        for number in range(count):
            save(tmp_path / "tgt_image" / subject / f"0_{number}.png")
            save(tmp_path / "src_image" / subject / f"0_{number}.jpg")
            (tmp_path / "text" / subject).mkdir(parents=True, exist_ok=True)
            (tmp_path / "text" / subject / f"0_{number}.txt").write_text(f"a {subject} {number}\n")
    found = find_generated(tmp_path)
    assert [image.prompt for image in found] == ["a cat 0", "a cat 1", "a dog 0"]
    assert [len(image.targets) for image in found] == [2, 2, 1]
    out = tmp_path / "out"
    evaluate.main(["--images_dir", str(tmp_path), "--clip", "none", "--dino", str(dino), "--output_dir", str(out)])
    (measure,) = json.loads((out / "evaluation.json").read_text())["measures"]
    assert measure["value"] > 0.99, "all are one green, but for JPEG"


# --- the command ---------------------------------------------------------------------------------


def argv_of(trained: Path, images: Path, out: Path, clip: Path, *more: str) -> list[str]:
    common = ["--model_dir", str(trained), "--instance_data_dir", str(images), "--output_dir", str(out), *FEW]
    return [*common, "--clip", str(clip), "--prompts_file", str(out.parent / "prompts.txt"), *more]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("photo of a {}\na {} in the snow\n")
    return path


def measures(out: Path) -> dict[str, dict[str, object]]:
    found = json.loads((out / "evaluation.json").read_text())["measures"]
    return {f"{one['name']} by {Path(one['encoder']).name}": one for one in found}


def test_a_concept_is_measured_beside_its_controls(
    trained: Path, images: Path, tmp_path: Path, clip: Path, dino: Path, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    out, real = tmp_path / "out", draw_images(tmp_path / "real", 12)
    kid_flags = ["--class_data_dir", str(real), "--num_class_images", "10", "--kid_subset_size", "5"]
    argv = argv_of(trained, images, out, clip, "--dino", str(dino), *kid_flags, "--kid_subsets", "4")
    evaluate.main(argv)
    found = measures(out)
    assert len(found) == 6
    for one in found.values():
        assert np.isfinite(one["value"])
        # Texts of a random CLIP may all be on the far side, which counts as 0.
        assert one["control"] != one["value"] or one["kind"] == "text"
    assert {one["control_name"] for one in found.values()} == {"the untrained word", "the base model"}
    # The numbers, from the files by hand.
    encoder = ClipEncoder("--clip", str(clip), "cpu")
    texts = json.loads((out / "concept" / "prompts.json").read_text())
    assert list(texts.values()) == ["photo of a <new1> cat", "a <new1> cat in the snow"]
    rows = encoder.images([out / "concept" / "samples" / f"{stem}.png" for stem in texts])
    scores = {
        "with": text_alignment(rows, encoder.texts([*texts.values()])),
        "without": text_alignment(rows, encoder.texts(["photo of a cat", "a cat in the snow"])),
    }
    for way, score in scores.items():
        name = f"text alignment, {way} the new word in the scored prompt by tiny-clip"
        assert found[name]["value"] == pytest.approx(score, abs=1e-6)
    targets = encoder.images(sorted(images.glob("*.png")))
    value = found[f"image alignment with {images} by tiny-clip"]["value"]
    assert value == pytest.approx(image_alignment(rows, targets), abs=1e-6)
    table = (out / "evaluation.md").read_text()
    assert table in capsys.readouterr().out
    assert str(clip) in table and str(dino) in table
    assert "± " in table and "4 subsets of 5" in table


def test_an_interrupted_evaluation_goes_on(
    trained: Path, images: Path, tmp_path: Path, clip: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    argv = argv_of(trained, images, out, clip)
    evaluate.main(argv)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    made = sorted(out.rglob("samples/*.png"))
    assert len(made) == 4
    made[0].unlink()
    (out / "evaluation.json").unlink()
    kept = made[1].stat().st_mtime_ns
    evaluate.main(argv)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert made[1].stat().st_mtime_ns == kept, "it was not made again"
    # With all images there, the base model is not even loaded for the concept.
    monkeypatch.setattr(infer.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    evaluate.main([*argv, "--no_controls"])


def test_images_of_another_evaluation_are_not_taken(
    trained: Path, images: Path, tmp_path: Path, clip: Path, prompts: Path
) -> None:
    out = tmp_path / "out"
    argv = argv_of(trained, images, out, clip, "--no_controls")
    evaluate.main(argv)
    with pytest.raises(UserError, match=r"guidance_scale 6.0 rather than 3.0: give another --output_dir"):
        evaluate.main([*argv, "--guidance_scale", "3"])
    concept = load_concept(trained)
    concept.tokens["<new1>"]["text_encoder"][0] += 1
    save_concept(concept, tmp_path / "other")
    shutil.copy(trained / "README.md", tmp_path / "other")
    with pytest.raises(UserError, match="images made with concept '"):
        evaluate.main([*argv, "--model_dir", str(tmp_path / "other")])


@pytest.mark.long
def test_the_control_is_the_base_model_with_an_untrained_word(
    trained: Path, images: Path, tmp_path: Path, clip: Path, prompts: Path
) -> None:
    out = tmp_path / "out"
    evaluate.main(argv_of(trained, images, out, clip))
    concept = load_concept(trained)
    tokenizer = CLIPTokenizer.from_pretrained(Path(concept.base_model, "tokenizer"))
    from safetensors.torch import load_file

    table = load_file(Path(concept.base_model, "text_encoder", "model.safetensors"))
    (name,) = (name for name in table if name.endswith("token_embedding.weight"))
    row = table[name][tokenizer.get_vocab()["ktn"]]
    save_concept(type(concept)({}, {"<new1>": {"text_encoder": row}}), tmp_path / "untrained")
    infer.main(
        ["--prompt", "photo of a <new1> cat", "--model_dir", str(tmp_path / "untrained"), "--output_dir",
         str(tmp_path / "samples"), "--num_inference_steps", "2", "--pretrained_model_name_or_path",
         str(concept.base_model), "--device", "cpu"]
    )  # fmt: skip
    (expected,) = (tmp_path / "samples").glob("0*.png")
    first = min((out / "untrained" / "samples").iterdir())
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(expected)))


# --- checkpoints ---------------------------------------------------------------------------------


def row(name: str, text: float | None, image: float, kid: float | None = None) -> dict[str, object]:
    values = {"text alignment": text, "image alignment": image, "KID x 1000": kid, "KID spread": kid and 1.0}
    return {"checkpoint": name, **{key: value for key, value in values.items() if value is not None}}


@pytest.mark.parametrize(
    ("rows", "best", "words"),
    [
        # The last repeats the photographs, and follows no prompt any more.
        ([row("a", 0.80, 0.60), row("b", 0.77, 0.70), row("c", 0.60, 0.95)], "b", "at least 0.7600, within 5%"),
        # Another has lost what the model knew.
        ([row("a", 0.80, 0.60, 20), row("b", 0.79, 0.70, 20.5), row("c", 0.79, 0.8, 23)], "b", "at most 21.00"),
        # None keeps both: text alignment counts.
        ([row("a", 0.80, 0.60, 30), row("b", 0.79, 0.70, 31), row("c", 0.60, 0.9, 20)], "b", "None of them has a KID"),
        ([row("a", 0.80, 0.70), row("b", 0.80, 0.70)], "a", "0.7000"),
        ([row("a", None, 0.60), row("b", None, 0.70)], "b", "cannot see that a concept is learned by heart"),
    ],
)
def test_the_best_checkpoint(rows: list[dict[str, object]], best: str, words: str) -> None:
    verdict = choose(rows, margin=0.05)
    assert verdict["best"] == best
    assert verdict["sentence"].startswith(f"{best} is best: the highest image alignment")
    assert words in verdict["sentence"]


def test_every_checkpoint_is_evaluated(
    trained: Path, images: Path, tmp_path: Path, clip: Path, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    argv = argv_of(tmp_path / "run", images, tmp_path / "x", clip, "--checkpoints")
    place = argv.index("--output_dir")
    evaluate.main([*argv[:place], *argv[place + 2 :]])
    out = tmp_path / "run" / "evaluation" / "checkpoints"
    result = json.loads((out / "evaluation.json").read_text())
    assert [one["checkpoint"] for one in result["checkpoints"]] == ["checkpoint-3", "checkpoint-6"], "6 is the result"
    encoder = ClipEncoder("--clip", str(clip), "cpu")
    targets = encoder.images(sorted(images.glob("*.png")))
    for one in result["checkpoints"]:
        made = sorted((out / one["checkpoint"] / "concept" / "samples").iterdir())
        assert len(made) == 2
        assert one["image alignment"] == pytest.approx(image_alignment(encoder.images(made), targets), abs=1e-6)
        texts = encoder.texts(["photo of a cat", "a cat in the snow"])
        assert one["text alignment"] == pytest.approx(text_alignment(encoder.images(made), texts), abs=1e-6)
    sentence = choose(result["checkpoints"], 0.05)["sentence"]
    assert result["verdict"]["sentence"] == sentence
    assert sentence in capsys.readouterr().out and sentence in (out / "evaluation.md").read_text()
    assert "checkpoint-6" in (out / "trade_off.svg").read_text()
    report = (tmp_path / "run" / "report.html").read_text()
    assert sentence in report and 'aria-label="trade-off"' in report


def test_a_result_that_is_no_checkpoint_is_evaluated_too(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    assert list(find_checkpoints(tmp_path / "run")) == ["checkpoint-3", "checkpoint-6"]
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert list(find_checkpoints(tmp_path / "run")) == ["checkpoint-3", "result"]
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(UserError, match=r"there is no checkpoint in .*--checkpointing_steps"):
        find_checkpoints(tmp_path / "run")


def test_a_result_in_half_precision_is_its_last_checkpoint(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    save_concept(load_concept(trained).to(torch.float16), tmp_path / "run")
    assert list(find_checkpoints(tmp_path / "run")) == ["checkpoint-3", "checkpoint-6"]


def test_images_of_another_precision_are_not_measured(
    trained: Path, images: Path, tmp_path: Path, clip: Path, prompts: Path
) -> None:
    argv = argv_of(trained, images, tmp_path / "out", clip, "--no_controls")
    evaluate.main([*argv, "--dtype=fp32"])
    facts = json.loads((tmp_path / "out" / "evaluation.json").read_text())["facts"]
    assert facts["sampling"]["dtype"] == "fp32"
    with pytest.raises(UserError, match="made with dtype 'fp32' rather than 'bf16'"):
        evaluate.main([*argv, "--dtype=bf16"])


def test_an_evaluation_is_repeated_by_its_file(
    trained: Path, images: Path, tmp_path: Path, clip: Path, prompts: Path
) -> None:
    evaluate.main(argv_of(trained, images, tmp_path / "out", clip, "--no_controls"))
    again = evaluate.parse_args(["--config", str(tmp_path / "out" / "evaluation.yaml")])
    assert again.no_controls and again.model_dir == str(trained)


def test_two_concepts_each_with_its_folder(trained: Path, images: Path, tmp_path: Path, dino: Path) -> None:
    one = load_concept(trained)
    save_concept(replace(one, tokens=one.tokens | {"<new2>": one.tokens["<new1>"]}), tmp_path / "both")
    shutil.copy(trained / "README.md", tmp_path / "both")
    (tmp_path / "prompts.txt").write_text("{1} beside {0}\n")
    pots = draw_images(tmp_path / "pots", 2)
    argv = ["--model_dir", str(tmp_path / "both"), "--class_prompt", "cat+pot", "--clip", "none"]
    argv += ["--encoder", str(dino), "--instance_data_dir", str(images), str(pots)]
    argv += ["--prompts_file", str(tmp_path / "prompts.txt"), "--output_dir", str(tmp_path / "out"), *FEW]
    evaluate.main(argv)
    prompts = json.loads((tmp_path / "out" / "concept" / "prompts.json").read_text())
    assert set(prompts.values()) == {"<new2> pot beside <new1> cat"}
    found = "".join(measures(tmp_path / "out"))
    assert str(images) in found and str(pots) in found


def test_a_list_of_prompts_names_files_beside_it_alone(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("password")
    (tmp_path / "set").mkdir()
    for name in ("../secret.txt", str(tmp_path / "secret.txt")):
        entries = [{"class_prompt": "cat", "prompt_filename": name}]
        (tmp_path / "set" / "dataset.json").write_text(json.dumps(entries))
        with pytest.raises(UserError, match="which is not beside it: refused"):
            read_prompts(str(tmp_path / "set" / "dataset.json"), ["cat"])


def test_a_device_that_there_is_not(trained: Path, images: Path, tmp_path: Path, clip: Path, prompts: Path) -> None:
    with pytest.raises(UserError, match="--device 'toaster' cannot be used"):
        evaluate.main(argv_of(trained, images, tmp_path / "out", clip, "--device=toaster"))


# --- what can go wrong ---------------------------------------------------------------------------


def no_images(tmp: Path, **_: Path) -> list[str]:
    (tmp / "empty").mkdir()
    return ["--images_dir", str(tmp / "empty")]


def no_metadata(tmp: Path, **_: Path) -> list[str]:
    save(tmp / "plain" / "a.png")
    return ["--images_dir", str(tmp / "plain")]


def no_prompt_for_one(tmp: Path, **_: Path) -> list[str]:
    save(tmp / "cc101" / "samples" / "a.png")
    (tmp / "cc101" / "prompts.json").write_text("{}")
    return ["--images_dir", str(tmp / "cc101")]


def five_class_images(tmp: Path, images: Path, **_: Path) -> list[str]:
    return ["--class_data_dir", str(images)]


def no_real_images(tmp: Path, **_: Path) -> list[str]:
    (tmp / "empty").mkdir()
    return ["--instance_data_dir", str(tmp / "empty")]


def other_base_model(base_model_v: Path, **_: Path) -> list[str]:
    return ["--pretrained_model_name_or_path", str(base_model_v)]


def no_encoder(**_: Path) -> list[str]:
    return ["--clip", "none"]


def no_such_initializer(**_: Path) -> list[str]:
    return ["--initializer_token", "qqqqqqqqq"]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (no_images, "there is no image in .*empty"),
        (no_metadata, "there is no prompt in its metadata.*prompts.json"),
        (no_prompt_for_one, "has no prompt for 'a'"),
        (five_class_images, "subsets of 50 images, and there are 5 real class images"),
        (no_real_images, "there is no image in .*empty.*--instance_data_dir"),
        (other_base_model, "base model"),
        (no_encoder, "leaves no encoder"),
        (no_such_initializer, "is no entry of the vocabulary"),
    ],
)
def test_one_line_for_whatever_is_wrong(
    mistake: Callable[..., list[str]],
    message: str,
    trained: Path,
    images: Path,
    base_model_v: Path,
    tmp_path: Path,
    clip: Path,
    prompts: Path,
) -> None:
    more = mistake(tmp=tmp_path, images=images, base_model_v=base_model_v)
    with pytest.raises(UserError) as raised:
        evaluate.main([*argv_of(trained, images, tmp_path / "out", clip), *more])
    assert re.search(message, str(raised.value)), raised.value
    assert mistake in (no_such_initializer, other_base_model) or not (tmp_path / "out").exists(), "nothing is left"
    assert "\n" not in str(raised.value)


def test_nothing_to_compare_with_is_said_at_once(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        evaluate.parse_args([])
    assert "--instance_data_dir data/cat" in capsys.readouterr().err


def test_images_of_a_prompt_whose_name_is_the_same_are_not_taken_for_it(
    trained: Path, images: Path, tmp_path: Path, clip: Path, prompts: Path
) -> None:
    argv = argv_of(trained, images, tmp_path / "out", clip, "--no_controls")
    prompts.write_text("photo of a {} 猫在雪地里\n")
    evaluate.main(argv)
    prompts.write_text("photo of a {} 猫在沙滩上\n")
    with pytest.raises(UserError, match="is of the prompt 'photo of a <new1> cat 猫在雪地里'"):
        evaluate.main(argv)
