"""infer.py, merge.py and export.py as commands: one line whatever stops them, and nothing half done."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

import export
import infer
import merge
from custom_diffusion.command_line import run
from tests.conftest import ROOT, run_script

COMMANDS = {"infer": infer, "merge": merge, "export": export}


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A concept of its own, to be broken."""
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*", "logs", "*.bin"))
    return tmp_path / "model"


def arguments(name: str, model: Path, output: Path, *more: str) -> list[str]:
    """A command line that works, quickly."""
    own = {
        "infer": ["--prompt", "<new1> cat", "--num_inference_steps", "1"],
        "merge": ["--prior_weight", "1", "--num_captions", "50"],
        "export": ["--format", "delta"],
    }[name]
    return [*own, "--model_dir", str(model), "--output_dir", str(output), *more]


def fails(command: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command as its file does; gives its exit code and the line that it ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(lambda: command.main(argv))
    said = capsys.readouterr().err.strip().splitlines()
    if isinstance(caught.value.code, str):  # what Python prints when it exits
        return 1, caught.value.code
    return int(caught.value.code or 0), said[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_while_the_libraries_load(name: str, tmp_path: Path) -> None:
    for library in ("torch", "diffusers", "transformers"):
        (tmp_path / f"{library}.py").write_text("raise KeyboardInterrupt")
    argv = arguments(name, tmp_path, tmp_path / "out")
    result = run_script("python", ROOT / f"{name}.py", *argv, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert result.stderr == "interrupted\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_leaves_one_line_and_the_same_command_works(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = arguments(name, model, tmp_path / "out")
    with monkeypatch.context() as patch:
        # When the configuration is saved: merge.py and export.py have written their results by then.
        patch.setattr(COMMANDS[name], "save_config", interrupt)
        assert fails(COMMANDS[name], argv, capsys) == (130, "interrupted: run the same command again")
    COMMANDS[name].main(argv)
    assert len(list((tmp_path / "out").iterdir())) >= 2


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("name", "more", "file"),
    [
        ("infer", [], "00000_new1-cat_seed42.png"),
        ("merge", [], "pytorch_custom_diffusion_weights.safetensors"),
        ("export", [], "delta.bin"),
        ("export", ["--format=lora", "--energy=1"], "out.safetensors"),
        ("export", ["--format=pipeline"], ""),
    ],
)
def test_a_full_disk(
    name: str, more: list[str], file: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(name, model, tmp_path / "out", *more)
    with small_disk(5_000):
        code, line = fails(COMMANDS[name], argv, capsys)
    assert code == 1
    assert line.startswith("error: ") and str(tmp_path / "out" / file) in line and "File too large" in line
    assert "\n" not in line
    if name != "infer":
        assert not (tmp_path / "out").exists(), "half a result would be in the way of the same command"
    COMMANDS[name].main(argv)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("broken", ["<new1>.safetensors", "pytorch_custom_diffusion_weights.safetensors"])
def test_a_file_that_cannot_be_read(
    name: str, broken: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / broken).unlink()
    (model / broken).mkdir()  # reading it fails for everybody, root included
    code, line = fails(COMMANDS[name], arguments(name, model, tmp_path / "out"), capsys)
    assert code == 1
    assert line.startswith(f"error: {model / broken} cannot be read")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_cannot_be_read(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(model))

    monkeypatch.setattr(Path, "glob", refuse)
    code, line = fails(COMMANDS[name], arguments(name, model, tmp_path / "out"), capsys)
    assert (code, line) == (1, f"error: {model}: Permission denied")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_to_do(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match=r"error: there is not enough memory \(.+\): give a smaller --batch_size"):
        run(main, needs_memory="give a smaller --batch_size")
    with pytest.raises(RuntimeError, match="another"):
        run(lambda: (_ for _ in ()).throw(RuntimeError("another")))
