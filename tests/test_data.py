"""Images and samples: what a user's files become before the model sees them."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer

import infer
import train_custom_diffusion
from custom_diffusion.concept.files import Concept, load_concept, save_concept
from custom_diffusion.concept.prompts import side_by_side
from custom_diffusion.concept.text_features import read_captions
from custom_diffusion.data.batches import collate_fn, position_batches
from custom_diffusion.data.class_images import PromptDataset, generate_class_images
from custom_diffusion.data.concept_list import ConceptEntry, read_concepts
from custom_diffusion.data.dataset import CustomDiffusionDataset
from custom_diffusion.data.images import find_class_images, find_cutmix_images, find_instance_images
from custom_diffusion.data.views import RENDERING_VERSION, Renderer, View
from custom_diffusion.errors import UserError
from custom_diffusion.images import load_image
from tests.conftest import draw_images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


Tokenize = Callable[[str], dict[str, torch.Tensor]]


def concept(folder: Path, instance_prompt: str = "photo of a <new1> cat", **more: str) -> ConceptEntry:
    return ConceptEntry(instance_prompt, str(folder), instance_folder=folder, **more)


def dataset(folder: Path, tokenize: Tokenize, **options: object) -> CustomDiffusionDataset:
    options = {"size": 64, "mask_size": 8, "class_images": []} | options
    return CustomDiffusionDataset(find_instance_images([concept(folder)]), tokenize=tokenize, **options)


def words(example: dict, kind: str, tokenizer: CLIPTokenizer) -> str:
    """The prompt of a sample, as its ids have it."""
    return tokenizer.decode(example[f"{kind}_prompt_ids"]["text_encoder"], skip_special_tokens=True).strip()


# --- instance images ------------------------------------------------------------------------------


def test_files_that_are_no_images_are_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw_images(tmp_path, 2)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder").mkdir()
    with caplog.at_level(logging.WARNING, "custom_diffusion"):
        found = find_instance_images([concept(tmp_path)])
    assert [path.name for path, _ in found] == ["0.png", "1.png"]
    (record,) = caplog.records
    for name in ("truncated.png", ".DS_Store", "notes.txt"):
        assert name in record.getMessage()


# --- class images --------------------------------------------------------------------------------


def retrieved(folder: Path, captions: Sequence[str], names: Sequence[str] | None = None) -> ConceptEntry:
    """What retrieve.py leaves."""
    draw_images(folder / "images", len(captions))
    names = names or [str(folder / "images" / f"{number}.png") for number in range(len(captions))]
    (folder / "images.txt").write_bytes("".join(f"{name}\n" for name in names).encode())
    (folder / "caption.txt").write_bytes("".join(f"{caption}\n" for caption in captions).encode())
    return concept(folder, class_prompt="cat", class_data_dir=str(folder))


def test_retrieved_images_keep_their_own_captions(tmp_path: Path) -> None:
    captions = ["a cat", "line\u2028separator, vertical\x0btab", "", "last"]
    found = find_class_images([retrieved(tmp_path, captions)], num_class_images=4, real_prior=True)
    assert [(path.name, caption) for path, caption in found] == [
        ("0.png", captions[0]),
        ("1.png", captions[1]),
        ("2.png", captions[2]),
        ("3.png", captions[3]),
    ]


def test_a_broken_class_image_is_replaced_by_the_next(tmp_path: Path) -> None:
    entry = retrieved(tmp_path, ["a", "b", "c", "d"])
    (tmp_path / "images" / "1.png").write_bytes(b"broken")
    found = find_class_images([entry], num_class_images=3, real_prior=True)
    assert [caption for _, caption in found] == ["a", "c", "d"]
    with pytest.raises(UserError, match="3 readable class images of the 4"):
        find_class_images([entry], num_class_images=4, real_prior=True)


def test_a_folder_that_was_moved_still_finds_its_images(tmp_path: Path) -> None:
    entry = retrieved(tmp_path, ["a", "b"], names=["old/place/images/0.png", "./images/1.png"])
    found = find_class_images([entry], num_class_images=2, real_prior=True)
    assert [path for path, _ in found] == [tmp_path / "images" / "0.png", tmp_path / "images" / "1.png"]


def test_prompt_dataset_fills_the_gaps() -> None:
    prompts = PromptDataset("cat", 3, taken=[0, 2, 7])
    assert [prompts[i] for i in range(len(prompts))] == [{"prompt": "cat", "index": index} for index in (1, 3, 4)]


class Painter:
    """A base model whose images show their noise and how often it was asked."""

    name = "painter"
    device = torch.device("cpu")
    scheduler: object = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def load(self, loader: object, subfolder: str) -> dict[str, object]:
        return {}

    def unet_configuration(self) -> dict[str, object]:
        return {"block_out_channels": (16, 32)}

    def pipeline(self, dtype: torch.dtype, **options: object) -> Painter:
        return self

    def to(self, device: torch.device) -> Painter:
        return self

    def set_progress_bar_config(self, **options: object) -> None:
        pass

    def encode_prompt(self, prompts: list[str], **options: object) -> tuple[list[str], None]:
        return prompts, None

    def __call__(
        self, prompt_embeds: list[str], generator: list[torch.Generator], **options: object
    ) -> SimpleNamespace:
        self.asked += prompt_embeds
        noise = [(torch.rand(8, 8, 3, generator=one) * 255).byte().numpy() for one in generator]
        return SimpleNamespace(images=[Image.fromarray(one) for one in noise])


def generate(entries: Sequence[ConceptEntry], count: int = 3, seed: int = 42) -> list[str]:
    """What the painter was asked for."""
    painter = Painter()
    args = SimpleNamespace(
        num_class_images=count,
        sample_batch_size=2,
        seed=seed,
        prior_generation_precision=None,
        class_image_scheduler="dpmsolver++",
        class_image_steps=None,
    )
    generate_class_images(painter, entries, Accelerator(cpu=True), args)
    return painter.asked


def generated(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.jpg"))}


def of_class(folder: Path, class_prompt: str = "cat") -> ConceptEntry:
    return concept(folder.parent, class_prompt=class_prompt, class_data_dir=str(folder))


def test_two_folders_of_one_class_prompt_hold_different_images(tmp_path: Path) -> None:
    generate([of_class(tmp_path / "alone")])
    both = [of_class(tmp_path / name) for name in ("a", "b", "c")]
    generate(both)
    assert generated(tmp_path / "a") == generated(tmp_path / "alone"), "as before there were others"
    names = [name for folder in "abc" for name in generated(tmp_path / folder)]
    assert len({name.split("-")[1] for name in names}) == 9
    found = find_class_images(both, 3, real_prior=False)
    assert len({path.read_bytes() for path, _ in found}) == len(found) == 9
    # What is gone is generated again from its own noise.
    before = generated(tmp_path / "b")
    (tmp_path / "b" / next(iter(before))).unlink()
    assert len(generate(both)) == 1
    assert generated(tmp_path / "b") == before


def test_concepts_that_share_a_folder_share_its_images(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cat")
    entries = [of_class(tmp_path / "cat"), of_class(tmp_path / "x" / ".." / "cat"), of_class(tmp_path / "link", "Cat ")]
    assert generate(entries) == ["cat"] * 3, "generated once"
    assert [path.name for path, _ in find_class_images(entries, 3, real_prior=False)] == list(
        generated(tmp_path / "cat")
    ), "and seen once"
    real = retrieved(tmp_path / "real", ["a", "b"])
    assert len(find_class_images([real, real], 2, real_prior=True)) == 2


def read_list(tmp_path: Path, *entries: ConceptEntry, real_prior: bool = False) -> list[ConceptEntry]:
    """What a run makes of a list of these concepts."""
    names = ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir")
    (tmp_path / "list.json").write_text(
        json.dumps([{name: getattr(entry, name) for name in names} for entry in entries])
    )
    return read_concepts(
        SimpleNamespace(concepts_list=str(tmp_path / "list.json"), with_prior_preservation=True, real_prior=real_prior)
    )


def test_images_of_one_class_are_not_taken_for_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cats, plants = of_class(tmp_path / "class"), of_class(tmp_path / "class", "plant")
    with pytest.raises(UserError, match=r"class' would hold class images of 'cat' and of 'plant': give each"):
        read_list(tmp_path, cats, plants)
    generate(read_list(tmp_path, cats))
    assert json.loads((tmp_path / "class" / "class_images.json").read_text()) == {
        "class_prompt": "cat", "base_model": "painter",
    }  # fmt: skip
    with caplog.at_level(logging.WARNING, "custom_diffusion"):
        assert len(find_class_images([cats], 3, real_prior=False)) == 3
    assert not caplog.records, "the record is no broken image"
    with pytest.raises(UserError, match=r"generated for 'cat', not for 'plant': give another --class_data_dir, or"):
        read_list(tmp_path, plants)
    assert read_list(tmp_path, of_class(tmp_path / "class", "CAT"))

    (tmp_path / "class" / "class_images.json").write_bytes(b'{"class_prompt": 3')
    with pytest.raises(UserError, match=r"class_images.json' is damaged: remove it if the images beside it show 'cat'"):
        read_list(tmp_path, cats)
    # The way out: without images there is nothing to be mistaken.
    for path in (tmp_path / "class").glob("*.jpg"):
        path.unlink()
    generate(read_list(tmp_path, plants))
    with pytest.raises(UserError, match="generated for 'plant', not for 'cat'"):
        read_list(tmp_path, cats)


def test_folders_of_before_there_were_records_get_one(tmp_path: Path) -> None:
    generate([of_class(tmp_path / "class")])
    (tmp_path / "class" / "class_images.json").unlink()
    entries = read_list(tmp_path, of_class(tmp_path / "class"))
    assert generate(entries) == []
    with pytest.raises(UserError, match="generated for 'cat', not for 'plant'"):
        read_list(tmp_path, of_class(tmp_path / "class", "plant"))


def test_class_images_of_ones_own_are_of_any_class(tmp_path: Path) -> None:
    draw_images(tmp_path / "own", 3)
    for prompt in ("cat", "plant"):
        entries = read_list(tmp_path, of_class(tmp_path / "own", prompt))
        assert generate(entries) == []
        assert {prompt for _, prompt in find_class_images(entries, 3, real_prior=False)} == {prompt}
    assert [path.suffix for path in (tmp_path / "own").iterdir()] == [".png"] * 3, "nothing was added"
    with pytest.raises(UserError, match="would hold class images of 'cat' and of 'plant'"):
        read_list(tmp_path, of_class(tmp_path / "own"), of_class(tmp_path / "own", "plant"))


def test_real_class_images_are_not_mistaken_for_generated_ones(tmp_path: Path) -> None:
    real = retrieved(tmp_path / "real", ["a", "b"])
    assert read_list(tmp_path, real, real_prior=True)
    with pytest.raises(UserError, match=r"holds real class images.*add --real_prior"):
        read_list(tmp_path, real)


def test_the_same_images_from_two_runs_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = of_class(tmp_path / "one"), of_class(tmp_path / "other")
    generate([one])
    generate([other])
    with caplog.at_level(logging.WARNING, "custom_diffusion"):
        generate([one, other])
    assert "3 class images are both in" in caplog.text
    for path in (tmp_path / "other").glob("*.jpg"):
        path.unlink()
    caplog.clear()
    generate([one, other])
    generate([one, other])
    assert not caplog.records
    assert not generated(tmp_path / "one").keys() & generated(tmp_path / "other").keys()


# --- samples -------------------------------------------------------------------------------------


def stripes(folder: Path, size: tuple[int, int] = (300, 100)) -> Path:
    """A wide image: red left third, green middle, blue right."""
    folder.mkdir()
    image = Image.new("RGB", size, RED)
    image.paste(GREEN, (size[0] // 3, 0, size[0] * 2 // 3, size[1]))
    image.paste(BLUE, (size[0] * 2 // 3, 0, size[0], size[1]))
    image.save(folder / "stripes.png")
    return folder


def test_the_centre_square_is_taken_not_squashed(tmp_path: Path, tokenize: Tokenize) -> None:
    pixels = dataset(stripes(tmp_path / "wide"), tokenize, aug=False)[0]["instance_images"]
    green = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1)
    assert (pixels - green).abs().max() < 0.02, "only the middle third is in the centre square"


# What the pixels below are, by :data:`views.RENDERING_VERSION`.
PIXELS = {1: "93e2e653020852b818ffeb7a994950c960ccdf364aceceda2e6d12fed5636ae1"}


def test_a_changed_rendering_has_a_version_of_its_own(tmp_path: Path) -> None:
    y, x = np.mgrid[:90, :130]
    image = Image.fromarray(np.stack([x * 2 % 256, y * 5 % 256, (x * y) % 256], axis=-1).astype(np.uint8))
    digest = hashlib.sha256()
    for mode in ("RGB", "L", "LA"):
        image.convert(mode).save(tmp_path / "image.png")
        for size, scale in ((64, 40), (64, 64), (64, 80), (64, None), (24, 20), (24, None)):
            for padding_mode in ("constant", "edge"):
                pixels = Renderer(size, size // 8, padding_mode).render(
                    View(tmp_path / "image.png", True, scale, 0.3, 0.6)
                )
                digest.update(((pixels + 1) * 127.5).round().byte().numpy().tobytes())
    assert digest.hexdigest() == PIXELS[RENDERING_VERSION], "kept latents are of other pixels: raise RENDERING_VERSION"


def test_hflip_mirrors_half_of_the_samples(images: Path, tokenize: Tokenize) -> None:
    samples = dataset(images, tokenize, aug=False, hflip=True)
    plain = dataset(images, tokenize, aug=False)
    mirrored = 0
    for position in range(100):
        one, other = samples[position]["instance_images"], plain[position]["instance_images"]
        assert torch.equal(one, other) or torch.equal(one, other.flip(-1))
        mirrored += not torch.equal(one, other)
    assert 30 < mirrored < 70


def test_noaug_shows_the_whole_image(images: Path, tokenize: Tokenize) -> None:
    samples = dataset(images, tokenize, aug=False)
    prompts = {samples.draw(position).instance_prompt for position in range(20)}
    assert len(prompts) == 1
    assert all(samples[position]["instance_mask"].min() == 1 for position in range(20))


def test_augmentation_follows_the_paper(images: Path, tokenize: Tokenize, tokenizer: CLIPTokenizer) -> None:
    samples = dataset(images, tokenize)
    counts = {"small": 0, "large": 0, "plain": 0}
    for position in range(300):
        sample = samples[position]
        pixels, mask = sample["instance_images"], sample["instance_mask"]
        prompt = words(sample, "instance", tokenizer)
        # A value of 0 does not occur in an image of 8 bits: what is 0 is canvas.
        rows = (pixels != 0).all(0).any(1).sum().item()
        covered = torch.nn.functional.interpolate(mask[None, None], scale_factor=8)[0, 0].bool()
        assert not (pixels == 0).all(0)[covered].any(), "the mask lies inside the image"
        assert mask.sum() >= 1
        if prompt.startswith(("a far away photo", "very small photo")):
            counts["small"] += 1
            assert 64 // 3 <= rows < 0.6 * 64
        elif prompt.startswith(("zoomed in photo", "close up photo")):
            counts["large"] += 1
            assert mask.min() == 1
        else:
            counts["plain"] += 1
            assert prompt.startswith("photo of a")
            assert 0.6 * 64 <= rows <= 64
    # 66 % small or plain, of which (0.6 - 1/3) / (1 - 1/3) = 40 % small.
    assert 60 < counts["small"] < 110
    assert 75 < counts["large"] < 130


@pytest.mark.parametrize(("size", "mask_size"), [(8, 1), (16, 2), (24, 3), (32, 4), (64, 8), (96, 12), (512, 64)])
def test_no_mask_is_ever_empty(size: int, mask_size: int, images: Path) -> None:
    renderer = Renderer(size, mask_size)
    random = np.random.default_rng(0)
    for scale in [*range(max(1, size // 3), size + 1, max(1, size // 64)), size] * 2:
        view = View(images / "0.png", False, scale, *random.random(2))
        pixels, mask = renderer.render(view), renderer.mask(view)
        assert pixels.shape == (3, size, size)
        assert mask.shape == (mask_size, mask_size)
        assert mask.sum() >= 1


def test_continued_edges_are_learned_with_the_image(images: Path, tokenize: Tokenize) -> None:
    edge, grey = dataset(images, tokenize, padding_mode="edge"), dataset(images, tokenize)
    smaller = 0
    for position in range(100):
        one, other = edge[position], grey[position]
        assert torch.equal(one["instance_prompt_ids"]["text_encoder"], other["instance_prompt_ids"]["text_encoder"])
        assert one["instance_mask"].min() == 1
        # A value of 0 does not occur in an image of 8 bits: what is 0 is canvas.
        inside = (other["instance_images"] != 0).all(0)
        assert torch.equal(one["instance_images"][:, inside], other["instance_images"][:, inside])
        rows, columns = (torch.nonzero(inside.any(side)).flatten() for side in (1, 0))
        nearest = one["instance_images"][:, torch.arange(64).clamp(rows[0], rows[-1])]
        nearest = nearest[:, :, torch.arange(64).clamp(columns[0], columns[-1])]
        assert torch.equal(one["instance_images"], nearest), "outside is the nearest pixel inside"
        smaller += not inside.all()
    assert smaller > 40


def two_concepts(folder: Path, tokenize: Tokenize, **options: object) -> CustomDiffusionDataset:
    """An image with a frame, red above blue, as `<new1> cat`; the same, green above white, as `<new2> dog`."""
    concepts = []
    for number, (noun, above, below) in enumerate((("cat", RED, BLUE), ("dog", GREEN, WHITE)), 1):
        (folder / noun).mkdir(parents=True)
        image = Image.new("RGB", (80, 80), (9, 9, 9))
        image.paste(above, (10, 10, 70, 40))
        image.paste(below, (10, 40, 70, 70))
        image.save(folder / noun / "0.png")
        concepts.append(concept(folder / noun, f"photo of a <new{number}> {noun}"))
    options = {"size": 64, "mask_size": 8, "class_images": []} | options
    return CustomDiffusionDataset(find_instance_images(concepts), tokenize=tokenize, **options)


def shown_pixels(pixels: torch.Tensor) -> np.ndarray:
    """(3, h, w) in [-1, 1] to uint8 (h, w, 3)."""
    return ((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)


@pytest.mark.parametrize(("size", "mask_size"), [(8, 1), (24, 3), (64, 8)])
@pytest.mark.parametrize("aug", [True, False])
def test_cutmix_shows_two_concepts_where_the_prompt_says_they_are(
    aug: bool, size: int, mask_size: int, tmp_path: Path, tokenize: Tokenize
) -> None:
    samples = two_concepts(
        tmp_path, tokenize, cutmix_probability=0.3, samples_per_step=4, aug=aug, size=size, mask_size=mask_size
    )
    whole = {
        noun: np.asarray(load_image(tmp_path / noun / "0.png").resize((size, size), Image.Resampling.BILINEAR))
        for noun in ("cat", "dog")
    }
    orders = {"photo of a <new1> cat next to a <new2> dog": 0, "photo of a <new2> dog next to a <new1> cat": 0}
    for position in range(300):
        sample, item = samples.draw(position), samples[position]
        first_of_step = samples.draw(position - position % 4)
        assert len(sample.instance) == len(first_of_step.instance), "a step's samples can be one batch"
        if len(sample.instance) == 1:
            assert "next to" not in sample.instance_prompt
            assert item["instance_images"].shape == (3, size, size)
            continue
        orders[sample.instance_prompt] += 1
        nouns = ("cat", "dog") if "cat next" in sample.instance_prompt else ("dog", "cat")
        beside = np.concatenate([whole[noun] for noun in nouns], axis=1)
        assert np.array_equal(shown_pixels(item["instance_images"]), beside), "both are whole, at full size"
        assert torch.equal(item["instance_mask"], torch.ones(mask_size, 2 * mask_size)), "all of it counts"
    assert 60 < sum(orders.values()) < 130
    assert min(orders.values()) > 20


def other_images(folder: Path) -> list[tuple[Path, str]]:
    """A yellow square and a black one, with their captions in text files."""
    folder.mkdir()
    for noun, colour in (("sun", "yellow"), ("coal", "black")):
        Image.new("RGB", (30, 30), colour).save(folder / f"{noun}.png")
        (folder / f"{noun}.txt").write_text(f"photo of a {noun}")
    return find_cutmix_images(str(folder))


@pytest.mark.parametrize("concepts", [1, 2])
def test_cutmix_shows_a_concept_beside_other_images(concepts: int, tmp_path: Path, tokenize: Tokenize) -> None:
    others = other_images(tmp_path / "others")
    assert [caption for _, caption in others] == ["photo of a coal", "photo of a sun"]
    both = two_concepts(tmp_path, tokenize)
    own = both.instance_images[:concepts]
    samples = CustomDiffusionDataset(own, [], tokenize, 64, 8, cutmix_probability=0.5, cutmix_images=others)
    colours = {"sun": [255, 255, 0], "coal": [0, 0, 0]}
    beside, sides, pairs = Counter[str](), Counter[str](), 0
    for position in range(200):
        sample, item = samples.draw(position), samples[position]
        if len(sample.instance) == 1:
            continue
        pairs += 1
        names = [view.path.stem if view.path in dict(others) else view.path.parent.name for view in sample.instance]
        assert sample.instance_prompt.index(names[0]) < sample.instance_prompt.index(names[1]), "left is named first"
        for half, name in zip(np.split(shown_pixels(item["instance_images"]), 2, axis=1), names, strict=True):
            assert name not in colours or (half == colours[name]).all()
        found = [name for name in names if name in colours]
        assert len(found) == 1 or concepts == 2, "one concept is never beside itself"
        beside.update(found)
        sides.update("left" if names.index(name) == 0 else "right" for name in found)
    assert set(beside) == set(colours)
    assert min(sides.values()) > 0.3 * sides.total()
    assert sides.total() == pairs if concepts == 1 else 0.35 * pairs < sides.total() < 0.65 * pairs


def test_class_images_are_beside_each_other_where_concepts_are(tmp_path: Path, tokenize: Tokenize) -> None:
    class_images = []
    for noun, colour in (("cat", "red"), ("dog", "green")):
        (tmp_path / "class" / noun).mkdir(parents=True)
        for number in range(3):
            class_images.append((tmp_path / "class" / noun / f"{number}.png", f"photo of a {noun}"))
            Image.new("RGB", (64, 64), colour).save(class_images[-1][0])
    colours = {"cat": [255, 0, 0], "dog": [0, 128, 0]}
    samples = two_concepts(tmp_path, tokenize, class_images=class_images, cutmix_probability=0.5)
    pairs, shown = 0, set()
    for position in range(100):
        sample, item = samples.draw(position), samples[position]
        assert item["class_images"].shape == item["instance_images"].shape
        if len(sample.instance) == 1:
            continue
        pairs += 1
        shown |= set(sample.class_image)
        first, second = ("cat", "dog") if sample.class_image[0].path.parent.name == "cat" else ("dog", "cat")
        assert sample.class_prompt == f"photo of a {first} next to a {second}"
        halves = np.split(shown_pixels(item["class_images"]), 2, axis=1)
        assert all((half == colours[noun]).all() for half, noun in zip(halves, (first, second), strict=True))
        assert item["class_mask"].min() == 1
    assert pairs > 30
    assert {view.path for view in shown} == {path for path, _ in class_images}


def test_two_concepts_of_one_class_share_its_images_in_pairs(tmp_path: Path, tokenize: Tokenize) -> None:
    images = draw_images(tmp_path / "class", 3)
    class_images = [(path, "photo of a cat") for path in sorted(images.iterdir())]
    samples = two_concepts(tmp_path, tokenize, class_images=class_images, cutmix_probability=1.0)
    assert {samples.draw(position).class_prompt for position in range(20)} == {"photo of a cat next to a cat"}


@pytest.mark.parametrize(("variants", "scales"), [(None, [57, 84, 43, 49]), (20, [82, 77, 30, 29])])
def test_without_cutmix_the_stream_is_what_it_was(
    variants: int | None, scales: list[int], tmp_path: Path, tokenize: Tokenize
) -> None:
    samples = two_concepts(tmp_path, tokenize, seed=1, variants=variants)
    # Who trains again with the same seed gets the same concept.
    drawn = [samples.draw(position).instance[0] for position in range(4)]
    assert [view.path.parent.name for view in drawn] == ["cat", "dog", "cat", "dog"]
    assert [view.scale for view in drawn] == scales


@pytest.mark.parametrize(
    ("left", "right", "together"),
    [
        ("photo of a <new1> cat", "photo of a <new2> plant", "photo of a <new1> cat next to a <new2> plant"),
        ("photo of a <new1> cat", "photo of an <new2> owl", "photo of a <new1> cat next to an <new2> owl"),
        ("photo of a cat <new1>", "photo of a cat <new2>", "photo of a cat <new1> next to a cat <new2>"),
        ("photo of a <new1> cat", "photo of a <new1> cat", "photo of a <new1> cat next to a <new1> cat"),
        ("a painting of <new1>", "a painting of <new2>", "a painting of <new1> next to <new2>"),
        ("a painting of <new1>", "photo of <new2>", "a painting of <new1> next to photo of <new2>"),
        ("a <new1> cup of tea", "a <new1> cup of coffee", "a <new1> cup of tea next to a <new1> cup of coffee"),
        ("<new1> cat", "<new2> plant", "<new1> cat next to <new2> plant"),
    ],
)
def test_two_prompts_become_one(left: str, right: str, together: str) -> None:
    assert side_by_side(left, right) == together


def test_class_images_are_cropped_not_masked(tmp_path: Path, tokenize: Tokenize, tokenizer: CLIPTokenizer) -> None:
    wide = [(stripes(tmp_path / "wide") / "stripes.png", "a caption of its own")]
    for center_crop, colours in ((True, {1}), (False, {0, 1, 2})):
        samples = dataset(tmp_path / "wide", tokenize, class_images=wide, center_crop=center_crop)
        seen = set()
        for position in range(40):
            sample = samples[position]
            assert sample["class_mask"].min() == 1
            assert sample["class_images"].shape == (3, 64, 64)
            seen.add(sample["class_images"].mean((1, 2)).argmax().item())
        assert seen == colours
        assert words(sample, "class", tokenizer) == "a caption of its own"


def collated(
    samples: CustomDiffusionDataset, positions: Sequence[range], workers: int
) -> list[dict[str, torch.Tensor]]:
    def collate(examples: Sequence[dict]) -> dict[str, torch.Tensor]:
        batch = collate_fn(examples, with_prior_preservation=True, latent_channels=4, num_train_timesteps=1000)
        return batch | batch.pop("input_ids")

    return list(DataLoader(samples, batch_sampler=positions, collate_fn=collate, num_workers=workers))


def test_a_sample_depends_only_on_seed_epoch_and_index(images: Path, tokenize: Tokenize) -> None:
    class_images = find_instance_images([concept(images)])

    def samples(seed: int = 1) -> CustomDiffusionDataset:
        return dataset(images, tokenize, class_images=class_images, hflip=True, seed=seed)

    alone = collated(samples(), position_batches(0, 12, 1, 0, 1), workers=0)
    with_workers = collated(samples(), position_batches(0, 12, 1, 0, 1), workers=2)
    resumed = collated(samples(), position_batches(7, 5, 1, 0, 1), workers=1)
    for one, other in [*zip(alone, with_workers, strict=True), *zip(alone[7:], resumed, strict=True)]:
        assert all(torch.equal(one[name], other[name]) for name in one)
    other_seed = collated(samples(seed=2), position_batches(0, 12, 1, 0, 1), workers=0)
    assert not any(torch.equal(a["noise"], b["noise"]) for a, b in zip(alone, other_seed, strict=True))
    first_epoch, second_epoch = alone[:5], alone[5:10]
    assert not any(torch.equal(a["noise"], b["noise"]) for a in first_epoch for b in second_epoch)


def test_two_processes_see_what_one_with_the_double_batch_sees(images: Path, tokenize: Tokenize) -> None:
    class_images = find_instance_images([concept(images)])
    samples = dataset(images, tokenize, class_images=class_images)
    together = collated(samples, position_batches(2, 4, 4, 0, 1), workers=0)
    apart = [collated(samples, position_batches(2, 4, 2, process, 2), workers=0) for process in (0, 1)]
    for one, *both in zip(together, *apart, strict=True):
        for name, value in one.items():
            # Instance images come first, class images behind them.
            instances, classes = zip(*(batch[name].chunk(2) for batch in both), strict=True)
            assert torch.equal(value, torch.cat([*instances, *classes])), name


def test_every_image_is_seen_once_an_epoch(images: Path, tokenize: Tokenize) -> None:
    samples = dataset(images, tokenize, aug=False)
    for epoch in range(3):
        seen = {samples[epoch * 5 + k]["instance_images"].numpy().tobytes() for k in range(5)}
        assert len(seen) == 5


# --- captions of single images -----------------------------------------------------------------


def captioned(folder: Path) -> dict[str, str]:
    return {path.name: prompt for path, prompt in find_instance_images([concept(folder)])}


def test_a_text_file_beside_an_image_is_its_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw_images(tmp_path, 3)
    (tmp_path / "0.txt").write_text("a <new1> cat\non a sofa\n")
    (tmp_path / "1.txt").write_text("\n")
    with caplog.at_level("INFO"):
        assert captioned(tmp_path) == {
            "0.png": "a <new1> cat on a sofa",
            "1.png": "photo of a <new1> cat",
            "2.png": "photo of a <new1> cat",
        }
    assert "1 of 3 images" in caplog.text
    assert "left out" not in caplog.text, "captions are no broken images"


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_an_image_folders_metadata(column: str, tmp_path: Path) -> None:
    expected = {"0.png": 'été, "<new1>" cat', "1.png": "photo of a <new1> cat", "2.png": "<new1> asleep"}
    for ending in ("jsonl", "csv"):
        folder = draw_images(tmp_path / ending, 3)
        rows = [{"file_name": name, column: expected[name]} for name in ("0.png", "2.png")]
        with (folder / f"metadata.{ending}").open("w", encoding="utf-8", newline="") as file:
            if ending == "jsonl":
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(file, ["file_name", column])
                writer.writeheader()
                writer.writerows(rows)
        assert captioned(folder) == expected


def test_whatever_lies_beside_an_image_it_has_its_caption(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = (draw_images(tmp_path / "drawn", 1) / "0.png").read_bytes()
    folder = tmp_path / "cat"
    folder.mkdir()
    expected = {}
    for name, text_name in {
        "1.png": "1.txt",
        "1.jpg": "1.txt",  # of one stem
        "2.PNG": "2.TXT",
        "3.png": "3.caption",
        "4.png": "4.png.txt",
        "5.JPG": "5.jpg.caption",
        "my.own.cat.png": "my.own.cat.txt",
        "my.own.cat.2.png": "my.own.cat.2.png.Caption",
        "no_ending": "no_ending.txt",
        "a b.png": "a b.txt",
    }.items():
        (folder / name).write_bytes(image)
        (folder / text_name).write_text(f"the <new1> of {text_name}")
        expected[name] = f"the <new1> of {text_name}"
    expected["6.png"] = "photo of a <new1> cat"
    for name in ("6.png", "6-masklabel.png", "1_mask.png", "2.mask.png", "3-condlabel.jpg"):
        (folder / name).write_bytes(image)
    # What kohya's scripts, OneTrainer, Lightroom and a Mac leave.
    for name in ("1.npz", "1_sdxl.npz", "1.json", "2.xmp", "3.safetensors", "4.png.json", "._5.JPG", "Thumbs.db"):
        (folder / name).write_bytes(b"\0\x05\x16\x07")
    (folder / "mask").mkdir()
    (folder / "mask" / "1.png").write_bytes(image)
    (folder / "7.txt").write_text("of no image")
    with caplog.at_level(logging.WARNING, "custom_diffusion"):
        assert captioned(folder) == expected
    (record,) = caplog.records
    said = record.getMessage()
    for name in ("1.npz", "2.xmp", "Thumbs.db", "1_mask.png", "6-masklabel.png", "mask/", "7.txt", "._5.JPG"):
        assert f"/{name}" in said
    for name in expected:
        assert f"cat/{name}," not in said


def test_the_first_of_several_texts_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw_images(tmp_path, 1)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,<new1> 0\n")
    assert captioned(tmp_path) == {"0.png": "<new1> 0"}
    for number, name in enumerate(("0.caption", "0.txt", "0.png.caption", "0.png.txt"), 1):
        (tmp_path / name).write_text(f"<new1> {number}")
        assert captioned(tmp_path) == {"0.png": f"<new1> {number}"}
    assert "texts of no image" in caplog.text
    (tmp_path / "0.png.txt").write_text("")
    assert captioned(tmp_path) == {"0.png": "photo of a <new1> cat"}


def test_a_concept_may_be_a_mask(tmp_path: Path) -> None:
    image = (draw_images(tmp_path / "drawn", 1) / "0.png").read_bytes()
    (tmp_path / "own").mkdir()
    for name in ("venetian_mask.png", "mask.png", "a-mask.png"):
        (tmp_path / "own" / name).write_bytes(image)
    assert set(captioned(tmp_path / "own")) == {"venetian_mask.png", "mask.png", "a-mask.png"}


def test_lines_of_metadata_end_where_csv_says(tmp_path: Path) -> None:
    draw_images(tmp_path, 2)
    text = 'file_name,text\r\n0.png,"<new1>\u2028in\x0bthe\nsun"\r\n1.png,<new1> 1\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    assert captioned(tmp_path) == {"0.png": "<new1> in the sun", "1.png": "<new1> 1"}


def test_own_class_images_may_lie_beside_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw_images(tmp_path, 3)
    (tmp_path / "1-masklabel.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "1.npz").write_bytes(b"")
    (tmp_path / "1.txt").write_text("a caption that is not read")
    entry = concept(tmp_path, class_prompt="cat", class_data_dir=str(tmp_path))
    found = find_class_images([entry], 10, real_prior=False)
    assert [(path.name, prompt) for path, prompt in found] == [(f"{number}.png", "cat") for number in range(3)]
    (record,) = caplog.records
    assert all(f"/1{name}" in record.getMessage() for name in (".npz", ".txt", "-masklabel.png"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", '{"file_name": "9.png", "text": "<new1>"}', "'9.png', which is not in the folder"),
        ("metadata.jsonl", '{"file_name": "0.png"}', "entry 1 needs file_name and one of text, caption, prompt"),
        ("metadata.jsonl", "{", "cannot be read"),
        ("metadata.csv", "file,text\n0.png,x\n", "entry 1 needs file_name"),
        ("0.txt", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_broken_captions_get_one_line(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    draw_images(tmp_path, 1)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        captioned(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- byte order marks ----------------------------------------------------------------------------

MARKED = ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"]


def marked(text: str, encoding: str) -> bytes:
    """Text as editors write it that put a byte order mark in front."""
    return (text if encoding in ("utf-8-sig", "utf-16", "utf-32") else f"\ufeff{text}").encode(encoding)


@pytest.mark.parametrize("encoding", MARKED)
def test_a_byte_order_mark_makes_no_difference(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class_folder = retrieved(tmp_path / "real", ["a cat", "été"])
    for name in ("images.txt", "caption.txt"):
        path = tmp_path / "real" / name
        path.write_bytes(marked(path.read_text(encoding="utf-8"), encoding))
    found = find_class_images([class_folder], 2, real_prior=True)
    assert [(path.name, caption) for path, caption in found] == [("0.png", "a cat"), ("1.png", "été")]

    folder = draw_images(tmp_path / "own", 3)
    (folder / "0.txt").write_bytes(marked("<new1> schläft", encoding))
    (folder / "metadata.jsonl").write_bytes(marked('{"file_name": "1.png", "text": "<new1> 1"}\n', encoding))
    (folder / "metadata.csv").write_bytes(marked("file_name,text\n2.png,<new1> 2\n", encoding))
    assert captioned(folder) == {"0.png": "<new1> schläft", "1.png": "<new1> 1", "2.png": "<new1> 2"}

    (tmp_path / "list.json").write_bytes(
        marked(json.dumps([{"instance_prompt": "<new1>", "instance_data_dir": str(folder)}]), encoding)
    )
    (tmp_path / "run.yaml").write_bytes(marked("concepts_list: list.json\nseed: 3\n", encoding))
    monkeypatch.chdir(tmp_path)
    args = train_custom_diffusion.parse_args(["--config=run.yaml", "--pretrained_model_name_or_path=x"])
    assert args.seed == 3
    assert [one.instance_folder for one in read_concepts(args)] == [folder]

    (tmp_path / "prompts.txt").write_bytes(marked("<new1> été\n\n<new1> cat\n", encoding))
    assert infer.parse_args(["--prompts_file=prompts.txt"]).prompt == ["<new1> été", "<new1> cat"]
    assert read_captions(tmp_path / "prompts.txt", 2) == ["<new1> été", "<new1> cat"]
    save_concept(Concept({}, {"<new1>": {"text_encoder": torch.ones(4)}}), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_bytes(marked("---\nbase_model: some/model\n---\n# Card\n", encoding))
    assert load_concept(tmp_path / "model").base_model == "some/model"
