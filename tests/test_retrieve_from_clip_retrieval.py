"""The whole way with the real clip-retrieval: index, serve, retrieve, train. `make test-retrieval` runs it.

The commands are those of docs/retrieval.md, word for word but for model and ports.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from custom_diffusion.data.concept_list import ConceptEntry
from custom_diffusion.data.images import find_class_images
from custom_diffusion.images import load_image

pytestmark = pytest.mark.retrieval

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = Path(os.environ.get("CLIP_RETRIEVAL_VENV", ROOT / ".venv-clip-retrieval")).absolute()
NUMBER = 60


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def write_images(folder):
    """Captioned photographs, as far as a machine without photographs can make them."""
    folder.mkdir()
    for row in range(NUMBER):
        cells = np.random.default_rng(row).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        image = Image.fromarray(cells).resize((320, 300), Image.Resampling.BICUBIC)
        image.save(folder / f"{row}.jpg", quality=90)
        (folder / f"{row}.txt").write_text(f"a cat, number {row}\n")


def write_clip(folder):
    """A small CLIP with random weights and the real vocabulary, in the layout of transformers."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from tools.base.tokenizer import clip_merges, write_tokenizer

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    vision = small | {"image_size": 64, "patch_size": 16}
    write_tokenizer(folder, clip_merges())
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(folder)


