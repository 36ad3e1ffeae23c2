"""--rank: what is trained is a LoRA, and it opens everywhere the whole projections do."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import export
import infer
import merge
from custom_diffusion.concept import formats
from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.exporting import trained_lora
from custom_diffusion.concept.files import Concept, load_concept, save_concept
from custom_diffusion.concept.low_rank import LowRank
from custom_diffusion.concept.projections import complete, original_projections
from custom_diffusion.errors import UserError
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.training.attention import LowRankAttnProcessor
from tests.conftest import draw_images, flags, prepare, run_script, train
from tests.hub_server import Hub
from tests.test_concept import load, make_image
from tests.test_distributed import relative_difference, two_processes
from tests.test_model import batch
from tests.test_model import load as load_objective

Train = Callable[[list[str]], None]
WEIGHTS = "pytorch_custom_diffusion_weights"
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight"
STEM = KEY.replace("_custom_diffusion.weight", "_low_rank")


@pytest.fixture(scope="module")
def cat(base_model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values, with an alpha that is not the rank."""
    folder = tmp_path_factory.mktemp("cat")
    more = {"rank": 2, "rank_alpha": 3, "learning_rate": 1e-2, "max_train_steps": 4, "checkpointing_steps": 2}
    train(flags(base_model, images, folder, **more))
    return folder


