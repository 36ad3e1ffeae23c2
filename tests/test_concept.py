"""A concept's files and how it goes into pipelines: as diffusers would, at no cost, and out again exactly."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.files import Concept, concept_files, load_concept, save_concept
from custom_diffusion.concept.prompts import class_words
from custom_diffusion.errors import UserError
from custom_diffusion.files import write_whole
from tests.conftest import flags, train

WEIGHTS = "pytorch_custom_diffusion_weights"
PROMPT = "photo of a <new1> cat"


def load(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def make_image(pipeline: Any, prompt: str = PROMPT, **more: object) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    image = pipeline(prompt, num_inference_steps=4, guidance_scale=6.0, eta=1.0, generator=generator, **more).images[0]
    return np.asarray(image, dtype=int)


def state(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {
        f"{name}.{key}": value.clone() for name, model in models.items() for key, value in model.state_dict().items()
    }


def word(token: str, vector: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """The tokens of a concept of one word."""
    return {token: {"text_encoder": vector}}


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor"


ONE_WORD = '[{"tokens": ["<new1>"], "classes": []}]'


def words_as_bytes(text: str) -> torch.Tensor:
    """How a weights file says at which words it acts."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def faces(base_model_v: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A concept with queries and outputs, of the other model."""
    folder = tmp_path_factory.mktemp("faces")
    train(flags(base_model_v, images, folder, freeze_model="crossattn", learning_rate=1e-2))
    return folder


# --- what diffusers makes of our files -----------------------------------------------------------


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
@pytest.mark.parametrize(("model", "concept"), [("base_model", "trained"), ("base_model_v", "faces")])
@pytest.mark.usefixtures("train_here")
def test_an_image_equals_that_of_diffusers_processors(
    ending: str, model: str, concept: str, request: pytest.FixtureRequest
) -> None:
    base, folder = request.getfixturevalue(model), request.getfixturevalue(concept)
    ours, theirs = load(base), load(base)
    apply_concepts(ours, load_concept(folder))
    theirs.unet.load_attn_procs(folder, weight_name=f"{WEIGHTS}.{ending}", _pipeline=theirs)
    theirs.load_textual_inversion(folder, weight_name=f"<new1>.{ending}")
    assert {type(processor) for processor in theirs.unet.attn_processors.values()} == {CustomDiffusionAttnProcessor}
    assert np.abs(make_image(ours) - make_image(theirs)).mean() < 1
    base_pipeline = load(base)
    base_pipeline.load_textual_inversion(folder, weight_name=f"<new1>.{ending}")
    assert np.abs(make_image(ours) - make_image(base_pipeline)).mean() > 1, "the attention makes a difference"


def test_load_attn_procs_alone_still_loads_nothing(trained: Path, base_model: Path) -> None:
    # What the README says of diffusers' documented call; should it start to work, the README has to follow.
    pipeline = load(base_model)
    pipeline.unet.load_attn_procs(trained, weight_name=f"{WEIGHTS}.bin")
    assert {type(processor) for processor in pipeline.unet.attn_processors.values()} == {AttnProcessor2_0}


def test_the_examples_own_files_are_read(trained: Path, base_model: Path, tmp_path: Path) -> None:
    # The example stores each token as a view of the whole table, and safetensors without entries for attn1.
    concept = load_concept(trained)
    table = torch.zeros(49409, 32)
    table[49408] = concept.tokens["<new1>"]["text_encoder"]
    torch.save({"<new1>": table[49408]}, tmp_path / "<new1>.bin")
    save_file(concept.attention, tmp_path / f"{WEIGHTS}.safetensors")
    assert (tmp_path / "<new1>.bin").stat().st_size > 6_000_000
    read = load_concept(tmp_path)
    assert read.attention.keys() == concept.attention.keys()
    assert torch.equal(read.tokens["<new1>"]["text_encoder"], concept.tokens["<new1>"]["text_encoder"])
    assert read.tokens["<new1>"]["text_encoder"].untyped_storage().nbytes() == 32 * 4, "the table is not kept"
    apply_concepts(load(base_model), read)


# --- applying ------------------------------------------------------------------------------------


