"""--push_to_hub sends exactly the result, and infer.py reads it from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from concept import load_concept
from tests.conftest import ROOT, flags, run_script
from tests.hub_server import Hub

WEIGHTS = "pytorch_custom_diffusion_weights"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}


def test_push_and_load_again(hub: Hub, base_model: Path, pictures: Path, tmp_path: Path) -> None:
    # The base model is on the Hub too, so that the card may name it.
    hub.files["someone/tiny"] = {
        str(path.relative_to(base_model)): path.read_bytes() for path in base_model.rglob("*") if path.is_file()
    }
    argv = flags(base_model, pictures, tmp_path / "my-cat", pretrained_model_name_or_path="someone/tiny")
    argv += ["--push_to_hub", "--hub_token=hf_secret", "--validation_prompt=<new1>", "--num_validation_images=1"]
    script = ROOT / "train_custom_diffusion.py"
    result = run_script("python", script, *argv, "--checkpointing_steps=1", **environment(hub, tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    assert f"{hub.url}/someone/my-cat" in result.stdout

    sent = hub.files["someone/my-cat"]
    assert set(sent) == {
        f"{WEIGHTS}.bin",
        f"{WEIGHTS}.safetensors",
        "<new1>.bin",
        "<new1>.safetensors",
        "README.md",
        "image_0.png",
    }
    for name, content in sent.items():
        assert content == (tmp_path / "my-cat" / name).read_bytes(), name
        assert b"hf_secret" not in content
    assert "Bearer hf_secret" in hub.tokens
    assert ModelCard.load(tmp_path / "my-cat" / "README.md").data.base_model == "someone/tiny"

    hub.seen.clear()
    argv = ["--prompt", "<new1>", "--model_dir", "someone/my-cat", "--num_inference_steps", "2"]
    result = run_script("python", ROOT / "infer.py", *argv, cwd=tmp_path, **environment(hub, tmp_path / "another-home"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "samples" / "00000_new1_seed42.png").is_file()
    assert not [line for line in hub.seen if ".bin" in line], "no pickle is fetched where safetensors are"


def test_a_local_base_model_stays_private_and_a_refused_upload_loses_nothing(
    hub: Hub, base_model: Path, pictures: Path, tmp_path: Path
) -> None:
    argv = [*flags(base_model, pictures, tmp_path / "out"), "--push_to_hub", "--hub_model_id=mine"]
    script = ROOT / "train_custom_diffusion.py"
    result = run_script("python", script, *argv, **environment(hub, tmp_path / "home"))
    assert result.returncode == 0, result.stderr
    card = hub.files["someone/mine"]["README.md"].decode()
    assert str(base_model) not in card
    assert load_concept(tmp_path / "out").base_model == str(base_model)

    hub.refuses_commits = True
    result = run_script("python", script, *argv, **environment(hub, tmp_path / "home"))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the upload to 'someone/mine' failed")
    assert "hf upload someone/mine" in last
    assert load_concept(tmp_path / "out").tokens


def test_a_hub_that_refuses_is_noticed_before_training(
    hub: Hub, base_model: Path, pictures: Path, tmp_path: Path
) -> None:
    hub.shutdown()
    hub.server_close()
    argv = [*flags(base_model, pictures, tmp_path / "out"), "--push_to_hub"]
    script = ROOT / "train_custom_diffusion.py"
    result = run_script("python", script, *argv, **environment(hub, tmp_path / "home"))
    assert result.returncode == 1
    assert "error: --push_to_hub: the Hub does not let us make 'out'" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