@pytest.fixture(scope="module")
def face(base_model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries and outputs too, in bf16."""
    folder = tmp_path_factory.mktemp("face")
    more = {"rank": 4, "freeze_model": "crossattn", "mixed_precision": "bf16", "learning_rate": 1e-2}
    train(flags(base_model, images, folder, **more, gradient_checkpointing=True))
    return folder


def run(*argv: object) -> None:
    export.main([str(part) for part in argv])


def with_concept(base: Path, concept: Concept, scale: float = 1.0) -> np.ndarray:
    pipeline = load(base)
    apply_concepts(pipeline, concept, scale=scale)
    return make_image(pipeline)


def completed(folder: Path, base: Path) -> Concept:
    concept = load_concept(folder)
    return complete(concept, original_projections(BaseModel(str(base)), concept.projections()))


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / f"{WEIGHTS}.safetensors").read_bytes()).hexdigest()


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_q_out", [False, True])
def test_before_the_first_step_it_is_the_base_model_to_the_bit(base_model: Path, train_q_out: bool) -> None:
    plain = UNet2DConditionModel.from_pretrained(base_model / "unet")
    whole = load_objective(base_model, train_q_out=train_q_out)
    narrow = load_objective(base_model, train_q_out=train_q_out, rank=4)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with torch.no_grad():
        assert torch.equal(narrow.unet(latents, 5, text).sample, plain(latents, 5, text).sample)
        assert torch.equal(narrow(**batch(narrow))[0], whole(**batch(whole))[0])


@pytest.mark.parametrize(("train_q_out", "projections"), [(False, {"k", "v"}), (True, {"k", "v", "q", "out"})])
def test_only_the_factors_are_trained(base_model: Path, train_q_out: bool, projections: set[str]) -> None:
    model = load_objective(base_model, train_q_out=train_q_out, rank=2)
    model.cast_frozen(torch.bfloat16)
    trained = {name: value for name, value in model.trained().items() if not name.startswith("text_encoders.")}
    assert {name.split(".to_")[1].split("_low_rank")[0] for name in trained} == projections
    assert all(name.endswith(("up.weight", "down.weight")) for name in trained), "no biases"
    assert all(value.dtype == torch.float32 for value in trained.values())
    layer = model.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert layer.to_k.weight.dtype == layer.to_out[0].bias.dtype == torch.bfloat16, "the frozen projection stays"
    assert not layer.to_k.weight.requires_grad
    model(**batch(model))[0].backward()
    moving = [name for name, value in trained.items() if value.grad.abs().max() > 0]
    assert moving == [name for name in trained if name.endswith("up.weight")], "up is zero, so down waits a step"


def test_what_it_learns_is_the_gradient_of_the_whole_projection(base_model: Path) -> None:
    # With down as it is, the gradient of up is scale * G down^T, G being that of the whole projection.
    whole, narrow = load_objective(base_model), load_objective(base_model, rank=3, alpha=6.0)
    for model in (whole, narrow):
        model(**batch(model))[0].backward()
    for name, processor in narrow.unet.attn_processors.items():
        if isinstance(processor, LowRankAttnProcessor):
            full = whole.unet.attn_processors[name].to_v_custom_diffusion.weight.grad
            change = processor.to_v_low_rank
            assert torch.allclose(change.up.weight.grad, 2 * full @ change.down.weight.T, rtol=1e-3, atol=1e-6)


def test_the_start_token_gives_no_gradient(base_model: Path) -> None:
    model = load_objective(base_model, rank=2)
    layer = model.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    with torch.no_grad():
        layer.processor.to_v_low_rank.up.weight.normal_()
        layer.processor.to_k_low_rank.up.weight.normal_()
    text = torch.randn(1, 6, 32, requires_grad=True)
    layer(torch.randn(1, 9, 16), encoder_hidden_states=text).square().sum().backward()
    assert text.grad[0, 0].abs().max() == 0
    assert text.grad[0, 1:].abs().min() > 0
    model.zero_grad()
    layer(torch.randn(1, 9, 16), encoder_hidden_states=text[:, :1]).square().sum().backward()
    for change in (layer.processor.to_k_low_rank, layer.processor.to_v_low_rank):
        assert change.up.weight.grad.abs().max() == change.down.weight.grad.abs().max() == 0


def test_weight_decay_pulls_toward_the_base_model(base_model: Path, images: Path, tmp_path: Path) -> None:
    run = prepare(flags(base_model, images, tmp_path, rank=2, learning_rate=0.1, adam_weight_decay=1))
    trained = {name: value for name, value in run.module.trained().items() if "low_rank" in name}
    with torch.no_grad():
        for value in trained.values():
            value.fill_(1)
            value.grad = torch.zeros_like(value)
    before = run.learned().differences[KEY].whole()
    run.optimizer.step()
    after = run.learned().differences[KEY].whole()
    assert torch.allclose(after, before * 0.9**2), "the change shrinks, and W0 is not touched"


def test_checkpoints_and_optimizer_are_as_small_as_what_is_trained(cat: Path) -> None:
    values = sum(value.numel() for value in load_concept(cat).tensors().values())
    size = sum(path.stat().st_size for path in (cat / "checkpoint-4").rglob("*") if path.is_file())
    assert size < 3 * 4 * values + 70_000  # as in test_training.py, with longer names
    run = torch.load(cat / "checkpoint-4" / "training_state" / "optimizer.bin", weights_only=True)
    assert sum(state["exp_avg"].numel() for state in run["state"].values()) == values


def test_a_resumed_run_ends_bit_equal(
    cat: Path, base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    shutil.copytree(cat / "checkpoint-2", tmp_path / "checkpoint-2")
    more = {"rank": 2, "rank_alpha": 3, "learning_rate": 1e-2, "max_train_steps": 4}
    train_here(flags(base_model, images, tmp_path, **more, resume_from_checkpoint="latest"))
    assert digest(tmp_path) == digest(cat)


@pytest.mark.parametrize(
    ("more", "words"),
    [({}, "--rank"), ({"rank": 3, "rank_alpha": 3}, "--rank"), ({"rank": 2}, "--rank_alpha=3")],
)  # fmt: skip
@pytest.mark.parametrize("with_settings", [True, False])
def test_another_rank_is_no_way_to_resume(
    more: dict[str, int], words: str, with_settings: bool, cat: Path, base_model: Path, images: Path, tmp_path: Path,
    train_here: Train,
) -> None:  # fmt: skip
    shutil.copytree(cat / "checkpoint-2", tmp_path / "checkpoint-2")
    if not with_settings:
        (tmp_path / "checkpoint-2" / "training_state" / "training_settings.json").unlink()
    argv = flags(base_model, images, tmp_path, **more, learning_rate=1e-2, resume_from_checkpoint="latest")
    with pytest.raises(UserError, match="rank" if with_settings else words):
        train_here(argv)


def test_a_rank_that_saves_nothing_is_refused(
    base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    with pytest.raises(UserError, match="--rank 16 is no less than the 16"):
        train_here(flags(base_model, images, tmp_path / "out", rank=16))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_two_processes_equal_one(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    more = {"rank": 2, "learning_rate": 1e-2, "max_train_steps": 3}
    assert "difference 0.0\n" in two_processes(*flags(base_model, images, tmp_path / "two", **more))
    train_here(flags(base_model, images, tmp_path / "one", **more, train_batch_size=2))
    one, two = (load_concept(tmp_path / name).tensors() for name in ("one", "two"))
    for name, value in one.items():
        assert relative_difference(value, two[name]) < 3e-4, name


@pytest.mark.long
def test_with_two_concepts_side_by_side(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    draw_images(tmp_path / "pot", 2)
    entries = [
        {"instance_prompt": f"photo of a <new{number}> thing", "instance_data_dir": str(folder)}
        for number, folder in enumerate((images, tmp_path / "pot"), 1)
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    more = {"concepts_list": tmp_path / "list.json", "modifier_token": "<new1>+<new2>", "cutmix_probability": 1}
    train_here(flags(base_model, images, tmp_path / "out", **more, instance_prompt=None, rank=2, train_batch_size=2))
    assert load_concept(tmp_path / "out").differences


# --- the file ------------------------------------------------------------------------------------


def test_the_file_holds_the_factors_and_says_so(cat: Path) -> None:
    for content in (load_file(cat / f"{WEIGHTS}.safetensors"), torch.load(cat / f"{WEIGHTS}.bin", weights_only=True)):
        assert {name for name in content if STEM in name} == {
            f"{STEM}.{part}" for part in ("up.weight", "down.weight", "alpha")
        }
        assert len(content) == 3 * 8, "keys and values of four layers, and nothing else"
        assert content[f"{STEM}.up.weight"].shape == (16, 2)
        assert content[f"{STEM}.down.weight"].shape == (2, 32)
        assert content[f"{STEM}.alpha"].tolist() == [3.0]
        assert {value.dtype for name, value in content.items() if "weight" in name} == {torch.float16}
    unfinished = load_file(cat / "checkpoint-2" / f"{WEIGHTS}.safetensors")
    assert {value.dtype for name, value in unfinished.items() if "weight" in name} == {torch.float32}
    concept = load_concept(cat)
    assert not concept.attention
    difference = concept.differences[KEY]
    assert torch.allclose(difference.whole(), 1.5 * difference.up @ difference.down)


def test_what_is_saved_comes_back(face: Path, tmp_path: Path) -> None:
    concept = load_concept(face)
    assert {key.split(".processor.")[1] for key in concept.differences} == {
        *(f"to_{part}_custom_diffusion.weight" for part in "kvq"), "to_out_custom_diffusion.0.weight"
    }  # fmt: skip
    for number, (safetensors_too, bin_too) in enumerate([(True, False), (False, True)]):
        save_concept(concept, tmp_path / str(number), safetensors_too, bin_too)
        again = load_concept(tmp_path / str(number))
        assert again.tensors().keys() == concept.tensors().keys()
        for name, value in again.tensors().items():
            assert torch.equal(value, concept.tensors()[name])
        assert {key: own.alpha for key, own in again.differences.items()} == dict.fromkeys(concept.differences, 4.0)


def test_diffusers_loader_of_whole_projections_refuses_it(cat: Path, base_model: Path) -> None:
    pipeline = load(base_model)
    with pytest.raises(ValueError, match="not seem to be in the correct format"):
        pipeline.unet.load_attn_procs(cat, weight_name=f"{WEIGHTS}.safetensors", _pipeline=pipeline)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{STEM}.alpha": None}, "has only down.weight and up.weight"),
        ({f"{STEM}.up.weight": torch.ones(16, 3)}, "do not fit each other"),
        ({f"{STEM}.alpha": torch.ones(2)}, "do not fit each other"),
        ({f"{STEM}.alpha": torch.tensor([float("nan")])}, "not finite"),
        ({f"{STEM}.up.weight": torch.full((16, 2), float("nan"))}, "not finite"),
        ({f"{STEM}.alpha": torch.tensor([3j])}, "has no numbers"),
        ({f"{STEM}.down.weight": torch.ones(2, 32, dtype=torch.int64)}, "has no numbers"),
        ({f"{STEM}.mid.weight": torch.ones(2)}, "no part of a low-rank change"),
        ({f"{STEM}.0.alpha": torch.ones(1)}, "no part of a low-rank change"),
        ({"conv_in.weight": torch.ones(2)}, "is no Custom Diffusion file"),
    ],
)
def test_a_bad_file_gets_one_line(
    change: dict[str, torch.Tensor | None], words: str, cat: Path, tmp_path: Path
) -> None:
    content = load_file(cat / f"{WEIGHTS}.safetensors") | change
    content = {name: value for name, value in content.items() if value is not None}
    safetensors.torch.save_file(content, tmp_path / f"{WEIGHTS}.safetensors")
    with pytest.raises(UserError, match=words) as caught:
        load_concept(tmp_path)
    assert "\n" not in str(caught.value)


# --- where it opens ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cat", pytest.param("face", marks=pytest.mark.long)])
def test_it_goes_in_like_whole_projections_and_comes_out_exactly(
    name: str, base_model: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    concept, whole = load_concept(folder), completed(folder, base_model)
    pipeline = load(base_model)
    plain, before = make_image(pipeline), {key: value.clone() for key, value in pipeline.unet.state_dict().items()}
    for scale in (1.0, 0.5):
        applied = apply_concepts(pipeline, concept, scale=scale)
        assert np.array_equal(make_image(pipeline), with_concept(base_model, whole, scale))
        assert not np.array_equal(make_image(pipeline), plain)
        applied.remove()
        assert all(torch.equal(value, before[key]) for key, value in pipeline.unet.state_dict().items())


def test_the_pipeline_draws_what_training_saw(cat: Path, base_model: Path) -> None:
    model = load_objective(base_model, tokens=("<new1>",), rank=2, alpha=3.0)
    concept = load_concept(cat)
    model.restore(concept)
    pipeline = load(base_model)
    apply_concepts(pipeline, concept)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        assert torch.allclose(model.unet(latents, 5, text).sample, pipeline.unet(latents, 5, text).sample, atol=1e-5)


def test_two_concepts_of_their_own_are_refused_and_one_twice_is_not(cat: Path, face: Path, base_model: Path) -> None:
    one, other = load_concept(cat), load_concept(face)
    other = replace(other, tokens={"<new2>": other.tokens["<new1>"]})
    pipeline = load(base_model)
    with pytest.raises(UserError, match=r"merge them with merge\.py"):
        apply_concepts(pipeline, one, other)
    apply_concepts(pipeline, one, replace(one, tokens={"<new2>": one.tokens["<new1>"]}))
    assert np.array_equal(make_image(pipeline), with_concept(base_model, one))


def test_infer_shows_it_and_its_checkpoints(cat: Path, tmp_path: Path) -> None:
    for source in (cat, cat / "checkpoint-2"):
        argv = ["--prompt", "<new1> cat", "--model_dir", source, "--num_inference_steps", "2", "--output_dir", tmp_path]
        infer.main([str(part) for part in argv])
    assert len(list(tmp_path.glob("0*.png"))) == 2


@pytest.mark.long
def test_the_hub_gives_it(cat: Path, tmp_path: Path) -> None:
    hub = Hub()
    hub.files["someone/cat"] = {path.name: path.read_bytes() for path in cat.iterdir() if path.is_file()}
    code = (
        "from custom_diffusion import load_concept; "
        f"print(load_concept('someone/cat').differences[{KEY!r}].up.sum().item())"
    )
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    result = run_script("python", "-c", code, **environment)
    hub.shutdown()
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == load_concept(cat).differences[KEY].up.sum().item()
    assert not [line for line in hub.seen if ".bin" in line], "no pickle is fetched where safetensors are"


def test_it_merges_as_whole_projections_do(cat: Path, base_model: Path, tmp_path: Path) -> None:
    whole = replace(completed(cat, base_model), base_model=str(base_model), instance_prompt="photo of a <new1> cat")
    save_concept(whole, tmp_path / "whole")
    for name, source in (("a", cat), ("b", tmp_path / "whole")):
        argv = ["--model_dir", source, "--class_words", "cat", "--prior_weight", "0.5", "--output_dir", tmp_path / name]
        merge.main([str(part) for part in [*argv, "--pretrained_model_name_or_path", base_model]])
    one, other = (load_concept(tmp_path / name).attention for name in "ab")
    assert one.keys() == other.keys() == whole.attention.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("name", "alpha"), [("cat", 3.0), ("face", 4.0)])
def test_a_lora_holds_the_factors_themselves(
    name: str, alpha: float, base_model: Path, tmp_path: Path, request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    concept = load_concept(request.getfixturevalue(name))
    run("--model_dir", request.getfixturevalue(name), "--format", "lora", "--output_dir", tmp_path / "lora")
    printed = capsys.readouterr()
    assert "the factors as they were trained, in fp32" in printed.out
    assert "warning" not in printed.err, "no biases are lost"
    lora = load_file(tmp_path / "lora" / "lora.safetensors")
    assert len(lora) == 3 * len(concept.differences)
    for key, difference in concept.differences.items():
        theirs = "lora_unet_" + formats.parameter_name(key).removesuffix(".weight").replace(".", "_")
        assert torch.equal(lora[f"{theirs}.lora_up.weight"], difference.up)
        assert torch.equal(lora[f"{theirs}.lora_down.weight"], difference.down)
        assert lora[f"{theirs}.alpha"].item() == alpha
    pipeline = load(base_model)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="lora.safetensors")
    pipeline.load_textual_inversion(tmp_path / "lora", weight_name="new1.safetensors", token="<new1>")
    difference = np.abs(make_image(pipeline) - with_concept(base_model, concept))
    assert difference.max() <= 2


def test_a_lora_in_half_precision_loses_little(face: Path, base_model: Path, tmp_path: Path) -> None:
    concept = load_concept(face)
    # What a short run at a learning rate of 1e-5 leaves: too little for fp16 where one side holds all of it.
    small = {key: replace(own, up=own.up * 1e-6) for key, own in concept.differences.items()}
    run("--model_dir", face, "--format", "lora", "--dtype", "fp16", "--output_dir", tmp_path / "lora")
    assert all(value.dtype == torch.float16 for name, value in load_file(tmp_path / "lora" / "lora.safetensors").items()
               if not name.endswith("alpha"))  # fmt: skip
    args = export.parse_args(["--format", "lora", "--dtype", "fp16"])
    tensors = trained_lora(replace(concept, differences=small), args, lambda name: name.replace(".", "_")).tensors
    for key, own in small.items():
        name = "lora_unet_" + formats.parameter_name(key).removesuffix(".weight").replace(".", "_")
        product = tensors[f"{name}.lora_up.weight"].float() @ tensors[f"{name}.lora_down.weight"].float()
        assert (product - own.whole()).norm() < 1e-3 * own.whole().norm()


@pytest.mark.parametrize("more", [("--rank", "1"), ("--energy", "0.5")])
def test_a_lora_is_cut_where_that_is_asked_for(more: tuple[str, str], cat: Path, tmp_path: Path) -> None:
    run("--model_dir", cat, "--format", "lora", *more, "--output_dir", tmp_path / "lora")
    lora = load_file(tmp_path / "lora" / "lora.safetensors")
    assert {len(value) for name, value in lora.items() if "lora_down" in name} == {1}


def test_a_pipeline_and_a_delta_hold_the_same(face: Path, base_model: Path, tmp_path: Path) -> None:
    expected = with_concept(base_model, load_concept(face))
    run("--model_dir", face, "--format", "pipeline", "--output_dir", tmp_path / "pipeline")
    assert np.array_equal(make_image(load(tmp_path / "pipeline")), expected)
    run("--model_dir", face, "--format", "delta", "--output_dir", tmp_path / "delta")
    assert np.array_equal(with_concept(base_model, load_concept(tmp_path / "delta" / "delta.bin")), expected)


def test_another_base_model_is_refused(cat: Path, base_model_v: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the base model that it was trained on"):
        apply_concepts(StableDiffusionPipeline.from_pretrained(base_model_v), load_concept(cat))
    with pytest.raises(UserError, match="give the base model that it was trained on"):
        run("--model_dir", cat, "--format", "lora", "--pretrained_model_name_or_path", base_model_v,
            "--output_dir", tmp_path / "x")  # fmt: skip


@pytest.mark.long
def test_the_card_says_what_works(cat: Path, tmp_path: Path) -> None:
    text = (cat / "README.md").read_text()
    assert "| rank | 2 |" in text
    assert "| rank_alpha | 3.0 |" in text
    assert "load_attn_procs(" not in text
    (code,) = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    code = (
        code.replace(", dtype=torch.float16", "")
        .replace('.to("cuda")', "")
        .replace("num_inference_steps=100", "num_inference_steps=2")
    )
    (tmp_path / "card.py").write_text(code.replace('"."', repr(str(cat))) + "\nprint(image.size)")
    result = run_script("python", tmp_path / "card.py", PYTHONPATH=str(Path(export.__file__).parent))
    assert result.returncode == 0, result.stderr
    assert "(64, 64)" in result.stdout


def test_factors_of_nothing() -> None:
    nothing = LowRank(torch.zeros(3, 2), torch.ones(2, 4), alpha=2.0)
    assert torch.equal(nothing.balanced().whole(), torch.zeros(3, 4))
    assert torch.equal(LowRank(torch.zeros(3, 0), torch.zeros(0, 4), alpha=0.0).whole(), torch.zeros(3, 4))


def test_a_result_in_full_precision_where_it_is_asked_for(base_model: Path, images: Path, tmp_path: Path) -> None:
    train(flags(base_model, images, tmp_path, rank=2, max_train_steps=1, save_precision="fp32"))
    assert {value.dtype for value in load_concept(tmp_path).tensors().values()} == {torch.float32}