def test_nothing_is_added_to_the_forward_pass(trained: Path, base_model: Path) -> None:
    pipeline = load(base_model)
    before = {name: type(module) for name, module in pipeline.unet.named_modules()}
    processors = dict(pipeline.unet.attn_processors)
    apply_concepts(pipeline, load_concept(trained))
    assert {name: type(module) for name, module in pipeline.unet.named_modules()} == before
    assert dict(pipeline.unet.attn_processors) == processors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removing_restores_exactly(trained: Path, base_model: Path, dtype: torch.dtype) -> None:
    pipeline = load(base_model).to(dtype=dtype)
    before, image = state(pipeline), make_image(pipeline, "a cat")
    tokenizer, words = pipeline.tokenizer, len(pipeline.tokenizer)
    applied = apply_concepts(pipeline, load_concept(trained), scale=0.7)
    assert len(pipeline.tokenizer) == words + 1
    assert pipeline.text_encoder.config.vocab_size == 49409, "so that save_pretrained writes what can be loaded"
    assert not np.array_equal(make_image(pipeline, "a cat"), image)
    applied.remove()
    after = state(pipeline)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert pipeline.tokenizer is tokenizer
    assert "<new1>" not in tokenizer.get_vocab()
    assert pipeline.text_encoder.config.vocab_size == 49408
    assert np.array_equal(make_image(pipeline, "a cat"), image)
    apply_concepts(pipeline, load_concept(trained))


def test_a_table_with_spare_rows_is_restored_too(trained: Path, base_model: Path) -> None:
    pipeline = load(base_model)
    pipeline.text_encoder.resize_token_embeddings(49472, mean_resizing=False)
    before = state(pipeline)
    apply_concepts(pipeline, load_concept(trained)).remove()
    assert all(torch.equal(before[key], value) for key, value in state(pipeline).items())


def test_scale_blends_between_base_and_learned(trained: Path, base_model: Path) -> None:
    concept = load_concept(trained)
    base = load(base_model).unet.state_dict()
    for scale in (0.0, 0.5, 1.0, 1.5):
        pipeline = load(base_model)
        apply_concepts(pipeline, concept, scale=scale)
        for key, learned in concept.attention.items():
            name = key.replace(".processor.", ".").replace("_custom_diffusion", "")
            expected = base[name] + scale * (learned - base[name])
            assert torch.allclose(pipeline.unet.state_dict()[name], expected, atol=1e-6)
            if scale in (0.0, 1.0):
                assert torch.equal(pipeline.unet.state_dict()[name], learned if scale else base[name])
        if scale == 0.0:
            assert np.array_equal(make_image(pipeline, "a cat"), make_image(load(base_model), "a cat"))


def test_other_pipelines_of_the_family(trained: Path, base_model: Path) -> None:
    concept, start = load_concept(trained), Image.new("RGB", (64, 64), "grey")
    makers: list[Callable[[StableDiffusionPipeline], Any]] = [
        lambda p: StableDiffusionImg2ImgPipeline(**p.components),
        lambda p: StableDiffusionControlNetPipeline(**p.components, controlnet=ControlNetModel.from_unet(p.unet)),
    ]
    for make in makers:
        torch.manual_seed(0)
        pipeline = make(load(base_model))
        pipeline.set_progress_bar_config(disable=True)
        before = make_image(pipeline, "a cat", image=start)
        applied = apply_concepts(pipeline, concept)
        assert not np.array_equal(make_image(pipeline, PROMPT, image=start), before)
        applied.remove()
        assert np.array_equal(make_image(pipeline, "a cat", image=start), before)


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_on_top(trained: Path, base_model: Path, lora_first: bool) -> None:
    def add_lora(pipeline: StableDiffusionPipeline) -> None:
        torch.manual_seed(1)
        pipeline.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k", "to_v", "to_q"]))

    pipeline, other = load(base_model), load(base_model)
    if lora_first:
        add_lora(pipeline)
    apply_concepts(pipeline, load_concept(trained))
    if not lora_first:
        add_lora(pipeline)
    add_lora(other)
    expected = load_concept(trained).attention
    for key, learned in expected.items():
        layer, projection = re.match(r"(.+)\.processor\.(to_[kv])_custom", key).groups()
        assert torch.equal(pipeline.unet.get_submodule(f"{layer}.{projection}").base_layer.weight, learned)
    assert not np.array_equal(make_image(pipeline, "a cat"), make_image(other, "a cat"))


