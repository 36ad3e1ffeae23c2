"""--push_to_hub sends exactly the result, and infer.py reads it from there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from custom_diffusion.concept.cards import model_card
from custom_diffusion.concept.files import Concept, load_concept, save_concept
from custom_diffusion.concept.formats import key_of_parameter
from custom_diffusion.concept.projections import original_projections
from custom_diffusion.models.base_model import BaseModel
from tests.conftest import ROOT, flags, run_script
from tests.hub_server import Hub, card_errors

WEIGHTS = "pytorch_custom_diffusion_weights"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    yield server
    server.shutdown()


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}


def vector_of(folder: Path) -> torch.Tensor:
    return load_concept(folder).tokens["<new1>"]["text_encoder"]


def test_push_and_load_again(hub: Hub, base_model: Path, images: Path, tmp_path: Path) -> None:
    # The base model is on the Hub too, so that the card may name it.
    hub.files["someone/tiny"] = {
        str(path.relative_to(base_model)): path.read_bytes() for path in base_model.rglob("*") if path.is_file()
    }
    argv = flags(base_model, images, tmp_path / "my-cat", pretrained_model_name_or_path="someone/tiny")
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
    # A run that repeats it with --config goes into a repository of its own.
    assert "hub_model_id" not in (tmp_path / "my-cat" / "config.yaml").read_text()
    card = ModelCard.load(tmp_path / "my-cat" / "README.md").data
    assert card.base_model == "someone/tiny"
    assert card.to_dict()["widget"] == [{"text": "<new1>", "output": {"url": "image_0.png"}}]
    assert card.instance_prompt == "photo of a <new1> cat"

    hub.seen.clear()
    argv = ["--prompt", "<new1>", "--model_dir", "someone/my-cat", "--num_inference_steps", "2"]
    result = run_script("python", ROOT / "infer.py", *argv, cwd=tmp_path, **environment(hub, tmp_path / "another-home"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "samples" / "00000_new1_seed42.png").is_file()
    assert not [line for line in hub.seen if ".bin" in line], "no pickle is fetched where safetensors are"

    # Somebody's hundreds of gigabytes are not fetched.
    code = (
        "from custom_diffusion.concept import files; files.MOST_DOWNLOADED_BYTES = 1000; "
        "files.load_concept('someone/my-cat')"
    )
    result = run_script("python", "-c", code, **environment(hub, tmp_path / "third-home"))
    assert "no concept is that large, refused" in result.stderr
    assert not list((tmp_path / "third-home").rglob("*.safetensors"))


def test_a_local_base_model_stays_private_and_a_refused_upload_loses_nothing(
    hub: Hub, base_model: Path, images: Path, tmp_path: Path
) -> None:
    argv = [*flags(base_model, images, tmp_path / "out"), "--push_to_hub", "--hub_model_id=mine"]
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
    hub: Hub, base_model: Path, images: Path, tmp_path: Path
) -> None:
    hub.shutdown()
    hub.server_close()
    argv = [*flags(base_model, images, tmp_path / "out"), "--push_to_hub"]
    script = ROOT / "train_custom_diffusion.py"
    result = run_script("python", script, *argv, **environment(hub, tmp_path / "home"))
    assert result.returncode == 1
    assert "error: --push_to_hub: the Hub does not let us make 'out'" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def put(hub: Hub, name: str, folder: Path) -> None:
    """A folder's files as a repository, as an earlier upload left them."""
    hub.files[name] = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_every_command_reads_a_revision(hub: Hub, base_model: Path, tmp_path: Path) -> None:
    put(hub, "someone/tiny", base_model)
    keys = [
        key_of_parameter(name)
        for name, _ in StableDiffusionPipeline.from_pretrained(base_model).unet.named_parameters()
        if "attn2.to_k" in name or "attn2.to_v" in name
    ]
    projections = original_projections(BaseModel(str(base_model)), keys)
    for number, (name, word) in enumerate([("cat", "cat"), ("cat@v1", "cat"), ("pot@v1", "wooden pot")], 1):
        torch.manual_seed(number)
        attention = {key: value + 0.02 * torch.randn_like(value) for key, value in projections.items()}
        concept = Concept(attention, {"<new1>": {"text_encoder": torch.randn(32)}}, "someone/tiny")
        folder = tmp_path / name
        save_concept(concept, folder, bin_too=False)
        (folder / "README.md").write_text(model_card(concept, [f"photo of a <new1> {word}"], {}))
        put(hub, f"someone/{name}", folder)

    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    delta = {"unet": {name: torch.randn(32, 32)}, "modifier_token": {"<new1>": torch.randn(32)}}
    torch.save(delta, tmp_path / "delta.bin")
    hub.files["someone/theirs"] = {"delta.bin": (tmp_path / "delta.bin").read_bytes()}

    images = ["--prompt", "<new1> cat", "--num_inference_steps=2"]
    theirs = ["someone/theirs", "--pretrained_model_name_or_path", "someone/tiny"]
    run_commands(
        [
            ("merge", "--model_dir", "someone/cat@v1", "someone/pot@v1", "--output_dir=both", "--num_captions=100"),
            ("export", "--model_dir", "someone/cat@v1", "--format=lora"),
            ("infer", "--model_dir", "someone/cat", "--output_dir=latest", *images),
            ("infer", "--model_dir", "someone/cat@v1", "--output_dir=v1", *images),
            ("infer", "--model_dir", *theirs, "--output_dir=theirs", *images),
        ],
        tmp_path,
        environment(hub, tmp_path / "home"),
    )
    both = load_concept(tmp_path / "both")
    assert both.base_model == "someone/tiny"
    assert torch.equal(both.tokens["<new1>"]["text_encoder"], vector_of(tmp_path / "cat@v1"))
    assert torch.equal(both.tokens["<new2>"]["text_encoder"], vector_of(tmp_path / "pot@v1"))
    assert card_errors((tmp_path / "cat-lora" / "README.md").read_text()) == []
    words = load_file(tmp_path / "cat-lora" / "new1.safetensors")["emb_params"]
    assert torch.equal(words[0], vector_of(tmp_path / "cat@v1"))
    made = {next((tmp_path / name).glob("0*.png")).read_bytes() for name in ("latest", "v1", "theirs")}
    assert len(made) == 3, "each is another concept"

    missing = ["--model_dir", "someone/cat@v9", "--prompt", "<new1>"]
    result = run_script("python", ROOT / "infer.py", *missing, cwd=tmp_path, **environment(hub, tmp_path / "home"))
    assert result.returncode == 1
    assert "error: there is no folder 'someone/cat@v9', and the Hub does not give it either" in result.stderr