def documented(kind):
    """The commands of one kind in the documentation, one text for each block."""
    text = (ROOT / "docs/retrieval.md").read_text(encoding="utf-8")
    return re.findall(rf"```bash {kind}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """What the documentation says, until `clip-retrieval back` answers; gives its folder and address."""
    if not (ENVIRONMENT / "bin/clip-retrieval").exists():
        pytest.fail(f"there is no clip-retrieval in {ENVIRONMENT}: run this with make test-retrieval")
    folder = tmp_path_factory.mktemp("service")
    write_images(folder / "my_images")
    write_clip(folder / "clip")
    (folder / ".venv-clip-retrieval").symlink_to(ENVIRONMENT)
    ports = {"8000": str(free_port()), "1234": str(free_port())}
    script = "set -euo pipefail\n" + "\n".join(documented("run")) + "\nwait\n"
    for usual, free in ports.items():
        script = script.replace(usual, free)
    assert "clip-retrieval back" in script
    environment = os.environ | {
        "CLIP_MODEL": f"hf_clip:{folder / 'clip'}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        # What is not here must not be waited for.
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "log.txt").open("wb") as log:
        # A session of its own, so that all that the script has started can be ended with it.
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://localhost:{ports['1234']}"
    try:
        wait_for(url, process, folder / "log.txt")
        yield folder, url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def wait_for(url, process, log):
    for _ in range(600):
        if process.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/indices-list", timeout=5) as reply:
                    assert json.loads(reply.read()) == ["my_images"]
                return
            except OSError:
                time.sleep(0.5)
        else:
            break
    pytest.fail(f"clip-retrieval does not answer:\n{log.read_text(errors='replace')[-5000:]}")


def retrieve(folder, url, *arguments):
    command = [sys.executable, ROOT / "retrieve.py", "--class_prompt", "cat", "--url", url, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_images_and_captions_come_from_the_real_service(service, modality):
    folder, url = service
    # A random CLIP takes many images for near-duplicates of each other.
    result = retrieve(folder, url, "--num_class_images", 50, "--modality", modality, "--deduplicate", "False",
                      "--class_data_dir", modality)  # fmt: skip
    assert result.returncode == 0, result.stderr
    concept = ConceptEntry(class_prompt="cat", class_data_dir=str(folder / modality))
    pairs = find_class_images([concept], 50, real_prior=True)
    assert len({caption for _, caption in pairs}) == 50
    for path, caption in pairs:
        number = re.fullmatch(r"a cat, number (\d+)", caption)[1]
        assert path.read_bytes() == (folder / f"my_images/{number}.jpg").read_bytes()


def test_the_service_leaves_out_what_it_takes_for_duplicates(service):
    folder, url = service
    result = retrieve(folder, url, "--num_class_images", NUMBER, "--class_data_dir", "deduplicated")
    found = len(list((folder / "deduplicated/images").iterdir()))
    assert 1 <= found < NUMBER and result.returncode == 1
    assert f"{found} of the {NUMBER} images of 'cat' found, and there are no more" in result.stderr.splitlines()[-1]


def test_wrong_questions_get_clear_answers(service):
    folder, url = service
    result = retrieve(folder, url, "--indice_name", "laion_400m", "--class_data_dir", "x")
    assert result.returncode == 1 and "no index 'laion_400m', but: my_images" in result.stderr


def test_images_inside_the_reply(service):
    """An index over files, without captions: the service sends the images themselves."""
    folder, _ = service
    port, environment = free_port(), os.environ | {"HF_HUB_OFFLINE": "1"}
    program, model = str(ENVIRONMENT / "bin/clip-retrieval"), f"hf_clip:{folder / 'clip'}"
    for command in (
        ["inference", "--input_dataset", "my_images", "--input_format", "files", "--enable_text", "False",
         "--output_folder", "files_embeddings", "--clip_model", model, "--num_prepro_workers", "1"],
        ["index", "--embeddings_folder", "files_embeddings", "--index_folder", "files_index"],
    ):  # fmt: skip
        done = subprocess.run([program, *command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    (folder / "files.json").write_text(json.dumps({"my_images": "files_index"}))
    with (folder / "files.txt").open("wb") as log:
        process = subprocess.Popen(
            [program, "back", "--port", str(port), "--indices_paths", "files.json", "--clip_model", model,
             "--enable_mclip_option", "False", "--provide_aesthetic_embeddings", "False", "--use_jit", "False"],
            cwd=folder, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_for(f"http://localhost:{port}", process, folder / "files.txt")
        result = retrieve(folder, f"http://localhost:{port}", "--num_class_images", 50, "--deduplicate", "False",
                          "--class_data_dir", "inside")  # fmt: skip
    finally:
        process.terminate()
        process.wait(timeout=30)
    assert result.returncode == 0, result.stderr
    assert (folder / "inside/caption.txt").read_text() == "cat\n" * 50
    assert "/knn-service#id=" in (folder / "inside/urls.txt").read_text().splitlines()[0]
    assert all(load_image(path).size == (320, 300) for path in (folder / "inside/images").iterdir())


def test_two_steps_of_training_on_the_result(service, tmp_path):
    from benchmarks.random_model import build_random_model

    folder, url = service
    ask = documented("ask")[0].replace("http://localhost:1234", url).split()
    assert ask[:2] == ["python", "retrieve.py"]
    arguments = ["--num_class_images", "50", "--deduplicate", "False"]
    done = subprocess.run([sys.executable, ROOT / ask[1], *ask[2:], *arguments], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    model = build_random_model("tiny", tmp_path / "model")
    (tmp_path / "cat").mkdir()
    load_image(folder / "my_images/0.jpg").save(tmp_path / "cat/0.png")
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1",
            ROOT / "train_custom_diffusion.py", f"--pretrained_model_name_or_path={model}", "--instance_data_dir=cat",
            "--instance_prompt=photo of a <new1> cat", "--modifier_token=<new1>", "--with_prior_preservation",
            "--real_prior", "--class_prompt=cat", "--class_data_dir=real_reg/samples_cat", "--num_class_images=50",
            "--resolution=64", "--train_batch_size=2", "--max_train_steps=2", "--output_dir=concept",
            "--report_to=none", "--dataloader_num_workers=0",
        ],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "50 class images" in done.stdout + done.stderr
    assert (tmp_path / "concept/pytorch_custom_diffusion_weights.safetensors").is_file()
