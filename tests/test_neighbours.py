"""The comparison with other methods: how a try is chosen, what counts as better, and what a training cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.neighbours import Contest, Method, is_dominated, methods, parse_args, size_on_disk, table, train

GOOD = {"as taught": 0.9, "as taught, on the background": 0.8, "loss on what was not taught": 0.01}


def test_the_best_try_that_keeps_the_rest_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    method = replace(methods(tmp_path)["lora"], rates=(1e-4, 1e-3, 1e-2), steps=500)
    shares = {(1e-4, 500): (0.2, 0.0), (1e-3, 500): (0.6, 0.09), (1e-2, 500): (1.0, 0.11), (1e-3, 1000): (0.7, 0.1)}
    tried = []

    def figures(self: Contest, name: str, method: Method, noun: str, rate: float, steps: int, *_: int) -> dict:
        tried.append((rate, steps))
        share, drift = shares[rate, steps]
        return {"as taught": share, "as taught, on the background": share, "loss on what was not taught": drift}

    monkeypatch.setattr(Contest, "figures", figures)
    assert Contest(tmp_path, images=4).choose("lora", method) == (1e-3, 1000)
    assert tried == list(shares)
    shares[1e-3, 1000] = (1.0, 0.2)
    assert Contest(tmp_path, images=4).choose("lora", method) == (1e-3, 500), "more steps spoil it"
    shares = dict.fromkeys([*shares, (1e-4, 1000)], (0.5, 0.5))
    assert Contest(tmp_path, images=4).choose("lora", method) == (1e-4, 500), "all spoil it: there is a choice still"


def test_the_pareto_front() -> None:
    better = GOOD | {"learned apart": 0.3}
    means = {"one": GOOD, "two": better, "three": GOOD | {"as taught": 0.95}}
    assert is_dominated("one", means)
    assert not is_dominated("two", means)
    assert not is_dominated("three", means)
    assert is_dominated("three", means | {"two": better | {"as taught": 0.95}})
    assert not is_dominated("one", {"one": GOOD, "other": dict(GOOD)}), "equal is not better"
    less_drift = {"one": better, "two": better | {"loss on what was not taught": 0.0}}
    assert is_dominated("one", less_drift)


def test_the_table_has_means_and_spreads(tmp_path: Path) -> None:
    known = methods(tmp_path)
    costs = {"processor seconds": 60.0, "peak bytes": 2.0**30, "bytes on disk": 2e6}
    rows = {
        "dreambooth": (known["dreambooth"], 1e-5, 500, [GOOD | costs, GOOD | costs | {"as taught": 0.7}]),
        "ours": (known["ours"], 1e-3, 1000, [GOOD | costs, {"learned apart": 0.25}]),
    }
    text = table(rows, [0.3, 0.5])
    assert "| as taught | 80% (70% to 90%) | 90% (90% to 90%) |" in text
    assert "| learned apart | – | 25% (25% to 25%) |" in text
    assert "| peak bytes | 1.00 GiB (1.00 GiB to 1.00 GiB) |" in text
    assert "DreamBooth: 1e-05, 500; Custom Diffusion, ours: 0.001, 1000" in text
    assert "learned apart: Custom Diffusion, ours.\n" in text, "the front"


def test_a_training_is_measured_once_and_begun_again_if_it_failed(tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "run" / "result"
    script.write_text("import sys; print('no'); sys.exit(3)")
    with pytest.raises(SystemExit, match=r"see .*log\.txt"):
        train([str(script)], folder)
    assert "no" in (folder / "log.txt").read_text()
    script.write_text(f"from pathlib import Path\nwith Path({str(tmp_path / 'count')!r}).open('a') as f: f.write('x')")
    train([str(script)], folder)
    train([str(script)], folder)
    assert (tmp_path / "count").read_text() == "x"


def test_only_what_has_to_be_kept_counts(tmp_path: Path) -> None:
    for name, size in {"unet/model.safetensors": 50, "pytorch_lora_weights.safetensors": 7, "log.txt": 9}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert size_on_disk(tmp_path) == 7, "not the copy of a checkpoint beside it"
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    assert size_on_disk(tmp_path) == 50


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--methods=hypernetwork"], "no method 'hypernetwork'"), ([], "give a clone of https://github.com")],
)
def test_a_mistake_gets_one_line(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--diffusers", str(tmp_path), "--work", str(tmp_path), *more])
    assert message in capsys.readouterr().err
