"""apply_concepts() and remove() among everything else that changes a pipeline's models, in every order.

Either all is as it should be, and after remove() every tensor is the base model's to the bit; or one line refuses, and
nothing is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from custom_diffusion import Concept, UserError, apply_concepts
from custom_diffusion.concept import applying
from custom_diffusion.concept.applying import AppliedConcept
from custom_diffusion.concept.formats import key_of_parameter, parameter_name
from custom_diffusion.concept.unet import find_projection, lora_is_fused
from custom_diffusion.models.vocabulary import names_word
from tests.conftest import ROOT
from tools.base.train_unet import new_scheduler

WIDTH = 16


@pytest.fixture(scope="module")
def pipeline_here() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x as small as it gets, with the words of the small base model."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "base" / "tokenizer")
    text = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=WIDTH,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler("epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def pipeline(pipeline_here: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A copy to do with as one likes."""
    return copied(pipeline_here)


def copied(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A pipeline with its own copy of all that a concept changes."""
    other = copy.copy(pipeline)
    for name in ("unet", "text_encoder", "tokenizer"):
        setattr(other, name, copy.deepcopy(getattr(pipeline, name)))
    return other


def learned(
    unet: nn.Module, token: str = "<new1>", seed: int = 1, parts: tuple[str, ...] = ("to_k", "to_v")
) -> Concept:
    """A concept of a UNet, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    attention = {
        key_of_parameter(name.replace(".base_layer", "")): torch.randn(parameter.shape, generator=generator)
        for name, parameter in unet.named_parameters()
        if "attn2" in name and "lora" not in name and any(f".{part}." in name for part in parts)
    }
    return Concept(attention, {token: {"text_encoder": torch.randn(WIDTH, generator=generator)}}, source=f"a {token}")


@pytest.fixture(scope="module")
def concept(pipeline_here: StableDiffusionPipeline) -> Concept:
    return learned(pipeline_here.unet)


# --- what is compared ----------------------------------------------------------------------------


def state(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    """Everything in a pipeline that a concept could change."""
    tensors = {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder")
        for name, value in getattr(pipeline, part).state_dict().items()
    }
    return tensors | {"tokenizer": pipeline.tokenizer.backend_tokenizer.to_str()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same, to the bit."""

    def same(name: str) -> bool:
        a, b = one[name], other[name]
        if not isinstance(a, torch.Tensor) or a.is_meta or b.is_meta:
            return isinstance(a, torch.Tensor) or a == b
        return a.dtype == b.dtype and torch.equal(a, b)

    return sorted({*one} ^ {*other}) + [name for name in one if name in other and not same(name)]


@torch.no_grad()
def answer(pipeline: StableDiffusionPipeline, prompt: str = "a <new1> cat") -> torch.Tensor:
    """What the UNet makes of a prompt and fixed noise."""
    ids = pipeline.tokenizer(
        prompt, padding="max_length", max_length=pipeline.tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    features = pipeline.text_encoder(ids)[0]
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    return pipeline.unet(noise.to(features.dtype), 5, features).sample.float()


def check_concept(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    """Make sure that the UNet computes with the concept's projections, and the text encoder with its words."""
    for key, weight in concept.attention.items():
        projection = find_projection(pipeline.unet, key)
        if projection.parameter.is_meta:
            continue
        assert torch.equal(projection.parameter, rounded(weight, pipeline.unet)), key
        if getattr(projection.attention, "fused_projections", False) and "to_k" in key:
            fused = projection.attention.to_kv.weight
            assert torch.equal(fused[: len(weight)], projection.parameter), "the fused copy has it too"
    for token, vectors in concept.tokens.items():
        assert names_word(f"a {token.upper()}, please", token, pipeline.tokenizer)
        row = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids(token)]
        assert row.is_meta or torch.equal(row, rounded(vectors["text_encoder"], pipeline.text_encoder))


def rounded(learned: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """A tensor as it is in a model that has been moved to its type, perhaps by way of another."""
    return learned.to(getattr(model, "rounded_to", torch.float32)).to(model.dtype)


# --- what others do to pipelines -----------------------------------------------------------------


def load_lora(pipeline: StableDiffusionPipeline) -> None:
    torch.manual_seed(3)
    name = f"lora{len(getattr(pipeline.unet, 'peft_config', {}))}"
    pipeline.unet.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=r".*attn2\.to_(q|k|v)"), adapter_name=name
    )


def fuse_lora(pipeline: StableDiffusionPipeline) -> None:
    load_lora(pipeline)
    pipeline.fuse_lora()


def fuse_and_unfuse_lora(pipeline: StableDiffusionPipeline) -> None:
    fuse_lora(pipeline)
    pipeline.unfuse_lora()


def load_and_unload_lora(pipeline: StableDiffusionPipeline) -> None:
    load_lora(pipeline)
    pipeline.unload_lora_weights()


def fuse_and_unload_lora(pipeline: StableDiffusionPipeline) -> None:
    fuse_lora(pipeline)
    pipeline.unload_lora_weights()


def fuse_and_unfuse_qkv(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.fuse_qkv_projections()
    pipeline.unet.unfuse_qkv_projections()


def load_inversion(pipeline: StableDiffusionPipeline) -> None:
    known = sum("style" in word for word in pipeline.tokenizer.get_added_vocab())
    pipeline.load_textual_inversion({f"<style{known}>": torch.full((WIDTH,), float(known))})


def load_and_unload_inversion(pipeline: StableDiffusionPipeline) -> None:
    pipeline.load_textual_inversion({"<gone>": torch.ones(WIDTH)})
    pipeline.unload_textual_inversion("<gone>")


def to_half(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.rounded_to = pipeline.text_encoder.rounded_to = torch.float16
    pipeline.to(torch.float16)


def to_half_and_back(pipeline: StableDiffusionPipeline) -> None:
    to_half(pipeline)
    pipeline.to(torch.float32)


def sibling(pipeline: StableDiffusionPipeline) -> None:
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet and other.tokenizer is pipeline.tokenizer


def offload_sequentially(pipeline: StableDiffusionPipeline) -> None:
    pipeline.enable_sequential_cpu_offload(device="cpu")


def offload_sequentially_and_stop(pipeline: StableDiffusionPipeline) -> None:
    offload_sequentially(pipeline)
    pipeline.remove_all_hooks()


def offload_models(pipeline: StableDiffusionPipeline) -> None:
    pipeline.enable_model_cpu_offload(device="cpu")


def add_and_remove_another(pipeline: StableDiffusionPipeline) -> None:
    """Another concept; refused, where there is one already."""
    other = learned(pipeline.unet, "<other>", seed=2)
    try:
        apply_concepts(pipeline, other).remove()
    except UserError as error:
        assert "\n" not in str(error)


def fuse_qkv(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.fuse_qkv_projections()


def nothing(pipeline: StableDiffusionPipeline) -> None:
    pass


Operation = Callable[[StableDiffusionPipeline], None]
OPERATIONS: list[Operation] = [
    nothing, load_lora, fuse_lora, fuse_and_unfuse_lora, load_and_unload_lora, fuse_and_unload_lora, fuse_qkv,
    fuse_and_unfuse_qkv, load_inversion, load_and_unload_inversion, to_half, to_half_and_back, sibling, offload_models,
    offload_sequentially, offload_sequentially_and_stop, add_and_remove_another,
]  # fmt: skip
# What leaves nothing behind that applying could notice is left out.
BEFORE: list[Operation] = [
    nothing, load_lora, fuse_lora, fuse_and_unload_lora, fuse_qkv, load_inversion, to_half, sibling, offload_models,
    offload_sequentially,
]  # fmt: skip
LASTING: list[Operation] = [
    fuse_and_unfuse_lora, fuse_qkv, load_inversion, to_half_and_back, offload_sequentially_and_stop,
]  # fmt: skip


def attempt(action: Callable[[], Any], pipeline: StableDiffusionPipeline) -> Any:
    """Apply or remove; gives None where one line refuses it and nothing has changed."""
    before = state(pipeline)
    try:
        return action()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        assert differences(state(pipeline), before) == []
        return None


def removed(applied: AppliedConcept, pipeline: StableDiffusionPipeline, control: StableDiffusionPipeline) -> bool:
    """Remove, perhaps only after doing what the refusal asks for."""

    def remove() -> bool:
        applied.remove()
        return True

    if attempt(remove, pipeline):
        return True
    for one in (pipeline, control):
        one.remove_all_hooks()
        if any(map(lora_is_fused, one.unet.modules())):
            one.unfuse_lora()
    return attempt(remove, pipeline) is True


def play(pipelines: Sequence[StableDiffusionPipeline], operations: Sequence[Operation]) -> None:
    for operation in operations:
        for pipeline in pipelines:
            operation(pipeline)


def check_order(
    before: Sequence[Operation], after: Sequence[Operation], original: StableDiffusionPipeline, concept: Concept
) -> None:
    """Apply between operations and remove behind them; beside it, do the same without a concept."""
    pipeline, control = copied(original), copied(original)
    play((pipeline, control), before)
    applied = attempt(lambda: apply_concepts(pipeline, concept), pipeline)
    if applied is None:
        assert {fuse_lora, fuse_and_unload_lora, offload_sequentially} & {*before}
        return
    pipeline.unet.rounded_to = pipeline.text_encoder.rounded_to = control.unet.rounded_to = control.unet.dtype
    check_concept(pipeline, concept)
    at_first = state(control)
    covered = {name: at_first[name_in(at_first, name)] for name in projections(concept)}
    play((pipeline, control), after)
    if not {fuse_lora, fuse_and_unload_lora, fuse_and_unfuse_lora} & {*after}:
        check_concept(pipeline, concept)
    if not removed(applied, pipeline, control):
        assert fuse_and_unload_lora in after, "only a LoRA that nobody can take out keeps it"
        return
    expected = state(control)
    if fuse_and_unfuse_lora in after or fuse_lora in after:
        # PEFT adds and subtracts, which rounds; what the concept keeps does not.
        for name, tensor in covered.items():
            expected[name_in(expected, name)] = rounded(tensor, control.unet)
            fused = name.replace("to_k", "to_kv")
            if fused in expected:
                both = [covered[name], covered[name.replace("to_k", "to_v")]]
                expected[fused] = rounded(torch.cat(both), control.unet)
    assert differences(state(pipeline), expected) == []
    applied.remove()
    assert differences(state(pipeline), expected) == [], "removing twice does nothing"


def projections(concept: Concept) -> list[str]:
    return [f"unet.{parameter_name(key)}" for key in concept.attention]


def name_in(tensors: dict[str, Any], name: str) -> str:
    """A projection's name where a LoRA may wrap it."""
    return name if name in tensors else name.replace(".weight", ".base_layer.weight")


@pytest.mark.parametrize("after", OPERATIONS)
@pytest.mark.parametrize("before", BEFORE)
def test_between_two_operations(
    before: Operation, after: Operation, pipeline_here: StableDiffusionPipeline, concept: Concept
) -> None:
    check_order([before], [after], pipeline_here, concept)


@pytest.mark.parametrize("second", LASTING)
@pytest.mark.parametrize("first", LASTING)
def test_before_two_operations(
    first: Operation, second: Operation, pipeline_here: StableDiffusionPipeline, concept: Concept
) -> None:
    check_order([], [first, second], pipeline_here, concept)


# --- what cannot work ----------------------------------------------------------------------------


def refused(action: Callable[[], Any], pipeline: StableDiffusionPipeline, words: str) -> None:
    before = state(pipeline)
    with pytest.raises(UserError, match=words) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert differences(state(pipeline), before) == []


def test_a_fused_lora_is_named_with_the_way_out(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    fuse_lora(pipeline)
    refused(lambda: apply_concepts(pipeline, concept), pipeline, r"a LoRA is fused .* unfuse_lora\(\) first")
    pipeline.unfuse_lora()
    applied = apply_concepts(pipeline, concept)
    pipeline.fuse_lora()
    refused(applied.remove, pipeline, r"unfuse_lora\(\) first")
    pipeline.unfuse_lora()
    applied.remove()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    refused(lambda: apply_concepts(pipeline, concept), pipeline, "load the pipeline again")


def test_a_lora_that_the_concept_does_not_meet_is_no_obstacle(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    targets = LoraConfig(r=2, init_lora_weights=False, target_modules=r".*attn1\.to_k")
    pipeline.unet.add_adapter(targets, adapter_name="other")
    pipeline.fuse_lora()
    before = state(pipeline)
    apply_concepts(pipeline, concept).remove()
    assert differences(state(pipeline), before) == []


def test_processors_that_put_the_weights_aside(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    # What load_attn_procs makes of our files: the projections of the UNet itself are no longer used.
    for name, module in pipeline.unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(CustomDiffusionAttnProcessor(hidden_size=8, cross_attention_dim=WIDTH))
    refused(lambda: apply_concepts(pipeline, concept), pipeline, "processors of load_attn_procs")


def test_weights_that_are_no_numbers_to_add_to(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    projection = find_projection(pipeline.unet, next(iter(concept.attention)))
    whole = nn.Parameter(projection.parameter.to(torch.int8), requires_grad=False)
    projection.linear.weight = whole
    refused(lambda: apply_concepts(pipeline, concept), pipeline, "is quantized")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer"])
def test_a_pipeline_without_a_part(part: str, pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    setattr(pipeline, part, None)
    with pytest.raises(UserError, match=f"this pipeline has no {part}"):
        apply_concepts(pipeline, concept)


def test_offloading_is_named_for_words_too(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    offload_sequentially(pipeline)
    refused(lambda: apply_concepts(pipeline, concept), pipeline, r"UNet's weights are offloaded.*remove_all_hooks")
    only_words = Concept({}, concept.tokens)
    refused(lambda: apply_concepts(pipeline, only_words), pipeline, r"its weights are offloaded.*remove_all_hooks")
    pipeline.remove_all_hooks()
    apply_concepts(pipeline, only_words).remove()


def test_groups_that_are_offloaded(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    device = torch.device("cpu")
    apply_group_offloading(pipeline.text_encoder, device, device, offload_type="leaf_level")
    refused(lambda: apply_concepts(pipeline, concept), pipeline, "offloaded in groups")


def test_a_failure_on_the_way_leaves_nothing(
    pipeline: StableDiffusionPipeline, concept: Concept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = state(pipeline)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(applying, "put_words", interrupt)
        apply_concepts(pipeline, concept)
    assert differences(state(pipeline), before) == []
    apply_concepts(pipeline, concept)


# --- what works ----------------------------------------------------------------------------------


def test_queries_outputs_and_biases_under_fused_projections(pipeline: StableDiffusionPipeline) -> None:
    whole = learned(pipeline.unet, parts=("to_k", "to_v", "to_q", "to_out"))
    assert any(key.endswith("bias") for key in whole.attention)
    plain = answer(pipeline, "a cat")
    other = copied(pipeline)
    apply_concepts(other, whole)
    pipeline.unet.fuse_qkv_projections()
    before = state(pipeline)
    applied = apply_concepts(pipeline, whole)
    assert torch.allclose(answer(pipeline), answer(other), atol=1e-5)
    assert not torch.allclose(answer(pipeline, "a cat"), plain, atol=1e-2)
    applied.remove()
    assert differences(state(pipeline), before) == []
    assert torch.allclose(answer(pipeline, "a cat"), plain, atol=1e-5)


@pytest.mark.parametrize("made_first", [True, False])
def test_a_sibling_has_the_concept_too_and_loses_it_too(
    made_first: bool, pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    plain, before = answer(pipeline), state(pipeline)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline) if made_first else None
    applied = apply_concepts(pipeline, concept)
    other = other or StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    assert torch.equal(answer(other), answer(pipeline))
    assert not torch.allclose(answer(other), plain, atol=1e-2)
    with pytest.raises(UserError, match="already has a concept"):
        apply_concepts(other, learned(pipeline.unet, "<other>"))
    applied.remove()
    assert differences(state(other), before) == []
    assert torch.equal(answer(other), plain)
    apply_concepts(other, concept).remove()
    assert differences(state(pipeline), before) == []


def test_two_unets_with_one_text_encoder_in_any_order(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    other, third = copied(pipeline), copied(pipeline)
    for one in (other, third):
        one.text_encoder, one.tokenizer = pipeline.text_encoder, pipeline.tokenizer
    second = learned(other.unet, "<second>", seed=5)
    before = state(pipeline)
    one, two = apply_concepts(pipeline, concept), apply_concepts(other, second)
    with pytest.raises(UserError, match="already, as '<second>'"):
        apply_concepts(third, learned(third.unet, "<SECOND>"))
    one.remove()
    check_concept(other, second)
    assert not names_word("a <new1> cat", "<new1>", other.tokenizer)
    two.remove()
    assert differences(state(pipeline), before) == []


def test_a_table_with_spare_rows_and_words_that_came_later(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer) + 5)
    before = state(pipeline)
    one = apply_concepts(pipeline, concept)
    assert len(pipeline.text_encoder.get_input_embeddings().weight) == len(pipeline.tokenizer) + 4
    one.remove()
    assert differences(state(pipeline), before) == []


def test_inversions_around_a_concept(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    before = state(pipeline)
    load_inversion(pipeline)
    applied = apply_concepts(pipeline, concept)
    load_inversion(pipeline)
    check_concept(pipeline, concept)
    pipeline.unload_textual_inversion("<style0>")
    check_concept(pipeline, concept)
    applied.remove()
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(table[pipeline.tokenizer.convert_tokens_to_ids("<style1>")], torch.ones(WIDTH))
    pipeline.unload_textual_inversion()
    assert differences(state(pipeline), before) == []


def test_unloading_all_inversions_takes_the_words_and_leaves_the_rest(
    pipeline: StableDiffusionPipeline, concept: Concept
) -> None:
    before = state(pipeline)
    applied = apply_concepts(pipeline, concept)
    pipeline.unload_textual_inversion()
    applied.remove()
    assert differences(state(pipeline), before) == []


def test_a_compiled_unet(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    before = state(pipeline)
    pipeline.unet = torch.compile(pipeline.unet)
    applied = apply_concepts(pipeline, concept)
    assert torch.equal(find_projection(pipeline.unet._orig_mod, key := next(iter(concept.attention))).parameter,
                       concept.attention[key])  # fmt: skip
    with pytest.raises(UserError, match="already has a concept"):
        apply_concepts(pipeline, concept)
    applied.remove()
    pipeline.unet = pipeline.unet._orig_mod
    assert differences(state(pipeline), before) == []


def test_another_unet_in_between_is_not_touched(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    first, other = pipeline.unet, copied(pipeline)
    before, untouched = state(pipeline), state(other)
    applied = apply_concepts(pipeline, concept)
    pipeline.unet = other.unet
    applied.remove()
    assert differences(state(other), untouched) == []
    pipeline.unet = first
    assert differences(state(pipeline), before) == []


def test_saving_and_copying_know_nothing_of_the_originals(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    names = set(pipeline.unet.state_dict())
    apply_concepts(pipeline, concept)
    assert set(pipeline.unet.state_dict()) == names
    copy.deepcopy(pipeline.unet)


def test_the_scale_of_loras_is_not_a_concepts(pipeline: StableDiffusionPipeline, concept: Concept) -> None:
    # What docstring and card say of cross_attention_kwargs.
    apply_concepts(pipeline, concept)
    ids = pipeline.tokenizer("a <new1> cat", return_tensors="pt").input_ids
    with torch.no_grad():
        features = pipeline.text_encoder(ids)[0]
        latents = torch.ones(1, 4, 8, 8)
        whole, none = (
            pipeline.unet(latents, 5, features, cross_attention_kwargs=kwargs).sample for kwargs in (None, {"scale": 0})
        )
    assert torch.equal(whole, none)
    assert 'cross_attention_kwargs={"scale": ...}' in (apply_concepts.__doc__ or "")
