"""--config: the same flags from a file, checked like the command line; and what --help says of defaults."""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import evaluate
import export
import infer
import merge
import retrieve
import train_custom_diffusion
from custom_diffusion.command_line import HelpFormatter, save_config
from custom_diffusion.concept.files import load_concept
from tests.conftest import flags

NEEDED = {
    "pretrained_model_name_or_path": "some/model",
    "instance_data_dir": "./cat",
    "instance_prompt": "photo of a <new1> cat",
}


def parse(tmp_path: Path, content: object, *argv: str) -> object:
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    (tmp_path / "run.yaml").write_text(text)
    return train_custom_diffusion.parse_args(["--config", str(tmp_path / "run.yaml"), *argv])


def test_the_file_stands_for_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    args = parse(tmp_path, NEEDED | {"hflip": True, "noaug": False, "learning_rate": 5e-6, "seed": 3}, "--seed=4")
    assert args.pretrained_model_name_or_path == "some/model", "required flags may be in the file"
    assert (args.hflip, args.noaug, args.learning_rate, args.seed) == (True, False, 5e-6, 4)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    # YAML takes 1e-5 for text; the flag's own type does not.
    text = "".join(f"{name}: {value}\n" for name, value in NEEDED.items()) + "learning_rate: 1e-5\nmax_train_steps:\n"
    args = parse(tmp_path, text)
    assert (args.learning_rate, args.max_train_steps) == (1e-5, None)


def test_what_is_saved_is_what_was_used_without_secrets(tmp_path: Path) -> None:
    argv = [*flags(tmp_path, tmp_path, tmp_path, hflip=True, mixed_precision="bf16"), "--hub_token=hf_secret"]
    args = train_custom_diffusion.parse_args(argv)
    save_config(args, tmp_path / "config.yaml")
    assert "hf_secret" not in (tmp_path / "config.yaml").read_text()
    again = train_custom_diffusion.parse_args(["--config", str(tmp_path / "config.yaml")])
    different = {name for name, value in vars(args).items() if getattr(again, name) != value}
    assert different == {"hub_token", "config"}


def test_a_training_run_is_repeated_by_its_file(base_model: Path, images: Path, tmp_path: Path) -> None:
    train_custom_diffusion.main(flags(base_model, images, tmp_path / "one", learning_rate=1e-2, seed=9))
    argv = ["--config", str(tmp_path / "one" / "config.yaml"), "--output_dir", str(tmp_path / "two")]
    train_custom_diffusion.main(argv)
    one, two = load_concept(tmp_path / "one"), load_concept(tmp_path / "two")
    assert all(value.equal(two.attention[key]) for key, value in one.attention.items())
    assert one.tokens["<new1>"]["text_encoder"].equal(two.tokens["<new1>"]["text_encoder"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (NEEDED | {"learning_rat": 1}, "'learning_rat' is no flag; learning_rate?"),
        (NEEDED | {"seed": "many"}, "--seed: invalid whole number value: 'many'"),
        (NEEDED | {"freeze_model": "all"}, "--freeze_model: invalid choice: 'all'"),
        (NEEDED | {"seed": [1, 2]}, "'seed' takes one value"),
        (NEEDED | {"hflip": "perhaps"}, "'perhaps' is neither True nor False"),
        ("- a list", "must hold flags and their values"),
        ("a: [1", "is no valid YAML, see its line"),
    ],
)
def test_a_mistake_in_the_file_gets_one_line(
    content: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(tmp_path, content)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_custom_diffusion.parse_args(["--config", "nowhere.yaml"])
    assert "--config 'nowhere.yaml' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "default"),
    [
        (train_custom_diffusion, "(default: ktn+pll+ucd)"),
        (infer, "(default: custom-diffusion-model)"),
        (merge, "(default: 500)"),
        (export, "(default: custom-diffusion-model)"),
        (retrieve, "(default: 200)"),
    ],
)
def test_help_names_the_defaults_that_say_something(
    command: object, default: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # so that no line is broken
    with pytest.raises(SystemExit) as caught:
        command.parse_args(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and default in text
    for nothing in ("None", "False", "[]", ""):
        assert f"(default: {nothing})" not in text


def test_zero_is_a_default_like_others() -> None:
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    for number, default in enumerate((0, 0.0, True, ["a", "100%"], None, False, "", [])):
        parser.add_argument(f"--flag{number}", default=default, help=f"Help{number}.")
    text = parser.format_help()
    for number, shown in enumerate(("0", "0.0", "True", "a 100%")):
        assert f"Help{number}. (default: {shown})" in text
    assert text.count("(default") == 4


@pytest.mark.parametrize("command", [train_custom_diffusion, infer])
def test_a_pipe_is_read_once_and_its_flags_stay(command: Any, tmp_path: Path) -> None:
    """Commands parse their flags twice: before and after the libraries are loaded."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("seed: 3\n"), daemon=True)
    writer.start()
    argv = ["--config", str(pipe), "--pretrained_model_name_or_path", "x"]
    argv += ["--prompt", "x"] if command is infer else ["--instance_data_dir", "x", "--instance_prompt", "x"]
    assert [command.parse_args(argv).seed for _ in range(2)] == [3, 3]
    writer.join()


def test_prompts_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("a <new1> cat\n"), daemon=True)
    writer.start()
    assert [infer.parse_args(["--prompts_file", str(pipe)]).prompt for _ in range(2)] == [["a <new1> cat"]] * 2
    writer.join()


def test_a_date_that_no_calendar_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("output_dir: 2024-06-31\n")
    with pytest.raises(SystemExit):
        infer.parse_args(["--prompt", "x", "--config", str(tmp_path / "run.yaml")])
    assert "is no valid YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag", "value", "message"),
    [
        (infer, "seed", "-1", "is not between 0 and 2^32 - 1"),
        (infer, "seed", str(2**64), "is not between 0 and 2^32 - 1"),
        (infer, "num_inference_steps", "1000", "is not between 1 and 999"),
        (infer, "guidance_scale", "nan", "is not a finite number"),
        (infer, "scale", "inf", "is not a finite number"),
        (infer, "eta", "1.5", "is not between 0 and 1"),
        (evaluate, "guidance_scale", "1e400", "is not a finite number"),
        (evaluate, "num_inference_steps", "0", "is not between 1 and 999"),
        (train_custom_diffusion, "class_image_steps", "1001", "is not between 1 and 999"),
        (train_custom_diffusion, "seed", str(2**32), "is not between 0 and 2^32 - 1"),
        (retrieve, "aesthetic_weight", "nan", "is not a finite number"),
        (retrieve, "timeout", "inf", "is not a finite number above 0"),
    ],
)
def test_numbers_out_of_range(
    command: Any, flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parse_args([f"--{flag}={value}"])
    assert f"--{flag}" in (errors := capsys.readouterr().err) and message in errors
