"""--quantize_base: a frozen UNet in fewer bits, and a concept that starts from the weights themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from torch import Tensor, nn

import train_custom_diffusion
from custom_diffusion.concept.files import load_concept
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.training.quantizing import load_unet
from tests.conftest import ROOT, flags, run_script
from train_custom_diffusion import parse_args

Train = Callable[[list[str]], None]
KINDS = ("8bit", "4bit")


@pytest.fixture
def four_bits_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes computes on CPUs too; diffusers alone asks for a GPU, and so does the command line."""
    monkeypatch.setattr(train_custom_diffusion, "_has_cuda", lambda: True)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *_: {"": "cpu"})


def whole_weight(linear: nn.Linear) -> Tensor:
    """What a linear layer multiplies with."""
    if hasattr(linear.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return linear.weight.dequantize() if hasattr(linear.weight, "dequantize") else linear.weight


def quantized_layers(unet: UNet2DConditionModel) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and type(layer.weight) is not nn.Parameter
    }


def predict(unet: UNet2DConditionModel) -> tuple[Tensor, Tensor]:
    """What it predicts, and the gradient that text features get."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    features = torch.randn(2, 77, 32, generator=generator).requires_grad_()
    unet.train()  # else bitsandbytes packs its weights anew for inference on a CPU
    predicted = unet(noise, 500, features).sample
    predicted.square().mean().backward()
    return predicted.detach(), features.grad


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.usefixtures("four_bits_on_a_cpu")
@pytest.mark.parametrize(("kind", "most"), [("8bit", 0.02), ("4bit", 0.3)])
def test_all_linear_layers_but_the_cross_attention_are_quantized(kind: str, most: float, base_model: Path) -> None:
    model = BaseModel(str(base_model))
    unet, original = load_unet(model, kind, torch.float32), model.unet()
    layers = quantized_layers(unet)
    linear = {name for name, layer in original.named_modules() if isinstance(layer, nn.Linear)}
    assert layers.keys() == {name for name in linear if ".attn2." not in name}
    predicted, gradient = predict(unet)
    assert 0 < distance(predicted, predict(original)[0]) < most
    # It computes with the rounded weights, and so do its gradients: those of a UNet that holds these in fp32.
    for name, layer in layers.items():
        original.get_submodule(name).weight.data = whole_weight(layer).float()
    expected, expected_gradient = predict(original)
    assert distance(predicted, expected) < 1e-3
    assert distance(gradient, expected_gradient) < 0.02


@pytest.mark.usefixtures("four_bits_on_a_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_starts_from_the_weights_themselves(kind: str, base_model: Path) -> None:
    model = BaseModel(str(base_model))
    unet, original = load_unet(model, kind, torch.bfloat16), dict(model.unet().named_parameters())
    kept = {name: value for name, value in unet.named_parameters() if ".attn2." in name}
    assert len(kept) == len([name for name in original if ".attn2." in name])
    assert all(torch.equal(value, original[name]) for name, value in kept.items())
    assert unet.conv_in.weight.dtype == torch.bfloat16


def attention_of(folder: Path) -> Tensor:
    return torch.cat([value.flatten() for value in load_concept(folder).attention.values()])


@pytest.mark.usefixtures("four_bits_on_a_cpu")
@pytest.mark.parametrize(
    ("kind", "precision"),
    [("8bit", "bf16"), *(pytest.param(*one, marks=pytest.mark.long) for one in (("8bit", "no"), ("4bit", "bf16")))],
)
def test_it_learns_nearly_the_same(
    kind: str, precision: str, base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    # Steps of AdamW have the same size whatever the gradient's, so that a direction of its own would show.
    more: dict[str, Any] = {"learning_rate": 1e-3, "adam_weight_decay": 0, "mixed_precision": precision}
    more |= {"max_train_steps": 3, "checkpointing_steps": 2}
    train_here(flags(base_model, images, tmp_path / "whole", **more))
    train_here(flags(base_model, images, tmp_path / kind, **more, quantize_base=kind))
    originals = BaseModel(str(base_model)).unet()
    start = torch.cat([
        originals.get_parameter(key.replace(".processor", "").replace("_custom_diffusion", "")).detach().flatten()
        for key in load_concept(tmp_path / kind).attention
    ])  # fmt: skip
    learned, expected = attention_of(tmp_path / kind) - start, attention_of(tmp_path / "whole") - start
    assert 0 < distance(learned, expected) < 1
    assert torch.cosine_similarity(learned, expected, dim=0) > 0.7
    # A resumed run cannot be told apart.
    train_here(flags(base_model, images, tmp_path / kind, **more, quantize_base=kind, resume_from_checkpoint="latest"))
    assert torch.equal(attention_of(tmp_path / kind) - start, learned)


@pytest.mark.long
def test_the_command_finds_what_other_commands_hide(base_model: Path, images: Path, tmp_path: Path) -> None:
    argv = flags(base_model, images, tmp_path, quantize_base="8bit", max_train_steps=1)
    result = run_script("python", ROOT / "train_custom_diffusion.py", *argv)
    assert result.returncode == 0, result.stderr
    assert "torchao" not in result.stderr, "no warnings that are none of the user's business"


@pytest.mark.parametrize(
    ("kind", "environment", "missing", "words"),
    [
        ("8bit", {}, "torchao", ["torchao", "pip install '.[quantize]'"]),
        ("4bit", {}, "bitsandbytes", ["bitsandbytes", "pip install '.[8bit]'"]),
        ("4bit", {}, None, ["needs a CUDA GPU", "--quantize_base=8bit"]),
        ("8bit", {"WORLD_SIZE": "2"}, None, ["for one process"]),
    ],
)
def test_what_cannot_work_gets_a_line(
    kind: str,
    environment: dict[str, str],
    missing: str | None,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    monkeypatch.setattr(train_custom_diffusion, "_has_cuda", lambda: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse_args(flags(Path(), Path(), Path(), quantize_base=kind))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in error for word in words)