def test_a_saved_pipeline_carries_the_concept(trained: Path, base_model: Path, tmp_path: Path) -> None:
    pipeline = load(base_model)
    apply_concepts(pipeline, load_concept(trained))
    pipeline.save_pretrained(tmp_path)
    assert np.array_equal(make_image(load(tmp_path)), make_image(pipeline))


# --- several concepts ----------------------------------------------------------------------------


def test_several_concepts_share_one_pipeline(trained: Path, base_model: Path) -> None:
    concept = load_concept(trained)
    token_only = Concept({}, word("<new2>", torch.ones(32)), source="a textual inversion")
    same_attention = Concept(dict(concept.attention), word("<new3>", torch.zeros(32)), source="the same run")
    pipeline = load(base_model)
    before = state(pipeline)
    applied = apply_concepts(pipeline, concept, token_only, same_attention)
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<new1>", "<new2>", "<new3>"])
    rows = pipeline.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(rows, torch.stack([concept.tokens["<new1>"]["text_encoder"], torch.ones(32), torch.zeros(32)]))
    applied.remove()
    assert all(torch.equal(before[key], value) for key, value in state(pipeline).items())


def test_concepts_that_disagree_are_refused(trained: Path, base_model: Path) -> None:
    one, two = load_concept(trained), load_concept(trained / "checkpoint-3")
    two = Concept(two.attention, {"<new2>": two.tokens["<new1>"]}, two.base_model, two.source)
    refused(load(base_model), [one, two], [str(trained), "checkpoint-3", "one UNet can hold one set"])


def test_a_token_that_both_have_is_refused(trained: Path, base_model: Path) -> None:
    concept = load_concept(trained)
    refused(load(base_model), [concept, concept], ["'<new1>' is a token of", "merge.py"])
    other = Concept({}, word("<New1>", torch.ones(32)), source="another")
    refused(load(base_model), [concept, other], ["'<new1>' is a token of", "'another'", "merge.py"])


def test_applying_twice_is_refused(trained: Path, base_model: Path) -> None:
    pipeline = load(base_model)
    apply_concepts(pipeline, load_concept(trained))
    refused(pipeline, [load_concept(trained)], ["already has a concept"])


def refused(pipeline: StableDiffusionPipeline, concepts: list[Concept], words: list[str]) -> None:
    before = state(pipeline)
    tokens = len(pipeline.tokenizer)
    with pytest.raises(UserError) as caught:
        apply_concepts(pipeline, *concepts)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    after = state(pipeline)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "a refused concept leaves no trace"
    assert len(pipeline.tokenizer) == tokens


def test_a_wrong_base_model_is_named_with_both_shapes(trained: Path, base_model: Path, base_model_v: Path) -> None:
    words = [str(trained), str(base_model), "(16, 32)", str(base_model_v), "(16, 48)"]
    refused(load(base_model_v), [load_concept(trained)], words)
    token_only = Concept({}, load_concept(trained).tokens, str(base_model), str(trained))
    refused(load(base_model_v), [token_only], ["'<new1>'", "(32,)", "(48,)", str(base_model)])


def test_layers_that_the_unet_does_not_have(trained: Path, base_model: Path) -> None:
    attention = {
        key.replace("up_blocks.1", "up_blocks.7"): value for key, value in load_concept(trained).attention.items()
    }
    refused(load(base_model), [Concept(attention, {}, "another", "foreign")], ["'foreign'", "'another'", "up_blocks.7"])


def test_a_token_of_the_vocabulary_is_refused(base_model: Path) -> None:
    refused(load(base_model), [Concept({}, word("cat", torch.ones(32)), source="x")], ["'cat'", "already"])


# --- files of strangers --------------------------------------------------------------------------


