"""Tokens, attention and loss: what is trained, from where, and towards what."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from transformers import CLIPTextModel, CLIPTokenizer

from custom_diffusion.concept.gating import GatedWords, TokenGate
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.families import StableDiffusion
from custom_diffusion.models.short_attention import ShortAttnProcessor, is_short
from custom_diffusion.training.attention import swap_attention_processors
from custom_diffusion.training.frozen_layers import keep_less, recompute_wide_layers
from custom_diffusion.training.objective import CustomDiffusion, custom_diffusion_loss, min_snr_weights
from custom_diffusion.training.tokens import add_modifier_tokens, train_new_words


def load(
    folder: Path,
    tokens: tuple[str, ...] = ("<new1>", "<new2>"),
    train_q_out: bool = False,
    rank: int | None = None,
    alpha: float | None = None,
    gated: tuple[GatedWords, ...] = (),
    **options: object,
) -> CustomDiffusion:
    model, family = BaseModel(str(folder)), StableDiffusion()
    tokenizers = model.tokenizers(family)
    modifier_tokens = add_modifier_tokens(tokenizers, tokens, ["ktn", "pll", "ucd"][: len(tokens)])
    text_encoders, unet = model.text_encoders(family), model.unet()
    train_new_words(text_encoders, tokenizers, modifier_tokens)
    swap_attention_processors(unet, train_q_out, rank=rank, alpha=alpha, gated=len(gated))
    if gated:
        options["gate"] = TokenGate(tokenizers["text_encoder"], gated)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    return CustomDiffusion(family, text_encoders, unet, scheduler, modifier_tokens, **options)


def batch(model: CustomDiffusion, ids: list[int] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = ids or [49406, 1125, 49408, 49409, 2368, 49407]
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "noise": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([10, 900]),
        "input_ids": {"text_encoder": torch.tensor([ids, ids])},
        "mask": torch.ones(2, 1, 8, 8),
    }


GATED = (GatedWords(("<new1>",), ("cat",)), GatedWords(("<new2>",), ("cat",)))


# --- tokens --------------------------------------------------------------------------------------


def test_initializers_are_vocabulary_entries_first(base_model: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(base_model / "tokenizer")
    added = add_modifier_tokens(
        {"text_encoder": tokenizer}, ["<a>", "<b>", "<c>", "<d>", "<e>"], ["ktn", "cat", "cat</w>", "teapot", "Cat"]
    )
    assert added.ids["text_encoder"] == [49408, 49409, 49410, 49411, 49412]
    # 'cat' inside a word, 'cat' as a word, and two words that are no entries as written but one token.
    assert added.initializer_ids["text_encoder"] == [42170, 1481, 2368, 40749, 2368]
    assert tokenizer("photo of a <a> cat", add_special_tokens=False).input_ids == [1125, 539, 320, 49408, 2368]


def test_the_new_rows_start_from_their_initializers(base_model: Path) -> None:
    model = load(base_model)
    table = CLIPTextModel.from_pretrained(base_model / "text_encoder").get_input_embeddings().weight
    learned = model.learned("base").tokens
    assert torch.equal(learned["<new1>"]["text_encoder"], table[42170])
    assert torch.equal(learned["<new2>"]["text_encoder"], table[47629])


def test_known_words_are_encoded_as_before(base_model: Path) -> None:
    plain = CLIPTextModel.from_pretrained(base_model / "text_encoder")
    ids = torch.tensor([[49406, 1125, 42170, 2368, 49407, 49407]])
    new = torch.tensor([[49406, 1125, 49408, 2368, 49407, 49407]])
    model = load(base_model)
    assert torch.equal(model.encode_prompts({"text_encoder": ids})["features"], plain(ids)[0])
    assert torch.equal(model.encode_prompts({"text_encoder": new})["features"], plain(ids)[0]), (
        "a new word is its initializer before training"
    )


@pytest.mark.parametrize(("train_q_out", "projections"), [(False, {"k", "v"}), (True, {"k", "v", "q", "out"})])
def test_only_the_documented_parameters_are_trained(base_model: Path, train_q_out: bool, projections: set[str]) -> None:
    model = load(base_model, train_q_out=train_q_out)
    trained = model.trained()
    rows = [name for name in trained if name.startswith("text_encoders.")]
    assert [tuple(trained[name].shape) for name in rows] == [(2, 32)], "the new rows, not the table"
    others = set(trained) - set(rows)
    assert all(".attn2.processor." in name and "_custom_diffusion" in name for name in others)
    assert {name.split(".to_")[1].split("_custom")[0] for name in others} == projections
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    model(**batch(model))[0].backward()
    optimizer.step()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (name not in trained), name
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == sum(
        p.numel() for p in trained.values()
    )


def test_without_modifier_tokens_only_the_attention_is_trained(base_model: Path) -> None:
    model = load(base_model, tokens=())
    assert all(".attn2.processor." in name for name in model.trained())
    model(**batch(model, [49406, 1125, 2368, 49407, 49407, 49407]))[0].backward()
    assert all(value.grad is not None for value in model.trained().values())


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base_model", "base_model_v"])
@pytest.mark.parametrize("train_q_out", [False, True])
def test_before_training_the_unet_predicts_what_it_did(
    name: str, train_q_out: bool, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    plain = UNet2DConditionModel.from_pretrained(folder / "unet")
    model = load(folder, train_q_out=train_q_out)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, plain.config.cross_attention_dim)
    assert torch.allclose(model.unet(latents, 5, text).sample, plain(latents, 5, text).sample, atol=1e-5)


def test_the_start_token_gives_no_gradient(base_model: Path) -> None:
    model = load(base_model)
    layer = model.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    text = torch.randn(1, 6, 32, requires_grad=True)
    layer(torch.randn(1, 9, 16), encoder_hidden_states=text).square().sum().backward()
    assert text.grad[0, 0].abs().max() == 0
    assert text.grad[0, 1:].abs().min() > 0
    assert layer.processor.to_v_custom_diffusion.weight.grad.abs().max() > 0
    model.zero_grad()
    layer(torch.randn(1, 9, 16), encoder_hidden_states=text[:, :1]).square().sum().backward()
    assert layer.processor.to_v_custom_diffusion.weight.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_trained_stays_full_precision(base_model: Path, dtype: torch.dtype) -> None:
    exact = UNet2DConditionModel.from_pretrained(base_model / "unet").state_dict()
    model = load(base_model, train_q_out=True)
    model.cast_frozen(dtype)
    for name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if name in model.trained() else dtype), name
    for key, value in model.learned("base").attention.items():
        original = exact[key.replace(".processor.", ".").replace("_custom_diffusion", "")]
        assert torch.equal(value, original), "copied before the rounding"
    assert model.unet.dtype == model.text_encoders["text_encoder"].dtype == dtype, (
        "what pipelines take for the model's type"
    )
    loss = model(**batch(model))[0]
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(value.grad.dtype == torch.float32 for value in model.trained().values())


# --- frozen layers -------------------------------------------------------------------------------


def prediction_and_gradient(unet: UNet2DConditionModel) -> tuple[torch.Tensor, torch.Tensor]:
    """What the UNet predicts for fixed latents of 16 x 16, and the gradient of the text features."""
    generator = torch.Generator().manual_seed(0)
    latents, features = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 7, 32)))
    features.requires_grad_(True)
    prediction = unet(latents, torch.tensor([10, 900]), features).sample
    prediction.square().sum().backward()
    return prediction, features.grad


def kept_bytes(unet: UNet2DConditionModel) -> int:
    """Bytes of the activations that this keeps until the backward pass."""
    weights = {value.untyped_storage().data_ptr() for value in unet.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction_and_gradient(unet)
    return sum(size for storage, size in kept.items() if storage not in weights)


def frozen_unet(base_model: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base_model / "unet").requires_grad_(False)


def test_frozen_layers_keep_less_for_the_same_gradients(base_model: Path) -> None:
    plain, lean = frozen_unet(base_model), frozen_unet(base_model)
    names = list(lean.state_dict())
    keep_less(lean)
    for value, wanted in zip(prediction_and_gradient(lean), prediction_and_gradient(plain), strict=True):
        assert torch.equal(value, wanted)
    assert kept_bytes(lean) < 0.8 * kept_bytes(plain)
    assert list(lean.state_dict()) == names


def test_wide_layers_are_computed_again_for_the_same_gradients(base_model: Path) -> None:
    plain, lean = frozen_unet(base_model), frozen_unet(base_model)
    kept, many = kept_bytes(lean), 16 * 16 * lean.config.block_out_channels[0]
    assert not recompute_wide_layers(lean, latent_size=16, least=100 * many)
    assert kept_bytes(lean) == kept, "no layer has so many values"
    assert recompute_wide_layers(lean, latent_size=16, least=many)
    # All transformer blocks of the first level but the last, which the backward pass begins with.
    assert kept_bytes(lean) < 0.66 * kept
    for value, wanted in zip(prediction_and_gradient(lean), prediction_and_gradient(plain), strict=True):
        assert torch.equal(value, wanted)


def test_activations_of_wide_layers_do_not_keep_what_normalisations_give(base_model: Path) -> None:
    plain, lean = frozen_unet(base_model), frozen_unet(base_model)
    many = 16 * 16 * lean.config.block_out_channels[0]
    recompute_wide_layers(lean, latent_size=16, least=many)
    for layer in lean.modules():
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = False
    given: list[int] = []

    def note(_: object, __: object, normalized: torch.Tensor) -> None:
        if normalized.requires_grad and normalized[0].numel() >= many:
            given.append(normalized.nbytes)

    for layer in plain.modules():
        if isinstance(layer, ResnetBlock2D):
            layer.norm1.register_forward_hook(note)
            layer.norm2.register_forward_hook(note)
    assert kept_bytes(plain) - kept_bytes(lean) == sum(given) > 0
    for value, wanted in zip(prediction_and_gradient(lean), prediction_and_gradient(plain), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 1, "stride": 2}, {"dilation": 2, "bias": False}])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-3)])
def test_small_convolutions_copy_no_weights_and_give_the_same(
    options: dict[str, Any], images: int, dtype: torch.dtype, error: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv2d(24, 512, kernel_size=3, **options).requires_grad_(False).to(dtype)
    x = torch.randn(images, 24, 8, 7, generator=generator).to(dtype).requires_grad_(True)
    exact, exact_x = copy.deepcopy(layer).float(), x.detach().float().requires_grad_(True)
    wanted = exact(exact_x)
    weights = torch.randn(wanted.shape, generator=generator).to(dtype)
    (wanted_gradient,) = torch.autograd.grad(wanted, exact_x, weights.float())
    keep_less(layer)
    with torch.profiler.profile() as profile:
        result = layer(x)
        (gradient,) = torch.autograd.grad(result, x, weights)
    for value, exactly in ((result, wanted), (gradient, wanted_gradient)):
        assert value.dtype == dtype and (value - exactly).norm() < error * exactly.norm()
    assert not any("convolution" in event.key for event in profile.key_averages())


# --- loss ----------------------------------------------------------------------------------------


def test_loss_without_prior_by_hand() -> None:
    # Two images of one channel and two latents. The first counts one latent only: its loss is 3^2 = 9, not the
    # mean over both. The second counts both: (1^2 + 2^2) / 2 = 2.5.
    prediction = torch.tensor([[[[3.0, 100.0]]], [[[1.0, 2.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 1.0]]]])
    loss, instance, prior = custom_diffusion_loss(prediction, torch.zeros(2, 1, 1, 2), mask, None)
    assert (loss.item(), instance.item(), prior.item()) == (5.75, 5.75, 0.0)


def test_loss_with_prior_by_hand() -> None:
    # One instance image, masked: 3^2 = 9. One class image, whose mask does not matter: (1^2 + 3^2) / 2 = 5.
    prediction = torch.tensor([[[[3.0, 100.0]]], [[[1.0, 3.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]])
    loss, instance, prior = custom_diffusion_loss(prediction, torch.zeros(2, 1, 1, 2), mask, 0.5)
    assert (loss.item(), instance.item(), prior.item()) == (11.5, 9.0, 5.0)


def test_loss_of_weighted_images_by_hand() -> None:
    # Two instance images, masked: 3^2 = 9 and 2^2 = 4; two class images: (1^2 + 3^2) / 2 = 5 and 2^2 = 4.
    prediction = torch.tensor([[[[3.0, 100.0]]], [[[2.0, 2.0]]], [[[1.0, 3.0]]], [[[2.0, 2.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 1.0]]], [[[0.0, 0.0]]], [[[0.0, 0.0]]]])
    mask[1, ..., 1] = 0
    weights = torch.tensor([0.5, 0.25, 0.2, 1.0])
    loss, instance, prior = custom_diffusion_loss(prediction, torch.zeros(4, 1, 1, 2), mask, 2.0, weights)
    assert instance.item() == pytest.approx((0.5 * 9 + 0.25 * 4) / 2)
    assert prior.item() == pytest.approx((0.2 * 5 + 1.0 * 4) / 2)
    assert loss.item() == pytest.approx(2.75 + 2 * 2.5)
    assert torch.equal(
        custom_diffusion_loss(prediction, torch.zeros(4, 1, 1, 2), mask, 2.0, torch.ones(4))[0],
        custom_diffusion_loss(prediction, torch.zeros(4, 1, 1, 2), mask, 2.0)[0],
    )


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    # alpha^2 of 0.96, 0.8 and 0.5 are SNRs of 24, 4 and 1; gamma is 5.
    [("epsilon", [5 / 24, 1.0, 1.0]), ("v_prediction", [5 / 25, 4 / 5, 1 / 2])],
)
def test_min_snr_weights_by_hand(prediction_type: str, expected: list[float]) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=3, prediction_type=prediction_type)
    scheduler.alphas_cumprod = torch.tensor([0.96, 0.8, 0.5])
    weights = min_snr_weights(scheduler, torch.tensor([0, 1, 2, 0]), gamma=5.0)
    assert weights.tolist() == pytest.approx([*expected, expected[0]], rel=1e-5)


@pytest.mark.parametrize(("prediction_type", "expected"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weights_are_finite_without_any_signal(prediction_type: str, expected: float) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    assert min_snr_weights(scheduler, torch.tensor([999]), gamma=5.0).item() == pytest.approx(expected, abs=1e-5)


def test_the_objective_weighs_every_image_by_its_noise(base_model: Path) -> None:
    plain, weighted = load(base_model), load(base_model, snr_gamma=0.01)
    inputs = batch(plain)
    with torch.no_grad():
        alone = [
            plain(
                **{
                    name: {k: v[i : i + 1] for k, v in x.items()} if name == "input_ids" else x[i : i + 1]
                    for name, x in inputs.items()
                }
            )[0].item()
            for i in range(2)
        ]
        weights = min_snr_weights(plain.noise_scheduler, inputs["timesteps"], 0.01).tolist()
        assert weights[0] < 0.01 < weights[1]
        expected = (weights[0] * alone[0] + weights[1] * alone[1]) / 2
        assert weighted(**inputs)[0].item() == pytest.approx(expected, rel=1e-4)


def test_loss_divides_by_the_masked_latents_of_one_channel() -> None:
    # As the example does: the sum runs over channels, the mask has one. Four channels of error 1 count 4.
    loss, *_ = custom_diffusion_loss(torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.ones(1, 1, 2, 2), None)
    assert loss.item() == 4.0


def test_loss_is_computed_in_float32() -> None:
    prediction = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)
    loss, *_ = custom_diffusion_loss(prediction, torch.zeros_like(prediction), torch.ones(1, 1, 1, 1), None)
    assert loss.item() == 90000.0, "more than float16 can hold"


@pytest.mark.parametrize("name", ["base_model", "base_model_v"])
def test_the_target_is_what_the_base_model_predicts(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model = load(folder)
    inputs = batch(model)
    noisy = model.noise_scheduler.add_noise(inputs["latents"], inputs["noise"], inputs["timesteps"])
    # DDPM's forward process and velocity by their formulas (Ho et al. 2020; Salimans and Ho 2022).
    alpha = model.noise_scheduler.alphas_cumprod[inputs["timesteps"]].sqrt().view(2, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    assert torch.allclose(noisy, alpha * inputs["latents"] + sigma * inputs["noise"], atol=1e-6)
    velocity = alpha * inputs["noise"] - sigma * inputs["latents"]
    target = velocity if name == "base_model_v" else inputs["noise"]
    with torch.no_grad():
        features = model.encode_prompts(inputs["input_ids"])["features"]
        prediction = model.unet(noisy, inputs["timesteps"], features).sample
        expected = (prediction - target).square().sum([1, 2, 3]).div(64).mean()
        assert torch.allclose(model(**inputs)[0], expected, rtol=1e-5)


def test_training_lowers_the_loss(base_model: Path) -> None:
    model = load(base_model)
    optimizer = torch.optim.AdamW(model.trained().values(), lr=1e-2)
    inputs = batch(model)
    losses = []
    for _ in range(20):
        loss, *_ = model(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("gated", [(), GATED])
def test_gradient_checkpointing_gives_the_same_gradients(base_model: Path, gated: tuple[GatedWords, ...]) -> None:
    plain, saving = load(base_model, gated=gated), load(base_model, gated=gated)
    saving.enable_gradient_checkpointing()
    for model in (plain, saving):
        model.train()
        model(**batch(model))[0].backward()
    for name, value in plain.trained().items():
        assert torch.allclose(value.grad, saving.trained()[name].grad, rtol=1e-4, atol=1e-7), name


def test_recomputing_on_a_cpu_gives_the_same_gradients(base_model: Path) -> None:
    plain, saving = load(base_model), load(base_model)
    saving.recompute_cheaply(latent_size=1024)  # as if every layer were wide
    for model in (plain, saving):
        model.train()
        model(**batch(model))[0].backward()
    for name, value in plain.trained().items():
        assert torch.equal(value.grad, saving.trained()[name].grad), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(own, marks=pytest.mark.long)
            for own in ({"rank": 2}, {"gated": GATED}, {"rank": 2, "gated": GATED})
        ),
    ],
)
def test_compiling_gives_the_same_loss_and_gradients(base_model: Path, options: dict[str, Any]) -> None:
    # Graphs are captured forwards and backwards as for inductor, whose own part takes minutes even on this model.
    plain, compiled = load(base_model, **options), load(base_model, **options)
    compiled.compile_unet(backend="aot_eager", fullgraph=True)
    losses = []
    for model in (plain, compiled):
        model.enable_gradient_checkpointing()
        model.train()
        losses.append(model(**batch(model))[0])
        losses[-1].backward()
    assert torch.allclose(*losses, rtol=1e-5)
    assert all(value.grad is not None and value.grad.isfinite().all() for value in plain.trained().values())
    for name, value in plain.trained().items():
        assert torch.allclose(value.grad, compiled.trained()[name].grad, rtol=1e-4, atol=1e-7), name
    assert plain.state_dict().keys() == compiled.state_dict().keys()


def test_short_attention_in_bfloat16_is_fused_attention() -> None:
    """Values and gradients, of self-attention and of text; and in fp32, diffusers' own to the bit."""
    torch.manual_seed(0)
    attn = Attention(query_dim=16, cross_attention_dim=8, heads=2, dim_head=8)
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float32, 0.0)):
        attn.to(dtype)
        results = []
        for processor in (ShortAttnProcessor(), AttnProcessor2_0()):
            attn.set_processor(processor)
            shapes = (2, 9, 16), (2, 5, 8)
            x, text = (torch.ones(shape, dtype=dtype).cumsum(1).sin().requires_grad_() for shape in shapes)
            out = attn(x, text)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, text, attn.to_q.weight))))
        for short, fused in zip(*results, strict=True):
            assert (short - fused).float().norm() <= tolerance * fused.float().norm()
            assert dtype != torch.float32 or torch.equal(short, fused)
    query = torch.zeros(1, 1, 4, 8, dtype=torch.bfloat16)
    assert is_short(query, query)
    assert not is_short(query, torch.zeros(1, 1, 4096, 8, dtype=torch.bfloat16))
