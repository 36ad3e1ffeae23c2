"""The documentation: its commands run as they stand but for sizes, its links lead somewhere, its flags exist."""

from __future__ import annotations

import ast
import functools
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import infer
import train_custom_diffusion
from tests.conftest import ROOT, draw_images, flags, run_script
from tests.hub_server import Hub
from tools import demo

FOLDERS = (".", "docs", "base", "benchmarks", "demo", "examples", "tools", "tests")
TRANSLATIONS = ("docs/README.zh-CN.md", "docs/README.ko.md")
PAGES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
# Only sizes: a random model learns nothing from more.
SMALLER = [
    (r"--resolution=\d+", "--resolution=64"),
    (r"--max_train_steps=\d+", "--max_train_steps=2"),
    (r"--num_class_images[= ]\d+", "--num_class_images=3"),
]

# The blocks of commands that a test below runs, by page and by words that no other block of the page has.
TRAINING = ("README.md", "accelerate launch", "INSTANCE_DIR")
INFERENCE = ("README.md", "infer.py", "sitting in a bucket")
REAL_IMAGES = ("README.md", "--real_prior")
SEVERAL = ("README.md", "concept_list.json")
EXPORT = ("README.md", "export.py")
OWN_IMAGES = ("docs/retrieval.md", "--path my_images")
MERGE = ("docs/several-concepts.md", "cat-model pot-model")
KEEP = ("docs/several-concepts.md", "--prior_weight")
GATED = ("docs/several-concepts.md", "--token_gate")
UNGATED = ("docs/several-concepts.md", "--ungate")
SHARE = ("docs/sharing.md", "owner/name@v1")
TABLE = ("docs/sharing.md", "--table")
COMFY = ("docs/sharing.md", "--format lora --output_dir my-cat\n")
DELTA = ("docs/sharing.md", "--output_dir cat-delta")
SMALL_MODEL = ("docs/small-model.md", "emoji-cat")
MASKS = ("docs/training.md", "--masked_loss")
RESUME = ("docs/training.md", "--resume_from_checkpoint")
CONFIG = ("docs/training.md", "--config")
XL = ("docs/sdxl.md", "accelerate launch")
RUN_HERE = (
    *(TRAINING, INFERENCE, REAL_IMAGES, SEVERAL, EXPORT, OWN_IMAGES, MERGE, KEEP, GATED, UNGATED, SHARE, TABLE, COMFY),
    *(DELTA, SMALL_MODEL, MASKS, RESUME, CONFIG, XL),
)
# Those that none runs, and what tries them instead.
RUN_ELSEWHERE = {
    ("README.md", "pip install ."): "test_package.py installs the wheel",
    ("README.md", "make demo"): "they run everything",
    ("README.md", "python retrieve.py"): "test_retrieve.py, where a local server answers it",
    ("CONTRIBUTING.md", "make setup"): "every other target begins with it",
    ("docs/evaluation.md", "evaluate.py"): "test_evaluate.py, with encoders of its own",
    ("docs/retrieval.md", "python retrieve.py --class_prompt cat\n"): "test_retrieve.py, with a local server",
    ("docs/retrieval.md", "--source dataset"): "test_retrieve.py, with a dataset on this machine",
    ("docs/retrieval.md", "python3.11 -m venv"): "make test-retrieval installs it",
    ("docs/retrieval.md", "img2dataset"): "it downloads from the web",
    ("docs/retrieval.md", "--path laion"): "test_retrieve.py, with tars that img2dataset has written",
    ("docs/retrieval.md", "PYSPARK"): "it needs Java and 400 million images",
    ("docs/retrieval.md", "concept_list.json --url"): "test_retrieve.py, with a local server",
    ("docs/retrieval.md", "mine.yaml"): "test_retrieve.py repeats a run by its file",
    ("docs/sharing.md", "hf auth login"): "test_hub.py, with a local Hub",
    ("base/README.md", "make base"): "CI runs it with ARGS=--short",
    ("benchmarks/README.md", ""): "they take minutes to hours; test_merge.py and test_retrieve.py run some small",
}


class Block(NamedTuple):
    """A fenced block: its language, the words behind that, and its lines without the indentation."""

    language: str
    info: str
    text: str