class Malicious:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [f"{WEIGHTS}.bin", "<new1>.bin"])
def test_a_pickle_that_runs_code_is_refused(name: str, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / f"{WEIGHTS}.bin", tmp_path)
    trap = tmp_path / "code-has-run"
    torch.save({"<new1>": Malicious(trap)}, tmp_path / name)
    with pytest.raises(UserError, match="could run code when read: refused"):
        load_concept(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps({"<new1>": Malicious(trap)}))
    with pytest.raises(UserError):
        load_concept(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize("name", [f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin", "<new1>.safetensors"])
def test_a_damaged_file_is_named(name: str, trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / f"{WEIGHTS}.bin", tmp_path)
    (tmp_path / name).write_bytes((trained / name).read_bytes()[:100])
    with pytest.raises(UserError, match=f"{re.escape(name)} cannot be read"):
        load_concept(tmp_path)


def test_values_that_are_not_finite_are_refused(trained: Path, tmp_path: Path) -> None:
    concept = load_concept(trained)
    concept.tokens["<new1>"]["text_encoder"][3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        save_concept(concept, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_file({"<new1>": concept.tokens["<new1>"]["text_encoder"]}, tmp_path / "<new1>.safetensors")
    with pytest.raises(UserError, match="not finite"):
        load_concept(tmp_path)


def test_other_weights_are_no_concept(tmp_path: Path) -> None:
    save_file({"unet.weight": torch.ones(2)}, tmp_path / f"{WEIGHTS}.safetensors")
    with pytest.raises(UserError, match=r"no Custom Diffusion file: it holds 'unet.weight'"):
        load_concept(tmp_path)


def test_no_concept_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no concept in"):
        load_concept(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        load_concept(tmp_path / "nowhere")
    with pytest.raises(UserError, match="the Hub does not give it"):
        load_concept("nobody/has-this-concept")


def test_a_broken_card_does_not_hide_the_concept(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "copy" / "README.md").write_text("---\nbase_model: [unclosed\n---\n")
    assert load_concept(tmp_path / "copy").base_model is None


# --- writing -------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("good")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_whole(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "good"


def test_files_have_the_users_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_whole(tmp_path / "file", lambda file: file.write(b"x"))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("token", ["../outside", "a/b", "a\\b", "", ".hidden", "two words", "line\nbreak", "x" * 201])
def test_a_token_never_becomes_a_path(token: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        save_concept(Concept({}, word(token, torch.ones(4))), tmp_path / "folder")
    assert not list(tmp_path.rglob("*"))


# --- files of strangers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"lora_unet_mid.alpha": torch.tensor(4.0)},
        {f"{LAYER}.to_k_custom_diffusion.weight": torch.tensor(4.0)},
        {f"{LAYER}.to_k_custom_diffusion.weight": {"nested": torch.ones(2)}},
        {f"{LAYER}.to_k_custom_diffusion.weight": "text"},
        {f"{LAYER}.to_k_gated.foo.0": torch.ones(2, 2), "token_gate": words_as_bytes(ONE_WORD)},
        {f"{LAYER}.to_k_gated.weight.0": torch.ones(2, 2), "token_gate": words_as_bytes("[" * 100_000)},
        {7: torch.ones(2)},
    ],
)  # fmt: skip
def test_a_weights_file_that_holds_something_else_is_named(content: dict[Any, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / f"{WEIGHTS}.bin")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / WEIGHTS}.bin")):
        load_concept(tmp_path)


def test_a_token_file_with_a_name_that_no_token_may_have_is_left_out(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vector = load_concept(trained).tokens["<new1>"]["text_encoder"]
    for name in ("<new1>", "\x1b[31mred", "my style"):
        save_file({name: vector}, tmp_path / f"{name}.safetensors")
    assert list(load_concept(tmp_path).tokens) == ["<new1>"]
    assert "my style.safetensors' is left out: no word can have that name" in caplog.text
    assert "\x1b" not in caplog.text
    assert [path.name for path in concept_files(tmp_path)] == ["<new1>.safetensors"]


def test_class_words_of_a_card_are_text_and_no_command() -> None:
    for prompt in (
        "a <new1> cat $(touch x)",
        "a <new1> cat`x`",
        'a <new1> cat" x',
        "a <new1> cat\x1b[31m",
    ):
        assert class_words(Concept({}, {"<new1>": {}}, instance_prompt=prompt)) == {"<new1>": "cat"}
    assert class_words(Concept({}, {"<new1>": {}}, instance_prompt="<new1> artist's brush")) == {
        "<new1>": "artist's brush"
    }
