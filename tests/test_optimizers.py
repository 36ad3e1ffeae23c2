"""The optimizers of --optimizer: what they learn, what they keep, and that a resumed run cannot be told apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from custom_diffusion.concept.files import load_concept
from custom_diffusion.errors import UserError
from tests.conftest import flags, prepare, train
from train_custom_diffusion import OPTIMIZERS, parse_args

Train = Callable[[list[str]], None]
SETTINGS = Path("training_state", "training_settings.json")
RATES = {"adamw": 1e-2, "adamw8bit": 1e-2, "prodigy": 1, "adafactor": 1e-2}


def learned(folder: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_concept(folder).tensors().values()])


def forget(path: Path, *names: str) -> None:
    """Take settings out of a checkpoint's, as an earlier version wrote them."""
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in settings.items() if name not in names}))


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_bit_equal(
    name: str, base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    more = {"optimizer": name, "learning_rate": RATES[name], "max_train_steps": 2, "checkpointing_steps": 1}
    train_here(flags(base_model, images, tmp_path / "whole", **more))
    (tmp_path / "parts").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")
    train_here(flags(base_model, images, tmp_path / "parts", **more, resume_from_checkpoint="latest"))
    assert torch.equal(learned(tmp_path / "whole"), learned(tmp_path / "parts"))
    assert not torch.equal(learned(tmp_path / "whole"), learned(tmp_path / "whole" / "checkpoint-1")), "it learns"


@pytest.mark.long
def test_eight_bit_adam_has_two_names(base_model: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    train_here(flags(base_model, images, tmp_path / "old", use_8bit_adam=True, learning_rate=1e-2))
    train_here(flags(base_model, images, tmp_path / "new", optimizer="adamw8bit", learning_rate=1e-2))
    assert torch.equal(learned(tmp_path / "old"), learned(tmp_path / "new"))


@pytest.mark.long
@pytest.mark.parametrize(("old", "new"), [({}, {}), ({"use_8bit_adam": True}, {"optimizer": "adamw8bit"})])
def test_checkpoints_from_before_these_flags_resume(
    old: dict[str, object], new: dict[str, object], base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(flags(base_model, images, tmp_path, **old, checkpointing_steps=2))
    forget(tmp_path / "checkpoint-2" / SETTINGS, "optimizer", "snr_gamma")
    train_here(flags(base_model, images, tmp_path, **new, max_train_steps=3, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("more", [{"optimizer": "adafactor"}, {"snr_gamma": 5}])
def test_another_optimizer_or_loss_is_no_way_to_resume(
    more: dict[str, object], base_model: Path, images: Path, tmp_path: Path, train_here: Train
) -> None:
    train_here(flags(base_model, images, tmp_path, checkpointing_steps=2))
    forget(tmp_path / "checkpoint-2" / SETTINGS, "optimizer", "snr_gamma")
    with pytest.raises(UserError, match=next(iter(more))):
        train_here(flags(base_model, images, tmp_path, **more, max_train_steps=3, resume_from_checkpoint="latest"))


def test_prodigy_takes_a_factor_of_one_where_no_rate_is_given() -> None:
    argv = flags(Path(), Path(), Path(), optimizer="prodigy")
    assert parse_args(argv).learning_rate == 1
    assert parse_args([*argv, "--learning_rate=0.5"]).learning_rate == 0.5


def test_adafactors_steps_are_of_the_size_of_the_learning_rate(base_model: Path, images: Path, tmp_path: Path) -> None:
    run = prepare(flags(base_model, images, tmp_path, optimizer="adafactor", learning_rate=1e-3))
    weight = next(value for name, value in run.module.trained().items() if "to_v" in name)
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    run.optimizer.step()
    step = (weight.detach() - before).square().mean().sqrt().item()
    assert step == pytest.approx(1e-3, rel=0.1)
    kept = sum(value.numel() for value in run.optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    assert kept < weight.numel() / 10


def test_prodigy_prints_nothing_of_its_own(
    base_model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(flags(base_model, images, tmp_path, optimizer="prodigy"))
    assert "weight decay" not in capsys.readouterr().out


@pytest.mark.long
def test_min_snr_learns_something_else(base_model_v: Path, images: Path, tmp_path: Path, train_here: Train) -> None:
    train_here(flags(base_model_v, images, tmp_path / "plain", learning_rate=1e-2))
    train_here(flags(base_model_v, images, tmp_path / "weighted", learning_rate=1e-2, snr_gamma=5))
    assert not torch.equal(learned(tmp_path / "plain"), learned(tmp_path / "weighted"))
    assert "| snr_gamma | 5.0 |" in (tmp_path / "weighted" / "README.md").read_text()
    assert "snr_gamma" not in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", "AdamW"), ("adamw8bit", "AdamW8bit"), ("prodigy", "Prodigy"), ("adafactor", "Adafactor")],
)
def test_each_name_is_its_optimizer_with_its_numbers(
    name: str, kind: str, base_model: Path, images: Path, tmp_path: Path
) -> None:
    betas = {} if name == "adafactor" else {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    run = prepare(flags(base_model, images, tmp_path, optimizer=name, adam_weight_decay=0.03, learning_rate=1, **betas))
    (group,) = run.optimizer.param_groups
    assert type(run.optimizer.optimizer).__name__ == kind
    assert group["weight_decay"] == 0.03
    if betas:
        assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-6)


def test_gradients_are_clipped(base_model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    clip = torch.optim.AdamW.step

    def look(optimizer: torch.optim.AdamW, *more: object) -> object:
        gradients = [value.grad for group in optimizer.param_groups for value in group["params"]]
        norms.append(torch.stack([one.norm() for one in gradients if one is not None]).norm().item())
        return clip(optimizer, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    for limit in (1e6, 1e-4):
        train(flags(base_model, images, tmp_path / str(limit), max_grad_norm=limit, max_train_steps=1))
    free, clipped = norms
    assert free > 1e-3
    assert clipped == pytest.approx(1e-4, rel=0.02)
