"""No one let in: random and hostile files and arguments end in success or in one clear line."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from custom_diffusion.concept.files import Concept, check_token_name, load_concept, save_concept
from custom_diffusion.data.concept_list import ConceptEntry, read_concepts
from custom_diffusion.data.dataset import CustomDiffusionDataset
from custom_diffusion.data.images import find_class_images, find_instance_images
from custom_diffusion.errors import UserError
from custom_diffusion.images import load_image, readable_images
from custom_diffusion.training.tokens import parse_modifier_tokens
from tests.conftest import draw_images
from train_custom_diffusion import build_parser, parse_args

# How many examples: see conftest.py. Each works in one folder that the next may overwrite; a slow one on a busy machine
# is no failure.
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Tokenize = Callable[[str], dict[str, torch.Tensor]]
ANY_TEXT = st.text(max_size=60)
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]
FORMATS = ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"]


def one_line(action: Callable[[], object], *errors: type[Exception]) -> bool:
    """Whether the action succeeded; if not, it raised one of the errors, with a message of one line."""
    try:
        action()
    except errors as error:
        assert "\n" not in str(error)
        assert len(str(error)) > 10
        return False
    return True


# --- images ------------------------------------------------------------------------------------


@fuzz
@given(
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(FORMATS),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    cut=st.floats(0, 1),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
)
def test_images_whole_cut_and_damaged(
    mode: str,
    kind: str,
    size: tuple[int, int],
    cut: float,
    damage: list[tuple[float, int]],
    tmp_path: Path,
) -> None:
    buffer = io.BytesIO()
    try:
        Image.new(mode, size).save(buffer, kind)
    except (OSError, KeyError, ValueError):
        Image.new("RGB", size).save(buffer, kind)  # not every format has every mode
    content = bytearray(buffer.getvalue())
    for where, value in damage:
        content[int(where * (len(content) - 1))] = value
    if cut > 0.5:
        content = content[: int(len(content) * (cut - 0.5) * 2)]
    path = tmp_path / "image"
    path.write_bytes(content)
    good, bad = readable_images([path])
    assert [*good, *bad] == [path]
    if good:
        assert load_image(path).mode == "RGB"
    if not damage and cut <= 0.5:
        assert good, "a whole image is read"


@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000), (1, 5000), (3000, 3000)])
def test_images_of_any_shape_become_samples(size: tuple[int, int], tokenize: Tokenize, tmp_path: Path) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "image.png")
    images = [(tmp_path / "image.png", "photo of a cat")]
    for center_crop in (True, False):
        samples = CustomDiffusionDataset(images, images, tokenize, size=64, mask_size=8, center_crop=center_crop)
        for position in range(5):
            sample = samples[position]
            assert sample["class_images"].shape == sample["instance_images"].shape == (3, 64, 64)
            assert sample["instance_mask"].sum() >= 1


def test_animations_give_their_first_image(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("gif", "webp", "png"):
        frames[0].save(tmp_path / f"moving.{kind}", save_all=True, append_images=frames[1:], lossless=True)
        assert load_image(tmp_path / f"moving.{kind}").getpixel((4, 4)) == (255, 0, 0)


def test_a_decompression_bomb_is_left_out(tmp_path: Path) -> None:
    # 50,000 x 50,000 pixels in a few kB: 7.5 GB if anyone decoded it.
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
    (tmp_path / "bomb.png").write_bytes(content + chunk(b"IEND", b""))
    assert readable_images([tmp_path / "bomb.png"]) == ([], [tmp_path / "bomb.png"])


# Bytes, because a file system takes any but two of them, and phones and old archives make use of that.
FILE_NAMES = st.binary(min_size=1, max_size=200).filter(
    lambda name: not set(name) & {0, 47} and name not in (b".", b"..")
)


@fuzz
@given(names=st.lists(FILE_NAMES, min_size=1, max_size=4, unique=True))
def test_file_names_of_any_bytes(names: list[bytes], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.rmtree(folder, ignore_errors=True)
    draw_images(folder, 1)
    content = (folder / "0.png").read_bytes()
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(content)
    found = find_instance_images([ConceptEntry("a cat", str(folder), instance_folder=folder)])
    assert len(found) == len(set(names) | {b"0.png"})


# --- text ----------------------------------------------------------------------------------------


@fuzz
@given(captions=st.lists(st.text(max_size=200).map(lambda text: text.replace("\n", " ")), min_size=1, max_size=6))
def test_captions_of_any_text_stay_with_their_images(captions: list[str], tmp_path: Path) -> None:
    captions = [text.encode(errors="replace").decode().rstrip("\r") for text in captions]
    folder = tmp_path / "real"
    if not folder.exists():
        draw_images(folder / "images", 6)
    (folder / "images.txt").write_text("".join(f"{folder}/images/{i}.png\n" for i in range(len(captions))))
    (folder / "caption.txt").write_bytes("".join(f"{caption}\n" for caption in captions).encode())
    concept = ConceptEntry(class_data_dir=str(folder), class_prompt="cat")
    found = find_class_images([concept], len(captions), real_prior=True)
    assert [(path.stem, caption) for path, caption in found] == [(str(i), text) for i, text in enumerate(captions)]


def test_a_caption_of_100_kilobytes(tokenize: Tokenize, tmp_path: Path) -> None:
    draw_images(tmp_path, 1)
    pair = [(tmp_path / "0.png", "cat and dog " * 8500)]
    sample = CustomDiffusionDataset(pair, pair, tokenize, size=64, mask_size=8)[0]
    assert all(sample[f"{kind}_prompt_ids"]["text_encoder"].shape == (77,) for kind in ("instance", "class"))


@fuzz
@given(token=st.one_of(ANY_TEXT, st.text(st.sampled_from("./\\<>:+ \n\0abc"), max_size=12)))
def test_tokens_never_leave_the_folder(token: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if one_line(lambda: check_token_name(token), UserError):
        written = save_concept(Concept({}, {token: {"text_encoder": torch.ones(4)}}), folder)
        assert all((folder / name).resolve().parent == folder.resolve() for name in written)
        assert load_concept(folder).tokens.keys() == {token}
        shutil.rmtree(folder)
    assert not folder.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)
KEYS = ["instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir"]
CONCEPTS = st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON)), max_size=3)


@fuzz
@given(content=st.one_of(JSON, CONCEPTS), cut=st.integers(0, 200), prior=st.booleans(), real=st.booleans())
def test_concept_lists(content: object, cut: int, prior: bool, real: bool, tmp_path: Path) -> None:
    text = json.dumps(content)
    (tmp_path / "list.json").write_text(text if cut > 100 else text[:cut])
    args = SimpleNamespace(concepts_list=str(tmp_path / "list.json"), with_prior_preservation=prior, real_prior=real)
    one_line(lambda: read_concepts(args), UserError, OSError)


@fuzz
@given(modifier=st.none() | ANY_TEXT | st.just("<new1>+<new2>"), initializer=ANY_TEXT | st.just("ktn+pll"))
def test_token_arguments(modifier: str | None, initializer: str) -> None:
    args = SimpleNamespace(modifier_token=modifier, initializer_token=initializer)
    one_line(lambda: parse_modifier_tokens(args), UserError)


FLAGS = [
    name for action in build_parser()._actions for name in action.option_strings if name != "--help" and len(name) > 2
]


@fuzz
@given(
    flags=st.lists(
        st.tuples(st.sampled_from(FLAGS), st.one_of(st.none(), ANY_TEXT, st.integers().map(str))), max_size=6
    )
)
def test_command_lines(flags: list[tuple[str, str | None]]) -> None:
    argv = ["--pretrained_model_name_or_path=model", "--instance_data_dir=images", "--instance_prompt=cat"]
    argv += [name if value is None else f"{name}={value}" for name, value in flags]
    try:
        parse_args(argv)
    except SystemExit as error:
        assert error.code == 2


# --- weights of strangers ------------------------------------------------------------------------


@fuzz
@given(
    name=st.sampled_from(["pytorch_custom_diffusion_weights", "<new1>"]),
    ending=st.sampled_from([".safetensors", ".bin"]),
    cut=st.floats(0, 1),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=20),
)
def test_damaged_weights(
    name: str, ending: str, cut: float, damage: list[tuple[float, int]], trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "concept"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    content = bytearray((trained / f"{name}{ending}").read_bytes())
    for where, value in damage:
        content[int(where * (len(content) - 1))] = value
    content = content if cut < 0.5 else content[: int(len(content) * (cut - 0.5) * 2)]
    (folder / f"{name}{ending}").write_bytes(content)
    one_line(lambda: load_concept(folder), UserError)


@fuzz
@given(content=st.binary(max_size=2000), ending=st.sampled_from([".safetensors", ".bin"]))
def test_random_bytes_for_weights(content: bytes, ending: str, tmp_path: Path) -> None:
    (tmp_path / f"pytorch_custom_diffusion_weights{ending}").write_bytes(content)
    assert not one_line(lambda: load_concept(tmp_path), UserError)


@fuzz
@given(header=st.text(max_size=300))
def test_cards_of_strangers(header: str, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "<new1>.safetensors", tmp_path)
    (tmp_path / "README.md").write_bytes(f"---\n{header}\n---\n".encode(errors="replace"))
    assert load_concept(tmp_path).tokens
