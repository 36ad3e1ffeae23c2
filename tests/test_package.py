"""What `pip install` gives: a wheel of the package alone, which works from any directory."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import custom_diffusion
from tests.conftest import ROOT, MakeOnce, run_script

EXTRAS = {
    "wandb",
    "comet",
    "datasets",
    "8bit",
    "prodigy",
    "quantize",
    "xformers",
    "report",
    "evaluation",
    "tools",
    "dev",
}


def build(folder: Path) -> None:
    # A copy: building leaves files beside what it builds, and takes up what lies there from before.
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "base", "designs", "results")
    shutil.copytree(ROOT, folder / "clone", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*pip, folder / "clone"], check=True, cwd=folder)


@pytest.fixture(scope="session")
def wheel(make_once: MakeOnce) -> Path:
    """The wheel, built from a copy of the clone."""
    (found,) = make_once("wheel", build).glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, make_once: MakeOnce) -> Path:
    """The Python of a new environment that holds the wheel; the libraries are those of the environment of the tests."""

    def install(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, wheel], check=True)
        (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        (site / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")

    return make_once("installed", install) / "venv" / "bin" / "python"


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "custom_diffusion").rglob("*.py")}
    data = {"py.typed", "concept/regularization.txt", "evaluation/objects.txt", "evaluation/living_things.txt"}
    data = {f"custom_diffusion/{name}" for name in data}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == modules | data
        for name in data:
            assert archive.read(name) == (ROOT / name).read_bytes()
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def test_its_metadata_say_what_is_needed(wheel: Path) -> None:
    said = metadata(wheel)
    assert wheel.name == f"custom_diffusion-{custom_diffusion.__version__}-py3-none-any.whl"
    assert said["Requires-Python"] == ">=3.11"
    assert said["License-Expression"] == "Apache-2.0"
    assert set(said.get_all("Provides-Extra")) == EXTRAS
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    asked = {spelled(line) for line in lines if line}
    assert {spelled(line) for line in said.get_all("Requires-Dist") if "extra ==" not in line} == asked


def spelled(requirement: str) -> tuple[str, frozenset[str]]:
    """Name and bounds of a requirement, however they are ordered."""
    name = requirement.replace(">", "<").partition("<")[0].strip()
    return name.lower(), frozenset(requirement.removeprefix(name).split(","))


def test_every_extra_that_a_message_names_is_there() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert set(extras) == EXTRAS
    sources = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for folder in ("custom_diffusion", "tools", "base", "benchmarks"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        for named in re.findall(r"pip install .{0,20}\.\[([\w,]+)\]", text):
            assert set(named.split(",")) <= EXTRAS, path
        # The one file beside requirements.txt is for another environment.
        assert set(re.findall(r"requirements-[\w-]+\.txt", text)) <= {"requirements-clip-retrieval.txt"}, path


USE = """
import pathlib, sys
import custom_diffusion
assert not {"torch", "diffusers", "transformers"} & {*sys.modules}, "nothing is imported before it is used"
from custom_diffusion import Concept, UserError, apply_concepts, load_concept, save_concept
assert pathlib.Path(custom_diffusion.__file__).is_relative_to(sys.prefix), custom_diffusion.__file__
import torch
save_concept(Concept({}, {"<new1>": {"text_encoder": torch.ones(4)}}), pathlib.Path("concept"))
assert load_concept("concept").tokens["<new1>"]["text_encoder"].equal(torch.ones(4))
try:
    load_concept("nowhere")
except UserError as error:
    print(error)
captions = pathlib.Path(custom_diffusion.__file__).parent / "concept" / "regularization.txt"
assert len(captions.read_text().splitlines()) >= 1000
"""


def test_it_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    result = run_script(installed, "-c", USE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("there is no folder 'nowhere'")


TYPED = """
from custom_diffusion import Concept, apply_concepts, load_concept

concept: Concept = load_concept("my-cat")
print(concept.base_model, len(concept.tokens))
load_concept(1)
"""


def test_it_is_typed(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(TYPED)
    # Of the libraries, which take minutes, nothing is needed here.
    libraries = "mypy-torch.*,transformers.*,diffusers.*,huggingface_hub.*,PIL.*,numpy.*"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports = true\n[{libraries}]\nfollow_imports = skip\n")
    result = run_script("python", "-m", "mypy", "--python-executable", installed, "use.py", cwd=tmp_path)
    (error,) = (line for line in result.stdout.splitlines() if "error:" in line)
    assert error.startswith('use.py:6: error: Argument 1 to "load_concept" has incompatible type "int"')
