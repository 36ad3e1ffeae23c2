"""Ctrl-C at any moment names what was going on and the way on; one run at a time; processes that fail alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train_custom_diffusion
from custom_diffusion.command_line import run as run_command
from custom_diffusion.concept.files import load_concept
from custom_diffusion.errors import Interrupted, UserError
from custom_diffusion.training import processes, publishing, saving
from custom_diffusion.training import run as training_run
from custom_diffusion.training.lock import lock_folder, unlocks_folders
from custom_diffusion.training.signals import Signalled, StopSignal, during
from tests.conftest import flags

Train = Callable[[list[str]], None]


def forget_signals() -> None:
    """Let signals do what they do in a new process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals do afterwards what they did before."""
    yield
    forget_signals()


@pytest.fixture
def ended(train_here: Train, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], tuple[int, str]]:
    """Runs the command as `python train_custom_diffusion.py` does; gives its exit code and its last line."""

    def run(argv: list[str]) -> tuple[int, str]:
        interrupted = "interrupted before the first step; run the same command again"
        forget_signals()
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: train_here(argv), interrupted, processes.name_to_speak_as)
        if isinstance(caught.value.code, str):
            return 1, caught.value.code
        return caught.value.code, capsys.readouterr().err.strip().splitlines()[-1]

    return run


def ctrl_c(*_: object, **__: object) -> None:
    """What a user types: the process gets a signal."""
    signal.raise_signal(signal.SIGINT)


def sigterm(*_: object, **__: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def twice(*_: object, **__: object) -> None:
    ctrl_c()
    time.sleep(StopSignal.ECHO_SECONDS + 0.1)
    ctrl_c()


# --- what was going on, and the way on ------------------------------------------------------------


def test_before_the_first_step(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    ended: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_custom_diffusion, "prepare_latents", ctrl_c)
    code, line = ended(flags(base_model, images, tmp_path / "out"))
    assert (code, line) == (130, "interrupted before the first step; run the same command again")


def test_ctrl_c_twice_in_the_steps(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    ended: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = training_run.Latents.draw
    steps: list[int] = []

    def draw_and_interrupt(self: Any, batch: dict[str, Any]) -> torch.Tensor:
        steps.append(len(steps))
        if len(steps) == stop_in:
            twice()
        return draw(self, batch)

    monkeypatch.setattr(training_run.Latents, "draw", draw_and_interrupt)
    argv = flags(base_model, images, tmp_path / "out", max_train_steps=4, checkpointing_steps=2)
    stop_in = 1
    code, line = ended(argv)
    assert code == 130
    assert line == "interrupted during the steps; there is no checkpoint yet: run the same command again"
    stop_in = len(steps) + 3
    code, line = ended(argv)
    assert line == (
        f"interrupted during the steps; the last good checkpoint is {str(tmp_path / 'out' / 'checkpoint-2')!r}: "
        "continue with --resume_from_checkpoint=latest"
    )


@pytest.mark.parametrize(
    ("name", "doing"),
    [("validate", "the validation images of step 1"), ("save_checkpoint", "the writing of checkpoint-1")],
)
def test_ctrl_c_twice_in_what_takes_long_between_steps(
    name: str,
    doing: str,
    base_model: Path,
    images: Path,
    tmp_path: Path,
    ended: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_custom_diffusion, name, twice)
    code, line = ended(flags(base_model, images, tmp_path / "out", validation_steps=1, checkpointing_steps=1))
    assert code == 130
    assert line.startswith(f"interrupted during {doing}; ")


@pytest.mark.parametrize(("stop", "code"), [(ctrl_c, 130), (sigterm, 143)])
def test_the_final_images(
    stop: Callable[..., None],
    code: int,
    base_model: Path,
    images: Path,
    tmp_path: Path,
    ended: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(saving, "draw_images", stop)
    ended_with, line = ended(flags(base_model, images, out, validation_prompt="<new1> in a bucket", validation_steps=9))
    assert ended_with == code
    assert line == (
        "interrupted during the final images; the result is complete without them. See your concept with: "
        f"python infer.py --prompt '<new1> in a bucket' --model_dir {out}"
    )
    concept = load_concept(out)
    assert concept.base_model == str(base_model), "the card is there too, so that infer.py finds the base model"
    assert set(concept.tokens) == {"<new1>"}


def test_a_signal_in_the_last_step_does_not_end_the_final_images_by_its_echo(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, draw_images = training_run.Latents.draw, saving.draw_images

    def draw_and_interrupt(self: Any, batch: dict[str, Any]) -> torch.Tensor:
        ctrl_c()
        return draw(self, batch)

    def draw_images_and_echo(*args: Any) -> Any:
        sigterm()  # as torchrun passes it on
        return draw_images(*args)

    monkeypatch.setattr(training_run.Latents, "draw", draw_and_interrupt)
    monkeypatch.setattr(saving, "draw_images", draw_images_and_echo)
    monkeypatch.setattr(StopSignal, "ECHO_SECONDS", 300.0)
    more = {"max_train_steps": 1, "validation_prompt": "<new1>", "num_validation_images": 1}
    train_here(flags(base_model, images, tmp_path / "out", **more))
    assert (tmp_path / "out" / "image_0.png").is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("stop", [ctrl_c, sigterm])
def test_the_upload(
    stop: Callable[..., None],
    base_model: Path,
    images: Path,
    tmp_path: Path,
    ended: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_run, "create_hub_repository", lambda *_: "me/my-cat")
    monkeypatch.setattr(publishing.HfApi, "create_commit", stop)
    code, line = ended(flags(base_model, images, tmp_path / "out", push_to_hub=True, hub_model_id="my-cat"))
    assert code == 130 if stop is ctrl_c else 143
    assert line == (
        f"interrupted during the upload; the files are safe in {str(tmp_path / 'out')!r}, upload them with: "
        f"hf upload me/my-cat {tmp_path / 'out'} --include '*.*' --exclude '*/*' --exclude config.yaml "
        "--exclude training_settings.json --exclude training_log.json --exclude report.html"
    )
    assert (tmp_path / "out" / "pytorch_custom_diffusion_weights.safetensors").is_file()


def test_the_final_images_of_what_was_to_be_uploaded(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    ended: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_run, "create_hub_repository", lambda *_: "me/my-cat")
    monkeypatch.setattr(saving, "draw_images", ctrl_c)
    more = {"push_to_hub": True, "validation_prompt": "<new1>", "validation_steps": 9}
    _, line = ended(flags(base_model, images, tmp_path / "out", **more))
    assert "; upload it with: hf upload me/my-cat" in line


def test_the_very_end(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    ended: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_run.Accelerator, "end_training", ctrl_c)
    code, line = ended(flags(base_model, images, tmp_path / "out"))
    assert code == 130
    assert line == f"interrupted during the end of the run; the result is complete in {str(tmp_path / 'out')!r}"


def test_saving_the_result(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    ended: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saving, "save_concept", ctrl_c)
    _, line = ended(flags(base_model, images, tmp_path / "out"))
    assert line == "interrupted during the saving of the result; there is no checkpoint yet: run the same command again"


def test_an_echo_is_no_second_signal() -> None:
    with StopSignal(SimpleNamespace(num_processes=1)) as stop:
        ctrl_c()
        sigterm()
        assert stop.number == signal.SIGINT
        stop._noted -= StopSignal.ECHO_SECONDS + 1
        with pytest.raises(Signalled):
            sigterm()
        ctrl_c()  # the echo of the second


def test_a_signal_keeps_its_number() -> None:
    with (
        pytest.raises(Interrupted, match="interrupted during a nap; wake up") as caught,
        during("a nap", lambda: "wake up"),
    ):
        raise Signalled(signal.SIGTERM)
    assert caught.value.exit_code == 143
    with pytest.raises(Interrupted) as caught, during("a nap", lambda: ""):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130


# --- one run in a folder --------------------------------------------------------------------------


def hold(folder: Path, worker: Any, ready: Any, done: Any) -> None:
    """Run by another process: hold the folder, with a data worker that outlives it."""
    lock_folder(folder)
    child = os.fork()
    if child == 0:
        time.sleep(120)
        os._exit(0)
    worker.value = child
    ready.set()
    done.wait(60)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def another_run() -> Iterator[Callable[[Path], Callable[[], None]]]:
    """Starts a process that holds a folder; gives what kills it."""
    context = multiprocessing.get_context("fork")
    running = []

    def start(folder: Path) -> Callable[[], None]:
        worker, ready, done = context.Value("i"), context.Event(), context.Event()
        process = context.Process(target=hold, args=(folder, worker, ready, done))
        process.start()
        running.append((process, worker))
        assert ready.wait(60)

        def kill() -> None:
            done.set()
            # Not join(), which would wait for the data worker too.
            deadline = time.monotonic() + 60
            while process.exitcode is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert process.exitcode == -signal.SIGKILL

        return kill

    yield start
    for process, worker in running:
        process.kill()
        if worker.value:
            os.kill(worker.value, signal.SIGKILL)
        process.join()


def test_a_second_run_in_a_folder_touches_nothing(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    train_here: Train,
    another_run: Callable[[Path], Callable[[], None]],
) -> None:
    out = tmp_path / "out"
    (out / ".checkpoint-2.tmp").mkdir(parents=True)  # what the other one is writing
    (out / ".half-written-x.tmp").touch()
    kill = another_run(out)
    argv = flags(base_model, images, out, max_train_steps=1)
    for more in ([], ["--overwrite"], ["--resume_from_checkpoint=latest"]):
        with pytest.raises(UserError, match=r"another run is writing to .*wait for it, end it, or give another"):
            train_here([*argv, *more])
    assert {path.name for path in out.iterdir()} == {".checkpoint-2.tmp", ".half-written-x.tmp"}
    # A data worker that outlives a killed run does not keep the folder.
    kill()
    train_here(argv)
    assert not [path for path in out.iterdir() if path.name.startswith(".")], "what the killed one has left is gone"


def test_a_folder_that_another_run_makes_meanwhile(
    base_model: Path,
    images: Path,
    tmp_path: Path,
    train_here: Train,
    another_run: Callable[[Path], Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    find_checkpoint = train_custom_diffusion.find_checkpoint

    def be_late(*args: Any) -> Any:
        out.mkdir()
        another_run(out)
        return find_checkpoint(*args)

    monkeypatch.setattr(train_custom_diffusion, "find_checkpoint", be_late)
    with pytest.raises(UserError, match="another run is writing to"):
        train_here(flags(base_model, images, out))
    assert not list(out.iterdir())


def test_a_command_gives_its_folder_back_however_it_ends(tmp_path: Path) -> None:
    @unlocks_folders
    def command() -> None:
        lock_folder(tmp_path)
        lock_folder(tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lock_folder, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets this process be one of several that share a store."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(processes, "_store", lambda: store)
    monkeypatch.setattr(processes, "SECONDS_TO_HEAR", 0.2)

    def become(number: int) -> None:
        monkeypatch.setenv("LOCAL_RANK", str(number))
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: number)

    return become


def said(error: str) -> object:
    def fail() -> None:
        raise UserError(error)

    with pytest.raises(SystemExit) as caught:
        run_command(fail, name_to_speak_as=processes.name_to_speak_as)
    return caught.value.code


def test_an_error_of_all_processes_is_said_once(rank: Callable[[int], None]) -> None:
    rank(0)
    assert said("no folder") == "error: no folder"
    rank(1)
    assert said("no folder") == 1


def test_a_process_that_fails_alone_says_so(rank: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    rank(1)
    assert said("no folder") == "error: process 1: no folder"
    rank(0)
    assert said("a full disk") == "error: a full disk"
    rank(2)
    assert said("no folder") == "error: process 2: no folder"
    assert said("a full disk") == 1
    monkeypatch.setenv("GROUP_RANK", "1")  # on a machine of its own
    assert said("a full disk") == "error: process 2: a full disk"


def test_one_line_for_a_signal_to_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    for number, expected in (("0", "interrupted: run the same command again\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", number)
        with pytest.raises(SystemExit) as caught:
            run_command(stop)
        assert caught.value.code == 130
        assert capsys.readouterr().err == expected


@pytest.fixture
def one_of_several(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group, of this process alone: what wraps the model is what several processes have."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "ACCELERATE_USE_CPU": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_of_several")
def test_what_no_step_needs_may_be_on_another_device(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On GPUs the text encoders leave for the CPU, whose tensors NCCL cannot send. Here they leave for another device,
    # whose tensors this refuses to send.
    def send(_: object, tensors: list[torch.Tensor], *__: object) -> None:
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")

    def train(run: training_run.Run) -> float:
        assert type(run.model) is torch.nn.parallel.DistributedDataParallel
        run.module.text_encoders.to("meta")
        assert any(buffer.is_meta for buffer in run.module.buffers())
        return train_steps(run)

    train_steps = train_custom_diffusion.train
    monkeypatch.setattr(torch.distributed, "_broadcast_coalesced", send)
    monkeypatch.setattr(train_custom_diffusion, "train", train)
    train_here(flags(base_model, images, tmp_path / "out", modifier_token=None, instance_prompt="photo of a cat"))


@pytest.mark.usefixtures("one_of_several")
def test_processes_wait_for_a_long_validation() -> None:
    args = train_custom_diffusion.parse_args(flags(Path("model"), Path("images"), Path("out")))
    training_run.build_accelerator(args)
    group = torch.distributed.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device("cpu")).options._timeout >= timedelta(hours=2)
