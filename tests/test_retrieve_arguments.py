"""Wrong input to retrieve.py, its help, and its benchmark."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

import retrieve
from tests.retrieval_web import SCRIPT, command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --class_prompt"),
        (["--class_prompt", "cat", "--concepts_list", "x.json"], "give either"),
        (["--class_prompt", "cat", "--num_class_images", "0"], "--num_class_images: 0 is less than 1"),
        (["--class_prompt", "cat", "--num_class_images", "many"], "invalid whole number value: 'many'"),
        (["--class_prompt", "cat", "--indice_name", "x"], "--indice_name means something only to --source clip"),
        (["--class_prompt", "cat", "--url", "http://x", "--path", "y"], "two different sources"),
        (["--class_prompt", "cat", "--source", "clip-retrieval"], "needs the --url"),
        (["--class_prompt", "cat", "--source", "local"], "needs a --path"),
        (["--class_prompt", "cat", "--url", "localhost:1234"], "no http(s) address"),
        (["--class_prompt", "cat", "--url", "http://[x"], "is no address"),
        (["--class_prompt", "cat", "--path", "nowhere"], "there is no folder or tar 'nowhere'"),
        (["--class_prompt", " "], "has no text to search for"),
        (["--class_prompt", "///", "--path", "."], "makes no name for a folder"),
        (["--class_prompt", "cat", "--class_data_dir", "a\nb", "--path", "."], "no name of a folder"),
        (["--class_prompt", "cat", "--max_size", "100"], "less than --min_size"),
        (["--class_prompt", "cat", "--timeout", "0"], "0 is not a finite number above 0"),
        (["--class_prompt", "cat", "--contact", "a\nb"], "--contact goes into a header"),
        (["--class_prompt", "cat", "--class_data_dir", "/dev/null/x", "--path", "."], "cannot be written to"),
        (["--concepts_list", "nowhere.json"], "cannot be read: No such file"),
        (["--concepts_list", "broken.json"], "is no valid JSON"),
        (["--concepts_list", "empty.json"], "must hold a list"),
        (["--concepts_list", "nameless.json"], "nameless.json, concept 2: class_prompt has no text"),
        (["--concepts_list", "twice.json"], "would get two classes, 'cat' and 'dog'"),
    ],
)
def test_wrong_input_is_one_clear_line(tmp_path, arguments, message, monkeypatch, capsys):
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "nameless.json").write_text('[{"class_prompt": "cat"}, {"instance_prompt": "a cat"}]')
    twice = [{"class_prompt": prompt, "class_data_dir": "x"} for prompt in ("cat", "dog")]
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises((retrieve.UserError, SystemExit)) as caught:
        retrieve.main(arguments)
    told = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert message in told.splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before


def test_the_benchmark_runs():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.retrieve", "--number", "4", "--latency", "0"],
        cwd=SCRIPT.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "retrieve.py:" in result.stdout, result.stderr


def test_help_needs_no_torch():
    result = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
    assert "examples:" in result.stdout
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, retrieve; print('torch' in sys.modules)"],
        capture_output=True, text=True, cwd=SCRIPT.parent, check=True,
    )  # fmt: skip
    assert modules.stdout.strip() == "False"
