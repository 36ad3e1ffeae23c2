"""Two real processes: they end with the same values, and with those of one process that sees the double batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from custom_diffusion.concept.files import load_concept
from tests.conftest import ROOT, draw_images, flags, prepare, run_script
from tests.two_processes import digest_of_latents


def learned(folder: Path) -> torch.Tensor:
    concept = load_concept(folder)
    return torch.cat([value.flatten() for value in concept.tensors().values()])


def relative_difference(one: torch.Tensor, other: torch.Tensor, start: torch.Tensor | float = 0.0) -> float:
    """How far two results of training are apart, relative to the way that the first has moved from `start`.

    Of all values together: processors and numbers of threads round differently, and AdamW makes as large a step of a
    rounding error as of a gradient, where that is nearly zero.
    """
    return ((one - other).norm() / (one - start).norm()).item()


def two_processes(*argv: str) -> str:
    # `accelerate launch --cpu --num_processes 2` silently runs one.
    script = ROOT / "tests" / "two_processes.py"
    result = run_script(
        "torchrun", "--nproc_per_node=2", script, *argv, ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT)
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert "processes 2" in result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def apart(base_model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and prints of a run of two processes."""
    folder = tmp_path_factory.mktemp("apart")
    printed = two_processes(*run_flags(base_model, images, folder, train_batch_size=1, checkpointing_steps=2))
    return folder, printed


def run_flags(base_model: Path, images: Path, folder: Path, **more: object) -> list[str]:
    values = {
        "with_prior_preservation": True,
        "class_data_dir": folder / "class",
        "class_prompt": "cat",
        "num_class_images": 5,
        "sample_batch_size": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 4,
        "gradient_accumulation_steps": 2,
        "hflip": True,
    }
    return flags(base_model, images, folder / "out", **(values | more))


def test_the_processes_do_not_drift_apart(apart: tuple[Path, str]) -> None:
    assert "difference 0.0\n" in apart[1]


@pytest.mark.long
def test_two_processes_encode_and_learn_the_same_of_images_in_their_own_shape(
    base_model: Path, tmp_path: Path, train_here: Callable[[list[str]], None]
) -> None:
    (tmp_path / "images").mkdir()
    for number, size in enumerate([(96, 96), (60, 100), (100, 60), (300, 60), (60, 110)]):
        draw_images(tmp_path / "drawn", number + 1, size)
        (tmp_path / "drawn" / f"{number}.png").rename(tmp_path / "images" / f"{number}.png")
    more = {"aspect_buckets": True, "gradient_accumulation_steps": 1, "with_prior_preservation": None}
    two = two_processes(*run_flags(base_model, tmp_path / "images", tmp_path / "two", train_batch_size=1, **more))
    train_here(run_flags(base_model, tmp_path / "images", tmp_path / "one", train_batch_size=2, **more))
    assert "difference 0.0\n" in two
    encoded = prepare(run_flags(base_model, tmp_path / "images", tmp_path / "again", train_batch_size=2, **more))
    assert f"latents {digest_of_latents(encoded)}\n" in two
    assert relative_difference(learned(tmp_path / "one" / "out"), learned(tmp_path / "two" / "out")) < 1e-5


@pytest.mark.long
def test_two_processes_learn_the_same_of_masked_images(
    base_model: Path, tmp_path: Path, train_here: Callable[[list[str]], None]
) -> None:
    (tmp_path / "images" / "mask").mkdir(parents=True)
    for number, size in enumerate([(96, 96), (60, 100), (100, 60), (300, 60), (60, 110)]):
        draw_images(tmp_path / "drawn", number + 1, size)
        (tmp_path / "drawn" / f"{number}.png").rename(tmp_path / "images" / f"{number}.png")
    Image.new("L", (60, 100), "white").save(tmp_path / "images" / "mask" / "1.png")
    Image.linear_gradient("L").resize((60, 110)).save(tmp_path / "images" / "mask" / "4.png")
    more = {"aspect_buckets": True, "masked_loss": True, "gradient_accumulation_steps": 1}
    more |= {"with_prior_preservation": None}
    two = two_processes(*run_flags(base_model, tmp_path / "images", tmp_path / "two", train_batch_size=1, **more))
    train_here(run_flags(base_model, tmp_path / "images", tmp_path / "one", train_batch_size=2, **more))
    assert "difference 0.0\n" in two
    assert relative_difference(learned(tmp_path / "one" / "out"), learned(tmp_path / "two" / "out")) < 1e-5


def test_two_processes_equal_one_with_the_double_batch(
    apart: tuple[Path, str], base_model: Path, images: Path, tmp_path: Path, train_here: Callable[[list[str]], None]
) -> None:
    shutil.copytree(apart[0] / "class", tmp_path / "class")
    train_here(run_flags(base_model, images, tmp_path, train_batch_size=2))
    one, two = learned(tmp_path / "out"), learned(apart[0] / "out")
    model = StableDiffusionPipeline.from_pretrained(base_model)
    start = [
        model.unet.state_dict()[key.replace(".processor.", ".").replace("_custom_diffusion", "")].flatten()
        for key in load_concept(tmp_path / "out").attention
    ]
    start = torch.cat([*start, model.text_encoder.get_input_embeddings().weight[42170]])
    assert (one - start).abs().max() > 1e-3, "there is something to compare"
    assert relative_difference(one, two, start) < 3e-4