def run_commands(commands: list[tuple[str, ...]], cwd: Path, variables: dict[str, str]) -> None:
    """Run commands one after the other in one process of their own: the Hub's address is read on import."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport export, infer, merge\n"
    code += "".join(f"{name}.main({argv!r})\n" for name, *argv in commands)
    result = run_script("python", "-c", code, cwd=cwd, **variables)
    assert result.returncode == 0, result.stderr


@pytest.mark.long
def test_a_dataset_of_the_hub_in_place_of_a_folder(hub: Hub, base_model: Path, images: Path, tmp_path: Path) -> None:
    files = {f"train/{path.name}": path.read_bytes() for path in sorted(images.iterdir())[:3]}
    captions = [json.dumps({"file_name": f"{number}.png", "text": f"<new1> cat, {number}"}) for number in range(3)]
    hub.files["someone/cats"] = files | {"train/metadata.jsonl": "\n".join(captions).encode()}
    script, home = ROOT / "train_custom_diffusion.py", tmp_path / "home"
    online = environment(hub, home) | {"HF_DATASETS_OFFLINE": "0"}
    argv = flags(base_model, images, tmp_path / "out", instance_data_dir="someone/cats")
    result = run_script("python", script, *argv, **online)
    assert result.returncode == 0, result.stderr
    assert "3 of 3 images" in result.stderr
    folder = home / "custom-diffusion" / "someone--cats"
    assert [(folder / f"{number:05d}.txt").read_text() for number in range(3)] == [
        f"<new1> cat, {number}" for number in range(3)
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["someone--cats"], "no temporary folder stays"

    argv = flags(base_model, images, tmp_path / "out", instance_data_dir="someone/dogs")
    result = run_script("python", script, *argv, **online)
    assert result.returncode == 1
    assert "error: there is no folder 'someone/dogs' (instance_data_dir), and no such dataset" in result.stderr
    assert "Traceback" not in result.stderr


# --- cards ---------------------------------------------------------------------------------------


def small_concept(**more: Any) -> Concept:
    return Concept({}, {"<new1>": {"text_encoder": torch.ones(3)}}, "someone/tiny", instance_prompt="a <new1>", **more)


def test_a_card_keeps_what_it_takes_to_load_the_base_model(tmp_path: Path) -> None:
    told = {"base_revision": "v2", "base_variant": "fp16", "base_tokenizer": "someone/words"}
    for number, more in enumerate(({}, told)):
        concept, folder = small_concept(**more), tmp_path / str(number)
        save_concept(concept, folder)
        card = model_card(concept, ["a <new1>"], {})
        assert card_errors(card) == []
        (folder / "README.md").write_text(card)
        read = load_concept(folder)
        names = ("base_model", "base_revision", "base_variant", "base_tokenizer", "instance_prompt")
        assert [getattr(read, name) for name in names] == [getattr(concept, name) for name in names]
        python = card.split("```python\n")[1].split("```")[0]
        compile(python, "card", "exec")
        if more:
            assert 'revision="v2", variant="fp16", tokenizer=CLIPTokenizer.from_pretrained("someone/words")' in python
        else:
            assert "revision" not in card and "variant" not in card


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_card_loads_the_files_beside_it(ending: str, tmp_path: Path) -> None:
    concept = small_concept()
    concept.attention["down_blocks.0.attn2.processor.to_k_custom_diffusion.weight"] = torch.ones(2, 3)
    options = {} if ending == "safetensors" else {"ending": ending}
    files = save_concept(concept, tmp_path, safetensors_too=ending == "safetensors", bin_too=ending == "bin")
    card = model_card(concept, ["a <new1>"], {}, **options)
    assert sorted(re.findall(r'weight_name="(.+?)"', card)) == sorted(files)
    assert 'cross_attention_kwargs={"scale": ...}` has no effect' in card


def test_what_is_public_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    here = str(tmp_path)
    assert small_concept(base_tokenizer=here).without_local_paths().base_tokenizer is None
    assert small_concept(base_tokenizer="a/b").without_local_paths().base_tokenizer == "a/b"
    local = replace(small_concept(base_revision="x", base_variant="fp16"), base_model=here).without_local_paths()
    assert (local.base_model, local.base_revision, local.base_variant) == (None, None, None)
