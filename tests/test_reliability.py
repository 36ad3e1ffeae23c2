"""Nothing lost: kills at any moment, signals, full disks, failed training, processes that die."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_custom_diffusion
from custom_diffusion.command_line import run
from custom_diffusion.concept.checkpoint_folders import checkpoint_step
from custom_diffusion.concept.files import load_concept
from custom_diffusion.data.caching import read_posterior
from custom_diffusion.errors import UserError
from custom_diffusion.training import run as training_run
from custom_diffusion.training.checkpoints import cannot_write, remove_checkpoint, remove_leftovers
from custom_diffusion.training.progress import check_loss
from tests.conftest import ROOT, draw_images, flags, run_script

# A server that has imported everything forks each run: a start takes a moment, not seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train_custom_diffusion"])


def train(argv: list[str], log: str, largest_file: int | None = None) -> None:
    """Run by the child: as ``python train_custom_diffusion.py``, with its prints in a file."""
    with open(log, "a") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    training_run.use_all_cores = lambda: None
    run(lambda: train_custom_diffusion.main(argv))


def start(argv: list[str], log: Path, largest_file: int | None = None) -> ForkServerProcess:
    process = FORKS.Process(target=train, args=(argv, str(log), largest_file))
    process.start()
    return process


def finish(argv: list[str], log: Path) -> None:
    process = start(argv, log)
    process.join(120)
    assert process.exitcode == 0, log.read_text()[-3000:]


def learned(folder: Path) -> torch.Tensor:
    concept = load_concept(folder)
    return torch.cat([value.flatten() for value in concept.tensors().values()])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reliability")


def command(base_model: Path, folder: Path, **more: object) -> list[str]:
    images = folder.parent / "images"
    if not images.exists():
        draw_images(images, 3)
    values = {
        "with_prior_preservation": True,
        "class_data_dir": folder / "class",
        "class_prompt": "cat",
        "num_class_images": 4,
        # One at a time, so that an image does not depend on which others were missing.
        "sample_batch_size": 1,
        "learning_rate": 1e-2,
        "max_train_steps": 12,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 2,
        "resume_from_checkpoint": "latest",
        "keep_latents": True,
    }
    return flags(base_model, images, folder / "out", **(values | more))


@pytest.fixture(scope="module")
def uninterrupted(base_model: Path, work: Path) -> tuple[torch.Tensor, list[bytes], float]:
    """What a run ends with that nobody kills, its class images, and how long it takes."""
    finish(command(base_model, work / "warm"), work / "warm.log")
    started = time.perf_counter()
    finish(command(base_model, work / "whole"), work / "whole.log")
    seconds = time.perf_counter() - started
    return learned(work / "whole" / "out"), class_images(work / "whole"), seconds


def class_images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "class").glob("*.jpg"))]


def phase(folder: Path) -> str:
    """What a run was doing, from what it has left."""
    out = folder / "out"
    if not (folder / "class").is_dir() or len(list((folder / "class").glob("*.jpg"))) < 4:
        return "class images"
    if list(out.glob(".checkpoint-*")):
        return "checkpoint"
    if (out / "checkpoint-12").is_dir():
        return "final saving"
    if list(out.glob("checkpoint-*")):
        return "steps"
    return "encoding" if (out / "latents").is_dir() else "loading"


def check_checkpoints(out: Path) -> None:
    """Every checkpoint and every kept posterior that has its name is whole."""
    for path in out.glob("latents/*.safetensors"):
        assert read_posterior(path) is not None
    for path in out.glob("checkpoint-*"):
        load_concept(path)
        torch.load(path / "training_state" / "optimizer.bin", weights_only=True)


def kill_until_done(argv: list[str], folder: Path, next_kill: Callable[[], float], kills: dict[str, int]) -> None:
    """Start, kill and start again until the run ends by itself; counts the kills by phase."""
    for _ in range(60):
        process = start(argv, folder.with_suffix(".log"))
        process.join(next_kill())
        if process.exitcode is None:
            process.kill()
            process.join()
            kills[phase(folder)] = kills.get(phase(folder), 0) + 1
            check_checkpoints(folder / "out")
        elif process.exitcode == 0:
            return
        else:
            pytest.fail(folder.with_suffix(".log").read_text()[-3000:])
    pytest.fail("the run never came to its end")


@pytest.mark.parametrize("enough", [3, pytest.param(24, marks=pytest.mark.long)])
def test_kills_at_random_moments_change_nothing(
    enough: int, base_model: Path, work: Path, uninterrupted: tuple[torch.Tensor, list[bytes], float]
) -> None:
    weights, images, seconds = uninterrupted
    chance, kills = random.Random(0), dict[str, int]()
    for attempt in range(30):
        folder = work / f"killed-{enough}-{attempt}"
        # Short lives at first, then longer ones, so that every phase gets its share.
        kill_until_done(command(base_model, folder), folder, lambda: chance.uniform(0.1, 1.1) * seconds, kills)
        assert torch.equal(learned(folder / "out"), weights)
        assert class_images(folder) == images
        assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")], "no leftovers"
        shutil.rmtree(folder)
        if sum(kills.values()) >= enough:
            break
    print("kills survived:", kills)
    assert sum(kills.values()) >= enough


@pytest.mark.parametrize(
    "pattern",
    [
        "latents/.half-written-*",
        pytest.param("latents/*.safetensors", marks=pytest.mark.long),
        ".checkpoint-*.tmp",
        pytest.param(".checkpoint-*.tmp/training_state", marks=pytest.mark.long),
        pytest.param(".half-written-*", marks=pytest.mark.long),
        pytest.param("*.bin", marks=pytest.mark.long),
    ],
)
def test_kills_while_something_is_written(
    pattern: str, base_model: Path, work: Path, uninterrupted: tuple[torch.Tensor, list[bytes], float]
) -> None:
    for attempt in range(5):  # some of these files are there for less than a millisecond
        folder = work / f"writing-{abs(hash(pattern))}-{attempt}"
        process = start(command(base_model, folder), folder.with_suffix(".log"))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any((folder / "out").glob(pattern)) and process.exitcode is None:
            time.sleep(0.0005)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            break
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"
    check_checkpoints(folder / "out")
    kept = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("latents/*.safetensors")}
    finish(command(base_model, folder), folder.with_suffix(".log"))
    assert torch.equal(learned(folder / "out"), uninterrupted[0])
    assert not [path for path in (folder / "out").rglob("*") if path.name.startswith(".")]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was encoded before the kill is used"


def test_a_kill_while_a_checkpoint_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-2"
    path.mkdir()
    for number in range(5000):
        (path / str(number)).touch()
    process = FORKS.Process(target=remove_checkpoint, args=(path,))
    process.start()
    # Unlike a listing, a walk does not mind that the folder loses its name meanwhile.
    while sum(len(files) for _, _, files in os.walk(tmp_path)) == 5000 and process.exitcode is None:
        pass
    process.kill()
    process.join()
    assert not path.exists(), "what has a checkpoint's name is whole"
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_moved_aside_comes_back(base_model: Path, work: Path) -> None:
    folder = work / "aside"
    finish(command(base_model, folder, max_train_steps=4), work / "aside.log")
    out = folder / "out"
    (out / "checkpoint-4").rename(out / ".checkpoint-4.old")  # killed between the two renames
    finish(command(base_model, folder, max_train_steps=6), work / "aside.log")
    assert {path.name for path in out.glob("*checkpoint*")} == {"checkpoint-4", "checkpoint-6"}
    assert f"resuming from {out / 'checkpoint-4'}" in (work / "aside.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_a_checkpoint(
    number: signal.Signals, base_model: Path, work: Path, uninterrupted: tuple[torch.Tensor, list[bytes], float]
) -> None:
    folder, log = work / number.name, work / f"{number.name}.log"
    process = start(command(base_model, folder, checkpointing_steps=100), log)
    while process.exitcode is None and "1/12" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    step = checkpoint.name.removeprefix("checkpoint-")
    message = f"stopped by {number.name} after step {step}; continue with --resume_from_checkpoint=latest"
    assert log.read_text().strip().splitlines()[-1] == message
    finish(command(base_model, folder, checkpointing_steps=100), log)
    assert torch.equal(learned(folder / "out"), uninterrupted[0])


def test_a_signal_to_its_data_workers_too_ends_with_a_checkpoint(base_model: Path, work: Path) -> None:
    # A terminal, `timeout` and batch systems send it to the whole process group, and launchers pass it on.
    folder, log = work / "group", work / "group.log"
    steps = {"max_train_steps": 600, "checkpointing_steps": 600}
    argv = command(base_model, folder, **steps, dataloader_num_workers=2)
    script = [sys.executable, ROOT / "train_custom_diffusion.py", *argv]
    with log.open("w") as file:
        process = subprocess.Popen(script, stdout=file, stderr=file, start_new_session=True)
    try:
        while process.poll() is None and "9/600" not in log.read_text():
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM, log.read_text()[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    assert checkpoint_step(checkpoint) < 600


def test_a_full_disk(base_model: Path, work: Path) -> None:
    folder, log = work / "full", work / "full.log"
    finish(command(base_model, folder, max_train_steps=2), log)

    def files() -> dict[Path, bytes]:
        # config.yaml says how the last run was started, so it is each run's own; each encodes what it will draw.
        found = (path for path in (folder / "out").rglob("*") if path.is_file() and path.name != "config.yaml")
        return {path: path.read_bytes() for path in found if path.parent.name != "latents"}

    before = files()
    for largest_file, name in ((30_000, "checkpoint-4"), (10_000, "checkpoint-4")):
        process = start(command(base_model, folder), log, largest_file)
        process.join(60)
        assert process.exitcode == 1
        error = log.read_text().strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert f"{name}' cannot be written" in error
        assert f"the last good checkpoint is {str(folder / 'out' / 'checkpoint-2')!r}" in error
        assert files() == before
    finish(command(base_model, folder), log)


def test_a_folder_that_cannot_be_written_to(base_model: Path, images: Path) -> None:
    argv = flags(base_model, images, Path("/proc/self"))
    result = run_script("python", ROOT / "train_custom_diffusion.py", *argv)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "/proc/self" in last


def test_a_loss_that_is_not_finite_stops_the_run(base_model: Path, work: Path) -> None:
    folder, log = work / "failed", work / "failed.log"
    process = start(command(base_model, folder, learning_rate=1e30, checkpointing_steps=1), log)
    process.join(60)
    assert process.exitcode == 1
    error = log.read_text().strip().splitlines()[-1]
    assert error.startswith("error: ")
    for words in ("not finite", "checkpoint", "--learning_rate"):
        assert words in error
    check_checkpoints(folder / "out")
    assert not list((folder / "out").glob("*.bin")), "nothing broken is left as a result"


def test_steps_that_fp16_skips_do_not_stop_a_run(tmp_path: Path) -> None:
    run = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)), optimizer=SimpleNamespace(param_groups=[{"lr": 1.0}])
    )
    for loss, skipped in ((1.0, 0), (float("nan"), 1), (float("inf"), 49), (1.0, 3)):
        check_loss(run, loss, 7, skipped)
    for loss, skipped, words in ((float("nan"), 0, "step 7 is not finite"), (1.0, 50, "50 steps in a row")):
        with pytest.raises(UserError, match=words):
            check_loss(run, loss, 7, skipped)


# --- two processes -------------------------------------------------------------------------------


@pytest.fixture
def two_processes(base_model: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts torchrun with two processes on a run that is long enough to interfere with."""
    running: list[subprocess.Popen[str]] = []

    def begin(**more: object) -> subprocess.Popen[str]:
        argv = command(base_model, tmp_path / "run", **more)
        program = [Path(sys.executable).with_name("torchrun"), "--nproc_per_node=2", ROOT / "train_custom_diffusion.py"]
        running.append(
            subprocess.Popen(
                [*map(str, program), *argv],
                env=os.environ | {"ACCELERATE_USE_CPU": "true"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.01)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"train_custom" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_process_that_dies_ends_the_others(
    two_processes: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = two_processes(max_train_steps=100_000)
    wait_for(tmp_path / "run" / "out" / "checkpoint-2", process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert time.monotonic() - killed < 60
    assert "rank      : 1" in output, "torchrun names the one that died"
    check_checkpoints(tmp_path / "run" / "out")


def test_a_signal_to_one_stops_both_after_the_same_step(
    two_processes: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    out = tmp_path / "run" / "out"
    process = two_processes(max_train_steps=100_000, checkpoints_total_limit=None, checkpointing_steps=50)
    wait_for(out / "checkpoint-50", process)
    os.kill(workers_of(process)[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    newest = max(out.glob("checkpoint-*"), key=checkpoint_step)
    assert f"stopped by SIGTERM after step {checkpoint_step(newest)}" in output
    states = {path.name for path in (newest / "training_state").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "optimizer.bin"} <= states
    check_checkpoints(out)


def test_two_processes_survive_a_kill(two_processes: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    whole = two_processes(max_train_steps=12)
    assert whole.wait(120) == 0, whole.stdout.read()
    weights = learned(tmp_path / "run" / "out")
    shutil.rmtree(tmp_path / "run" / "out")
    first = two_processes(max_train_steps=12)
    wait_for(tmp_path / "run" / "out" / "checkpoint-2", first)
    for pid in workers_of(first):
        os.kill(pid, signal.SIGKILL)
    assert first.wait(90) != 0
    second = two_processes(max_train_steps=12)
    assert second.wait(120) == 0, second.stdout.read()
    assert torch.equal(learned(tmp_path / "run" / "out"), weights)


def test_the_message_of_a_full_disk_names_the_reason(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    message = str(cannot_write(tmp_path / "checkpoint-3", error, tmp_path))
    assert "No space left on device" in message
    assert "there is no checkpoint yet" in message