@functools.cache
def blocks_of(page: str) -> tuple[Block, ...]:
    """All fenced blocks of a page."""
    found = re.findall(r"^( *)```(\w*) *(.*?)\n(.*?)^\1```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return tuple(Block(language, info, textwrap.dedent(text)) for _, language, info, text in found)


def prose_of(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(page: str, *words: str) -> str:
    """The only block of commands of a page that holds all words."""
    (found,) = (
        block.text for block in blocks_of(page) if block.language == "bash" and all(w in block.text for w in words)
    )
    return found


# --- what every page has to keep -----------------------------------------------------------------


def test_every_block_of_commands_is_run_somewhere() -> None:
    known = [*RUN_HERE, *RUN_ELSEWHERE]
    for page in PAGES:
        for block in blocks_of(page):
            # test_retrieve_from_clip_retrieval.py runs those that are marked for it.
            if block.language == "bash" and not block.info and page not in TRANSLATIONS:
                trying = [words for words in known if words[0] == page and all(w in block.text for w in words[1:])]
                assert trying, f"{page}: no test knows of\n{block.text}"


@pytest.mark.parametrize("page", TRANSLATIONS)
def test_translations_have_the_code_of_the_english_readme(page: str) -> None:
    assert blocks_of(page) == blocks_of("README.md")


def test_the_readme_is_read_in_three_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1300
    assert len(text.splitlines()) <= 180
    assert text.index("accelerate launch") < text.index("## See the result"), "the user's own command comes first"
    first_screen = text.splitlines()[:40]
    assert any("train_custom_diffusion.py" in line for line in first_screen)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings: letters and digits of any script, hyphens for spaces."""
    found: dict[str, int] = {}
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if number == 0 else f"{name}-{number}" for name, last in found.items() for number in range(last + 1)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    broken = []
    for link in re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue  # to the web
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
        elif not target.resolve().is_relative_to(ROOT):
            broken.append(f"{link}, which is outside of the clone")
    assert not broken


@pytest.mark.parametrize("name", ["CustomDiffusionDataset", "PromptDataset"])
def test_classes_of_the_example_are_where_the_docs_say(name: str) -> None:
    row = re.search(rf"^\| `{name}` \| .*\((\S+)\)", (ROOT / "docs" / "other-methods.md").read_text(), re.MULTILINE)
    assert row is not None
    source = ast.parse((ROOT / "docs" / row[1]).read_text())
    assert name in [node.name for node in source.body if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("page", PAGES)
def test_python_is_python(page: str) -> None:
    for block in blocks_of(page):
        if block.language in ("python", "py"):
            compile(block.text, page, "exec")


# --- flags ---------------------------------------------------------------------------------------


@functools.cache
def flags_of(program: str) -> frozenset[str]:
    """The flags that a program's source gives to its parser."""
    source = (ROOT / program).read_text()
    if "add_sampling_flags" in source:
        source += (ROOT / "custom_diffusion" / "command_line.py").read_text()
    return frozenset({"help", "config", *re.findall(r'add(?:_argument)?\(\s*"--([\w-]+)"', source)})


PROGRAMS = {path.name: str(path.relative_to(ROOT)) for path in ROOT.glob("*.py")} | {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): str(path.relative_to(ROOT))
    for folder in ("benchmarks", "tools")
    for path in (ROOT / folder).rglob("*.py")
}
# Of programs of other projects, which the text names too.
FOREIGN_FLAGS = {
    *("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "cpu", "quiet"),
    *("exclude", "nproc_per_node", "nnodes", "node_rank", "master_addr", "dynamo_backend", "compress", "check"),
    # clip-retrieval and img2dataset
    *("input_dataset", "input_format", "num_prepro_workers", "distribution_strategy", "distributor", "enable_text"),
    *("provide_aesthetic_embeddings", "aesthetic_weight"),
}
FLAG = r"(?<![\w=-])--([a-z][a-z0-9_]+)"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_flags_that_its_program_knows(page: str) -> None:
    for block in blocks_of(page):
        if block.language != "bash":
            continue
        for command in re.split(r"\n(?!\s)", re.sub(r"\s#.*", "", block.text.replace("\\\n", " "))):
            named = re.search(r"-m ([\w.]+)|(?<![\w/])(\w+\.py)\b", command)
            program = named and PROGRAMS.get(named[1] or named[2])
            if named and program:
                known = flags_of(program)
                if program.startswith("benchmarks"):
                    known |= flags_of("train_custom_diffusion.py")  # it passes on what it does not know
                assert set(re.findall(FLAG, command[named.end() :])) <= known, command


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_the_text_exists(page: str) -> None:
    known = FOREIGN_FLAGS.union(*map(flags_of, PROGRAMS.values()))
    assert set(re.findall(FLAG, prose_of(page))) <= known


# --- promises ------------------------------------------------------------------------------------


@functools.cache
def cases_in(name: str) -> dict[str, bool]:
    """The tests of a file, and whether `make test` runs them, or some of their cases."""
    found = {}
    for node in ast.parse((ROOT / "tests" / name).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = {ast.unparse(mark) for mark in node.decorator_list}
            found[node.name] = not marks & {"pytest.mark.long", "pytest.mark.learning", "learning"}
    return found


def test_every_promise_has_a_test_and_make_test_tries_it() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|.*\|$", (ROOT / "docs" / "reliability.md").read_text(), re.MULTILINE)
    rows = [row for row in rows if row[0] not in ("promise", "---")]
    assert len(rows) >= 20
    for promise, text in rows:
        tried = []
        for file, test in re.findall(r"`(?:(test_\w+\.py))?(?:::)?(test_\w+)?`", text):
            files = [file] if file else [path.name for path in (ROOT / "tests").glob("test_*.py")]
            found = [short for name in files for known, short in cases_in(name).items() if test in ("", known)]
            assert found, f"{promise}: there is no {file}::{test}"
            tried += found
        assert any(tried), f"`make test` does not try: {promise}"


# --- the commands --------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
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


def run_block(block: str, home: Path, model: str | Path = "", **environment: str) -> str:
    """Run a block in `home` with the base model `model`; gives what it printed."""
    if " ... " in block:  # in place of the command that the page speaks of
        training = commands(*TRAINING)
        exports, _, its_flags = training.partition("accelerate launch train_custom_diffusion.py ")
        block = exports + block.replace(" ... ", f" {its_flags.strip()} ")
    block = re.sub(r"MODEL_NAME=.*", f"MODEL_NAME={model}", block)
    for pattern, replacement in SMALLER:
        block = re.sub(pattern, replacement, block)
    result = run_script("bash", "-euc", block, cwd=home, **environment)
    assert result.returncode == 0, f"{block}\n{result.stderr[-3000:]}"
    return result.stdout


def tokens_of(folder: Path) -> list[str]:
    from custom_diffusion import load_concept

    return list(load_concept(folder).tokens)


def test_the_readmes_commands_for_one_concept(home: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(home / "class_images")  # generated class images
    run_block(commands(*TRAINING), home, base_model)
    assert tokens_of(home / "custom-diffusion-model") == ["<new1>"]
    run_block(commands(*INFERENCE), home)
    assert (home / "samples" / "00000_new1-cat-sitting-in-a-bucket_seed42.png").is_file()
    assert (home / "samples" / "contact_sheet.png").is_file()
    # And the README's Python, on a CPU.
    (block,) = (block.text for block in blocks_of("README.md") if block.language == "python")
    for pattern, replacement in (
        ("CompVis/stable-diffusion-v1-4", str(base_model)),
        ("float16", "float32"),
        ('.to("cuda")', ""),
        ("num_inference_steps=100", "num_inference_steps=2"),
    ):
        assert pattern in block
        block = block.replace(pattern, replacement)
    monkeypatch.chdir(home)
    names: dict[str, object] = {}
    exec(block, names)
    assert names["image"].size == (64, 64)


@pytest.mark.long
def test_the_readmes_commands_that_go_on_from_there(home: Path, base_model: Path, images: Path) -> None:
    shutil.rmtree(home / "class_images")
    run_block(commands(*REAL_IMAGES), home, base_model)
    assert len(list((home / "real_reg/samples_cat/images").iterdir())) == 3, "none was generated"
    printed = run_block(commands(*EXPORT), home)
    assert (home / "my-cat" / "my-cat.safetensors").is_file(), printed
    shutil.rmtree(home / "custom-diffusion-model")
    run_block(commands(*RESUME), home, base_model)
    assert tokens_of(home / "custom-diffusion-model") == ["<new1>"]


@pytest.mark.long
def test_the_commands_for_stable_diffusion_xl(home: Path, base_model_xl: Path) -> None:
    block = commands(*XL)
    for pattern, replacement in (
        ("stabilityai/stable-diffusion-xl-base-1.0", str(base_model_xl)),
        ("madebyollin/sdxl-vae-fp16-fix", str(base_model_xl / "vae")),
        ("--mixed_precision=bf16", "--mixed_precision=bf16 --resolution=64"),
    ):
        assert pattern in block
        block = block.replace(pattern, replacement)
    run_block(block, home)
    assert tokens_of(home / "xl-cat") == ["<new1>"]
    assert len(list((home / "samples").glob("0*.png"))) == 1


@pytest.mark.long
def test_the_commands_for_the_small_model(home: Path) -> None:
    shutil.rmtree(home / "real_reg")
    shutil.rmtree(home / "examples")
    for folder in ("base", "examples"):
        (home / folder).symlink_to(ROOT / folder)
    run_block(commands(*SMALL_MODEL), home)
    assert all(tokens_of(home / name) == ["<new1>"] for name in ("emoji-cat", "emoji-cat-weighed"))
    assert len(list((home / "samples").glob("0*.png"))) == 8
    assert commands(*KEEP) in commands(*SMALL_MODEL), "the same command, which has just run"


@pytest.mark.long
def test_the_commands_for_concepts_that_act_at_their_own_words(home: Path) -> None:
    shutil.rmtree(home / "examples")
    for folder in ("base", "examples"):
        (home / folder).symlink_to(ROOT / folder)
    run_block(commands(*GATED), home)
    assert "misses" in run_block(commands(*UNGATED), home)
    assert (home / "cat-lora" / "cat-lora.safetensors").exists()
    assert {name: tokens_of(home / name) for name in ("gated-cat", "gated-plant")} == {
        "gated-cat": ["<new1>"],
        "gated-plant": ["<new2>"],
    }
    assert len(list((home / "samples").glob("0*.png"))) == 4


@pytest.mark.long
def test_the_commands_for_masks(home: Path) -> None:
    shutil.rmtree(home / "examples")
    for folder in ("base", "examples"):
        (home / folder).symlink_to(ROOT / folder)
    run_block(commands(*MASKS), home)
    assert tokens_of(home / "masked-concepts") == ["<new1>", "<new2>"]
    settings = json.loads((home / "masked-concepts" / "training_settings.json").read_text())
    assert [name for name, _ in settings["masks"]] == 2 * [f"{number}.png" for number in range(1, 6)]


@pytest.mark.long
def test_the_readmes_commands_for_several_concepts(home: Path, base_model: Path) -> None:
    shutil.rmtree(home / "class_images")  # generated class images this time
    run_block(f"MODEL_NAME={base_model}\n{commands(*SEVERAL)}", home, base_model)
    assert tokens_of(home / "two-concepts") == ["<new1>", "<new2>"]
    assert len(list((home / "samples").glob("0*.png"))) == 1


def test_the_command_for_own_images(home: Path) -> None:
    shutil.rmtree(home / "real_reg")
    (home / "my_images" / "cats").mkdir(parents=True)
    for number in range(3):  # near-duplicates would be left out
        cells = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((300, 300)).save(home / "my_images" / "cats" / f"{number}.jpg")
        (home / "my_images" / "cats" / f"{number}.txt").write_text(f"cat number {number}")
    run_block(f"{commands(*OWN_IMAGES).strip()} --num_class_images 3", home)
    captions = (home / "real_reg/samples_cat/caption.txt").read_text().splitlines()
    assert sorted(captions) == [f"cat number {number}" for number in range(3)]


@pytest.mark.long
def test_the_commands_for_finished_concepts(
    home: Path, hub: Hub, trained: Path, base_model: Path, images: Path, train_here: Callable[[list[str]], None]
) -> None:
    for name in ("custom-diffusion-model", "cat-model"):
        shutil.copytree(trained, home / name)
    prompt = "photo of a <new1> wooden pot"
    train_here(flags(base_model, images, home / "pot-model", instance_prompt=prompt, learning_rate=1e-2))
    run_block(commands(*MERGE), home)
    assert tokens_of(home / "cat-and-pot") == ["<new1>", "<new2>"]
    hub.files["owner/name@v1"] = {
        path.name: path.read_bytes() for path in trained.iterdir() if path.is_file() and path.suffix != ".bin"
    }
    run_block(commands(*SHARE), home, **online(hub, home))
    assert len(list((home / "samples").glob("0*.png"))) == 2, "of the merged concept and of the one on the Hub"
    shutil.rmtree(home / "my-cat")  # the next block makes it again
    printed = run_block("\n".join(commands(*words) for words in (TABLE, COMFY, DELTA)), home)
    assert "| 60% |" in printed
    for name in ("my-cat/my-cat.safetensors", "cat-delta/delta.bin", "cat-small/compressed_delta.bin"):
        assert (home / name).is_file()
    run_block(commands(*CONFIG), home)
    assert tokens_of(home / "cat-model-2") == ["<new1>"]


@pytest.fixture
def hub(base_model: Path) -> Iterator[Hub]:
    server = Hub()
    server.files["CompVis/stable-diffusion-v1-4"] = {
        str(path.relative_to(base_model)): path.read_bytes() for path in base_model.rglob("*") if path.is_file()
    }
    yield server
    server.shutdown()


def online(hub: Hub, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "cache"), "HF_TOKEN": "hf_x"}


# The two commands of diffusers' documentation of its example (docs/source/en/training/custom_diffusion.md).
DIFFUSERS_COMMANDS = {
    "<new1>": r"""
export MODEL_NAME="CompVis/stable-diffusion-v1-4"
export OUTPUT_DIR="path-to-save-model"
export INSTANCE_DIR="./data/cat"

accelerate launch train_custom_diffusion.py \
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --instance_data_dir=$INSTANCE_DIR \
  --output_dir=$OUTPUT_DIR \
  --class_data_dir=./real_reg/samples_cat/ \
  --with_prior_preservation \
  --real_prior \
  --prior_loss_weight=1.0 \
  --class_prompt="cat" \
  --num_class_images=200 \
  --instance_prompt="photo of a <new1> cat"  \
  --resolution=512  \
  --train_batch_size=2  \
  --learning_rate=1e-5  \
  --lr_warmup_steps=0 \
  --max_train_steps=250 \
  --scale_lr \
  --hflip  \
  --modifier_token "<new1>" \
  --validation_prompt="<new1> cat sitting in a bucket" \
  --report_to="wandb" \
  --push_to_hub
""",
    "<new1>+<new2>": r"""
export MODEL_NAME="CompVis/stable-diffusion-v1-4"
export OUTPUT_DIR="path-to-save-model"

accelerate launch train_custom_diffusion.py \
  --pretrained_model_name_or_path=$MODEL_NAME  \
  --output_dir=$OUTPUT_DIR \
  --concepts_list=./concept_list.json \
  --with_prior_preservation \
  --real_prior \
  --prior_loss_weight=1.0 \
  --resolution=512  \
  --train_batch_size=2  \
  --learning_rate=1e-5  \
  --lr_warmup_steps=0 \
  --max_train_steps=500 \
  --num_class_images=200 \
  --scale_lr \
  --hflip  \
  --modifier_token "<new1>+<new2>" \
  --push_to_hub
""",
}


@pytest.mark.parametrize("tokens", ["<new1>", pytest.param("<new1>+<new2>", marks=pytest.mark.long)])
def test_the_commands_of_diffusers_documentation(tokens: str, home: Path, hub: Hub) -> None:
    environment = online(hub, home) | {"WANDB_DIR": str(home)}
    run_block(DIFFUSERS_COMMANDS[tokens], home, "CompVis/stable-diffusion-v1-4", **environment)
    assert tokens_of(home / "path-to-save-model") == tokens.split("+")
    assert {f"{token}.bin" for token in tokens.split("+")} < set(hub.files["someone/path-to-save-model"])


def test_the_commands_of_the_demo_are_command_lines() -> None:
    programs = {"train_custom_diffusion.py": train_custom_diffusion, "infer.py": infer}
    training = demo.TRAIN.format(noun="cat", token="<new1>")
    images = demo.INFER.format(folders="cat plant", prompts="'a cat'", options="--width=128 ", output="together")
    for text in (demo.UNTRAINED, training, images):
        words = shlex.split(text)
        (place,) = (number for number, word in enumerate(words) if word in programs)
        programs[words[place]].parse_args(words[place + 1 :])