@pytest.mark.long
def test_two_processes_train_gated_concepts_as_one_with_the_double_batch(
    base_model: Path, images: Path, tmp_path: Path, train_here: Callable[[list[str]], None]
) -> None:
    """Of two concepts, so that a process may have a step without a word of one of them; class captions have none."""
    entries = [
        {"instance_prompt": f"photo of a {words}", "class_prompt": words.split()[1], "instance_data_dir": str(folder),
         "class_data_dir": str(draw_images(tmp_path / f"class-{words.split()[1]}", 5))}
        for words, folder in (("<new1> cat", images), ("<new2> plant", draw_images(tmp_path / "plants", 4)))
    ]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(entries))
    more = {"token_gate": True, "concepts_list": tmp_path / "list.json", "modifier_token": "<new1>+<new2>"}
    more |= dict.fromkeys(("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt"))
    printed = two_processes(*run_flags(base_model, images, tmp_path / "two", train_batch_size=1, **more))
    train_here(run_flags(base_model, images, tmp_path / "one", train_batch_size=2, **more))
    assert "difference 0.0\n" in printed
    one, two = load_concept(tmp_path / "one" / "out"), load_concept(tmp_path / "two" / "out")
    assert len(one.gates) == len(two.gates) == 2
    for mine, other in zip(one.gates, two.gates, strict=True):
        for key, change in mine.whole().items():
            assert change.abs().max() > 1e-3, "there is something to compare"
            assert relative_difference(change, other.whole()[key]) < 3e-4
    assert relative_difference(learned(tmp_path / "one" / "out"), learned(tmp_path / "two" / "out")) < 1e-5


@pytest.mark.long
def test_two_processes_measure_the_validation_loss_of_one(base_model: Path, images: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "alone"):
        draw_images(folder / "class", 5)
    more = {"validation_split": 1, "validation_steps": 2, "max_train_steps": 2, "train_batch_size": 1}
    two_processes(*run_flags(base_model, images, tmp_path, **more))
    measured = json.loads((tmp_path / "out" / "training_log.json").read_text())["validations"]
    assert [row["step"] for row in measured] == [0, 2]
    alone = prepare(run_flags(base_model, images, tmp_path / "alone", **more))
    for name in ("validation_loss", "validation_prior_loss"):
        assert measured[0][name] == pytest.approx(alone.history.validations[0][name], rel=1e-5)


def test_every_generated_class_image_is_another(apart: tuple[Path, str]) -> None:
    images = sorted((apart[0] / "class").glob("*.jpg"))
    assert [path.name.split("-")[0] for path in images] == ["0", "1", "2", "3", "4"]
    assert len({path.read_bytes() for path in images}) == 5


def test_a_checkpoint_has_the_random_state_of_every_process(apart: tuple[Path, str]) -> None:
    states = {path.name for path in (apart[0] / "out" / "checkpoint-2" / "training_state").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "optimizer.bin", "scheduler.bin"} <= states


@pytest.mark.long
def test_a_resumed_run_of_two_processes_ends_bit_equal(
    apart: tuple[Path, str], base_model: Path, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(apart[0] / "class", tmp_path / "class")
    shutil.copytree(apart[0] / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    two_processes(*run_flags(base_model, images, tmp_path, train_batch_size=1, resume_from_checkpoint="latest"))
    assert torch.equal(learned(tmp_path / "out"), learned(apart[0] / "out"))


@pytest.mark.long
def test_two_processes_share_the_encoding(
    base_model: Path, images: Path, tmp_path: Path, train_here: Callable[[list[str]], None]
) -> None:
    class_images = draw_images(tmp_path / "class", 4)
    # Nine views, so that the processes have unequal shares; in a type that not every backend can send.
    more = {"mixed_precision": "bf16", "keep_latents": True, "max_train_steps": 3, "gradient_accumulation_steps": 1}
    more |= {"noaug": True, "hflip": None, "num_class_images": 4}

    def argv(folder: str, batch: int) -> list[str]:
        return run_flags(
            base_model, images, tmp_path / folder, **more, class_data_dir=class_images, train_batch_size=batch
        )

    printed = two_processes(*argv("two", 1))
    run = prepare(argv("one", 2))
    assert len(run.dataset.posteriors) == 9
    assert f"latents {digest_of_latents(run)}\n" in printed, "both have what one process has"
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "out/latents").iterdir()}
        for name in ("one", "two")
    )
    assert one == two


def can_make_hosts() -> bool:
    """Whether two network namespaces can stand in for two machines here: they need root and iproute2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "custom-diffusion-probe"], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "delete", "custom-diffusion-probe"], capture_output=True)
    return made


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a cable of their own: 10.77.0.1 and 10.77.0.2."""
    names = [f"custom-diffusion-{number}" for number in (1, 2)]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add cd-eth1 netns {names[0]} type veth peer name cd-eth2 netns {names[1]}")
    for number, name in enumerate(names, 1):
        inside = f"ip netns exec {name} ip"
        commands += [f"{inside} address add 10.77.0.{number}/24 dev cd-eth{number}", f"{inside} link set lo up"]
        commands.append(f"{inside} link set cd-eth{number} up")
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.long
@pytest.mark.skipif(not can_make_hosts(), reason="two network namespaces need root and iproute2")
def test_two_machines_end_as_two_processes_do(
    hosts: list[str],
    apart: tuple[Path, str],
    base_model: Path,
    images: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(apart[0] / "class", tmp_path / "class")
    argv = run_flags(base_model, images, tmp_path, train_batch_size=1)
    running = []
    for rank, host in enumerate(hosts):
        # `accelerate launch --cpu` would run each of them alone.
        command = f"torchrun --nnodes=2 --node_rank={rank} --nproc_per_node=1 --master_addr=10.77.0.1".split()
        program = str(Path(sys.executable).with_name(command[0]))
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, program, *command[1:], str(ROOT / "train_custom_diffusion.py"), *argv],
                env=os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": f"cd-eth{rank + 1}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=180)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    # To rounding: each "machine" believes that all cores are its own, and computes with more threads.
    assert relative_difference(learned(tmp_path / "out"), learned(apart[0] / "out")) < 1e-5
