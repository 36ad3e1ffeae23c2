"""The documented commands, run as they stand but for sizes: those of the README, and those that users come with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from custom_diffusion.concept.files import load_concept
from tests.conftest import ROOT, draw_images, run_script
from tests.hub_server import Hub

README = (ROOT / "README.md").read_text()
SEED = ROOT.parent / "shared" / "seeds" / "001_86c3ac09d10ee5b6.txt"
# Only sizes: a random model learns nothing from more.
SMALLER = [
    (r"--resolution=\d+", "--resolution=64"),
    (r"--max_train_steps=\d+", "--max_train_steps=2"),
    (r"--num_class_images[= ]\d+", "--num_class_images=3"),
]


def blocks(text: str, language: str, *words: str) -> list[str]:
    """The code blocks that hold all words; those with an ellipsis are no whole commands."""
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [block for block in found if all(word in block for word in words) and " ..." not in block]


@pytest.fixture
def home(base_model: Path, tmp_path: Path) -> Path:
    """A folder as a user has it after cloning and collecting images."""
    for path in [*ROOT.glob("*.py"), ROOT / "concept_list.json"]:
        (tmp_path / path.name).symlink_to(path)
    concepts = json.loads((ROOT / "concept_list.json").read_text())
    for folder in ("data/cat", *(concept["instance_data_dir"] for concept in concepts)):
        draw_images(tmp_path / folder, 4)
    for folder in ("real_reg/samples_cat", *(concept["class_data_dir"] for concept in concepts)):
        draw_images(tmp_path / folder / "images", 3)
        # As retrieve.py writes it: paths as seen from where it ran.
        names = [f"{folder}/images/{number}.png" for number in range(3)]
        (tmp_path / folder / "images.txt").write_text("".join(f"{name}\n" for name in names))
        (tmp_path / folder / "caption.txt").write_text("a caption\n" * 3)
    return tmp_path


def run_block(block: str, home: Path, model: str, **environment: str) -> None:
    block = re.sub(r"MODEL_NAME=.*", f"MODEL_NAME={model}", block)
    for pattern, replacement in SMALLER:
        block = re.sub(pattern, replacement, block)
    result = run_script("bash", "-euc", block, cwd=home, **environment)
    assert result.returncode == 0, f"{block}\n{result.stderr[-3000:]}"


def test_the_readmes_commands_for_one_concept(home: Path, base_model: Path) -> None:
    shutil.rmtree(home / "class_images")  # generated class images
    (training,) = blocks(README, "bash", "accelerate launch", "INSTANCE_DIR")
    run_block(training, home, str(base_model))
    assert list(load_concept(home / "custom-diffusion-model").tokens) == ["<new1>"]
    (showing,) = blocks(README, "bash", "infer.py", "sitting in a bucket")
    run_block(showing, home, "")
    assert (home / "samples" / "00000_new1-cat-sitting-in-a-bucket_seed42.png").is_file()
    assert (home / "samples" / "contact_sheet.png").is_file()


def test_the_readmes_commands_for_the_small_model(home: Path) -> None:
    shutil.rmtree(home / "real_reg")
    shutil.rmtree(home / "examples")
    for folder in ("base", "examples"):
        (home / folder).symlink_to(ROOT / folder)
    (commands,) = blocks(README, "bash", "emoji-cat")
    run_block(commands, home, "")
    assert all(list(load_concept(home / name).tokens) == ["<new1>"] for name in ("emoji-cat", "emoji-cat-weighed"))
    assert len(list((home / "samples").glob("0*.png"))) == 8


def test_the_readmes_commands_for_several_concepts(home: Path, base_model: Path) -> None:
    (commands,) = blocks(README, "bash", "concept_list.json")
    shutil.rmtree(home / "class_images")  # generated class images this time
    run_block(f"MODEL_NAME={base_model}\n{commands}", home, str(base_model))
    assert list(load_concept(home / "two-concepts").tokens) == ["<new1>", "<new2>"]
    assert len(list((home / "samples").glob("0*.png"))) == 1


@pytest.fixture
def hub(base_model: Path) -> Iterator[Hub]:
    server = Hub()
    server.files["CompVis/stable-diffusion-v1-4"] = {
        str(path.relative_to(base_model)): path.read_bytes() for path in base_model.rglob("*") if path.is_file()
    }
    yield server
    server.shutdown()


@pytest.mark.skipif(not SEED.is_file(), reason="the documents that users come with are not part of a clone")
@pytest.mark.parametrize(("word", "tokens"), [("INSTANCE_DIR", ["<new1>"]), ("concepts_list", ["<new1>", "<new2>"])])
def test_the_commands_of_diffusers_documentation(word: str, tokens: list[str], home: Path, hub: Hub) -> None:
    (command,) = blocks(SEED.read_text(), "bash", "accelerate launch", word)
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "cache"), "HF_TOKEN": "hf_x"}
    run_block(command, home, "CompVis/stable-diffusion-v1-4", **environment, WANDB_DIR=str(home))
    assert list(load_concept(home / "path-to-save-model").tokens) == tokens
    assert {f"{token}.bin" for token in tokens} < set(hub.files["someone/path-to-save-model"])


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_]+)", README))))
def test_every_flag_in_the_readme_exists(flag: str) -> None:
    launchers = {"num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"}
    launchers |= {"help", "cpu", "nproc_per_node", "nnodes", "node_rank", "master_addr", "quiet"}
    ours = {name for script in ROOT.glob("*.py") for name in re.findall(r'add\("--(\w+)"', script.read_text())}
    benchmark = set(re.findall(r'add_argument\("--(\w+)"', (ROOT / "benchmarks" / "train.py").read_text()))
    assert flag in ours | launchers | benchmark


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_the_readmes_python_is_python(block: str) -> None:
    compile(block, "README.md", "exec")
