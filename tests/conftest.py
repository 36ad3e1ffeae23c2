"""What the tests share: small random models of the exact layout, images, and real launches of the scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTokenizer

    from custom_diffusion.training.run import Run

# torch and what needs it are imported where they are used: tests that need neither begin at once.

ROOT = Path(__file__).resolve().parent.parent

# How many cases the tests of test_fuzz.py try each: `make test` takes the first, `make test-all` the second.
settings.register_profile("few", max_examples=40)
settings.register_profile("many", max_examples=500)
settings.load_profile("few")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist: one worker gets the tests that share a module's fixtures, and these begin first."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        definitions = item._fixtureinfo.name2fixturedefs.values()
        if any(found[-1].scope == "module" for found in definitions):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    # Groups come before single tests, which fill what is left of either worker's time.
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("long", "xdist_group")])


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a case of bytes by its argument and number: what a library writes into a file may change by the second.

    Names that differ between the two workers of pytest-xdist end the run before its first test.
    """
    return argname if isinstance(val, bytes) else None


def pytest_collection_finish(session: pytest.Session) -> None:
    """Notice a pytest whose tests pytest-xdist cannot group, so that workers make each module's fixtures twice."""
    if not session.config.getoption("loadgroup", False):
        return
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group") is not None]
    assert all("@" in item.nodeid for item in grouped), "this pytest-xdist cannot group the tests of this pytest"


def run_script(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, with this Python's programs; gives its exit code and what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1800,
    )


def launch(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run train_custom_diffusion.py, which has to succeed; test_documentation.py does it by ``accelerate launch``."""
    result = run_script("python", ROOT / "train_custom_diffusion.py", *arguments, **environment)
    assert result.returncode == 0, result.stderr[-5000:]
    return result


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Makes a folder of a name with a function of its path, once for all of pytest-xdist's workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in it

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


def random_model(shape: str, folder: Path) -> None:
    from benchmarks.random_model import build_random_model

    build_random_model(shape, folder)


@pytest.fixture(scope="session")
def base_model(make_once: MakeOnce) -> Path:
    """Stable Diffusion 1.x in small, with random weights and CLIP's real vocabulary."""
    return make_once("tiny", lambda folder: random_model("tiny", folder))


@pytest.fixture(scope="session")
def base_model_v(make_once: MakeOnce) -> Path:
    """Stable Diffusion 2.x in small: another width, and velocity is predicted."""
    return make_once("tiny-v", lambda folder: random_model("tiny-v", folder))


@pytest.fixture(scope="session")
def base_model_xl(make_once: MakeOnce) -> Path:
    """Stable Diffusion XL in small: two text encoders, pooled features, and a UNet that is told sizes."""
    return make_once("tiny-xl", lambda folder: random_model("tiny-xl", folder))


@pytest.fixture(scope="session")
def tokenizer(base_model: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(base_model / "tokenizer")


@pytest.fixture(scope="session")
def tokenize(tokenizer: CLIPTokenizer) -> Callable[[str], dict[str, Tensor]]:
    """A prompt to its ids, as datasets take it."""
    from custom_diffusion.models.families import StableDiffusion

    return partial(StableDiffusion().tokenize, {"text_encoder": tokenizer})


def draw_images(folder: Path, count: int, size: tuple[int, int] = (96, 96)) -> Path:
    """Write images that differ from each other and from their mirror images."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", size, tuple(np.random.default_rng(number).integers(256, size=3).tolist()))
        ImageDraw.Draw(image).rectangle((5 + number, 10, 40 + 2 * number, 60), fill=(255, 20 * number, 0))
        image.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def images(make_once: MakeOnce) -> Path:
    """A folder with five instance images."""
    return make_once("cat", lambda folder: draw_images(folder, 5))


def flags(base_model: Path, images: Path, output_dir: Path, **more: object) -> list[str]:
    """A command line for a short run at 64 px; ``more`` adds or replaces flags, True gives a switch, None drops one."""
    values: dict[str, object] = {
        "pretrained_model_name_or_path": base_model,
        "instance_data_dir": images,
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
        "output_dir": output_dir,
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "lr_warmup_steps": 0,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    values |= more
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items() if value is not None
    ]


def forget_accelerate() -> None:
    """Let the next run of this process choose its own precision and number of processes."""
    if "accelerate" not in sys.modules:
        return
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_grad_enabled(True)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """No test inherits the state that another left, whichever ran before it on this worker."""
    forget_accelerate()


class Prepared(Exception):
    """Ends a run before its first step."""


def prepare(argv: list[str]) -> Run:
    """All that a training run does before its first step, in this process, whatever precision its last run had."""
    import train_custom_diffusion

    forget_accelerate()
    prepared: list[Run] = []

    def stop(run: Run) -> float:
        prepared.append(run)
        raise Prepared

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Prepared):
        patch.setattr(train_custom_diffusion, "train", stop)
        train_custom_diffusion.main(argv)
    return prepared.pop()


def train(argv: list[str]) -> None:
    """Train in this process, whatever precision its last run had."""
    import train_custom_diffusion

    forget_accelerate()
    train_custom_diffusion.main(argv)


@pytest.fixture
def train_here() -> Callable[[list[str]], None]:
    """Train in this process: as a launch does, without the seconds that importing takes."""
    return train


def train_with_everything(base_model: Path, images: Path, folder: Path) -> None:
    launch(
        *flags(
            base_model,
            images,
            folder / "out",
            with_prior_preservation=True,
            class_data_dir=folder / "class",
            class_prompt="cat",
            num_class_images=3,
            learning_rate=1e-2,
            max_train_steps=6,
            checkpointing_steps=3,
            gradient_accumulation_steps=2,
            dataloader_num_workers=2,
            validation_prompt="<new1> cat in a bucket",
            validation_steps=2,
            report_to="tensorboard",
            hflip=True,
        )
    )


@pytest.fixture(scope="session")
def trained(base_model: Path, images: Path, make_once: MakeOnce) -> Path:
    """The output folder of a launched run with everything in it, at a learning rate that leaves a mark."""
    return make_once("trained", lambda folder: train_with_everything(base_model, images, folder)) / "out"
