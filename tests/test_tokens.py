"""New words and prompts: names are compared as the tokenizer reads them, and what it cuts off is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import train_custom_diffusion
from custom_diffusion.errors import UserError
from tests.conftest import draw_images, flags

LONG = "a photo of " + "very " * 68  # with "cat" behind it, as long as the text encoder reads


class Checked(Exception):
    """Everything that is read first is read and checked."""


@pytest.fixture
def check(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    train_here: Callable[[list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., None]:
    """Runs the command up to where it would begin to write; gives nothing, or raises what is wrong."""

    def stop(*_: object) -> None:
        raise Checked

    monkeypatch.setattr(train_custom_diffusion, "open_output_dir", stop)

    def run(**more: object) -> None:
        try:
            train_here(flags(base_model, images, tmp_path / "out", **more))
        except Checked:
            return

    return run


def captioned(folder: Path, *captions: str) -> Path:
    draw_images(folder, len(captions))
    for number, caption in enumerate(captions):
        (folder / f"{number}.txt").write_text(caption)
    return folder


def two_concepts(tmp_path: Path, images: Path, *prompts: str) -> Path:
    entries = [{"instance_prompt": prompt, "instance_data_dir": str(images)} for prompt in prompts]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(entries))
    return path


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("Cat", "'Cat' is in the tokenizer's vocabulary already, as 'cat'"),
        ("CATEGORY", "as 'category'"),
        ("KTN", "as 'ktn'"),  # an entry only inside words
        ("\u212aTN", "as 'ktn'"),  # the sign of the unit kelvin folds to k
        ("E\u0301", "as 'é'"),  # an accent of its own folds to the letter that has it
        ("<|STARTOFTEXT|>", "vocabulary already"),
        ("cat", "'cat' is in the tokenizer's vocabulary already; take another"),
        ("<New1>+<new1>", "'<New1>' and '<new1>' are the same word to the tokenizer"),
        ("<new1>+<new2>+<NEW2>", "'<new2>' and '<NEW2>' are the same word"),
        ("<É>+<é>", "are the same word"),
    ],
)
def test_a_name_that_the_tokenizer_knows_or_cannot_tell_apart_is_refused(
    token: str, words: str, check: Callable[..., None]
) -> None:
    prompt = f"photo of a {token.replace('+', ' ')} cat"
    with pytest.raises(UserError) as caught:
        check(modifier_token=token, instance_prompt=prompt)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("token", "prompt"),
    [
        ("<new1>", "photo of a <NEW1> cat"),
        ("<New1>", "photo of a <new1> cat"),
        ("<new1>", "photo of a <new1>cat"),
        ("<É>", "photo of a <e\u0301> cat"),
        ("<new1>+<new1>b", "photo of a <new1> cat and a <new1>b dog"),
    ],
)
def test_a_prompt_names_a_token_in_any_form_that_the_tokenizer_reads_alike(
    token: str, prompt: str, check: Callable[..., None]
) -> None:
    check(modifier_token=token, instance_prompt=prompt)


def test_a_token_that_only_begins_a_longer_one_is_not_named(check: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="'<new1>' is in no instance prompt"):
        check(modifier_token="<new1>+<new1>b", instance_prompt="photo of a <new1>b cat")


def test_a_token_that_the_tokenizer_does_not_find_is_an_error(check: Callable[..., None]) -> None:
    # Special tokens are looked for first, and leave nothing of this one.
    token = "x<|endoftext|>"
    with pytest.raises(UserError, match=r"does not find the modifier token .* in the instance prompt"):
        check(modifier_token=token, instance_prompt=f"photo of a {token} cat")


def test_captions_are_read_as_the_tokenizer_reads_them(tmp_path: Path, check: Callable[..., None]) -> None:
    folder = captioned(tmp_path / "good", "a <NEW1> cat", "the <new1>cat", "<new1>")
    check(instance_data_dir=folder)
    folder = captioned(tmp_path / "bad", "a <new1> cat", "a < new1 > cat", "a cat")
    with pytest.raises(UserError, match=r"the captions of 1\.png, 2\.png do not hold <new1>: write it"):
        check(instance_data_dir=folder)
    check(instance_data_dir=folder, modifier_token=None)


def test_a_caption_needs_a_token_of_its_own_concept(tmp_path: Path, images: Path, check: Callable[..., None]) -> None:
    more = {"modifier_token": "<new1>+<new2>", "instance_data_dir": None, "instance_prompt": None}
    folder = captioned(tmp_path / "captioned", "a <new2> cat")
    prompts = ("a <new1> cat", "a <new2> dog")
    concepts = two_concepts(tmp_path, images, *prompts)
    check(concepts_list=concepts, **more)
    entries = json.loads(concepts.read_text())
    entries[0]["instance_data_dir"] = str(folder)
    concepts.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"captions of 0\.png do not hold <new1>"):
        check(concepts_list=concepts, **more)
    # In one folder an image may be of either.
    concepts = two_concepts(tmp_path, folder, *prompts)
    check(concepts_list=concepts, **more)


def test_class_images_that_would_train_the_token_are_named(
    tmp_path: Path, check: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    prior = {"with_prior_preservation": True, "class_data_dir": tmp_path / "class", "num_class_images": 1}
    check(**prior, class_prompt="a cat")
    assert "class images will train" not in caplog.text
    check(**prior, class_prompt="a <NEW1> cat")
    assert "train the modifier tokens too, which stand in the class prompt 'a <NEW1> cat'" in caplog.text


# --- what is cut off -----------------------------------------------------------------------------


def test_a_token_behind_the_cut_is_an_error_that_names_the_file(tmp_path: Path, check: Callable[..., None]) -> None:
    folder = captioned(tmp_path / "long", "a <new1> cat", f"{LONG} {LONG} <new1> cat")
    with pytest.raises(UserError) as caught:
        check(instance_data_dir=folder)
    message = str(caught.value)
    assert f"'<new1>' comes after the first 75 tokens of the caption of {str(folder / '1.png')!r}" in message
    assert "augmentation" not in message


def test_the_augmentations_words_count(tmp_path: Path, check: Callable[..., None]) -> None:
    # "a photo of", 68 times "very" and the token are 72 tokens; "a far away" makes them 75, and a word more 76.
    check(instance_prompt=f"{LONG}<new1>")
    check(instance_prompt=f"{LONG}very very very <new1>", noaug=True)
    with pytest.raises(UserError) as caught:
        check(instance_prompt=f"{LONG}very <new1>")
    assert "of the instance prompt 'a photo of very" in str(caught.value)
    assert "(with 'a far away' before them, as the augmentation writes)" in str(caught.value)


def test_every_token_of_a_prompt_has_to_survive(check: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="'<new2>' comes after"):
        check(modifier_token="<new1>+<new2>", instance_prompt=f"<new1> {LONG} <new2>")


def test_a_validation_prompt_that_loses_the_token_is_an_error(check: Callable[..., None]) -> None:
    with pytest.raises(UserError, match="75 tokens of --validation_prompt 'a photo of"):
        check(validation_prompt=f"{LONG} {LONG} <new1> cat")


def test_other_text_that_is_cut_gets_one_warning(
    tmp_path: Path, check: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = captioned(tmp_path / "long", f"<new1> {LONG} cat", "<new1> cat", f"<new1> {LONG} {LONG}")
    prior = {
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": f"cat {LONG} {LONG}",
    }
    check(instance_data_dir=folder, noaug=True, **prior)
    (warning,) = [record.getMessage() for record in caplog.records if "cuts" in record.getMessage()]
    assert "reads 75 tokens" in warning
    assert str(folder / "2.png") in warning
    assert str(folder / "0.png") not in warning, "74 tokens fit"
    assert "the class prompt 'cat a photo" in warning


def test_captions_of_real_class_images_that_are_cut(
    tmp_path: Path, check: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "class"
    draw_images(folder / "images", 5)
    captions = ["a cat", *[f"{number} {LONG} {LONG}" for number in range(4)]]
    (folder / "images.txt").write_text("".join(f"{folder}/images/{number}.png\n" for number in range(5)))
    (folder / "caption.txt").write_text("".join(f"{caption}\n" for caption in captions))
    prior = {"with_prior_preservation": True, "real_prior": True, "class_prompt": "cat", "class_data_dir": folder}
    check(**prior, num_class_images=5)
    (warning,) = [record.getMessage() for record in caplog.records if "cuts" in record.getMessage()]
    assert warning.count("the caption of") == 3
    assert warning.endswith("and 1 more")


def test_prompts_that_fit_are_not_spoken_of(check: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    check(validation_prompt="<new1> cat")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
