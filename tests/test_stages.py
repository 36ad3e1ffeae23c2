"""benchmarks.train --stages: the time of a stage within another counts once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import stages


def test_a_stage_within_another_counts_as_its_own_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    def fail() -> None:
        work(16)
        raise RuntimeError

    monkeypatch.setattr(stages.time, "perf_counter", lambda: now)
    clock = stages.StageClock()
    script = SimpleNamespace(validate=lambda: work(4), fail=fail)

    def train() -> str:
        work(1)
        script.validate()
        work(2)
        return "done"

    script.train = train
    for name, stage in (("train", "steps"), ("validate", "validation"), ("fail", "saving")):
        clock.watch(script, name, stage)
    work(8)
    assert script.train() == "done"
    with pytest.raises(RuntimeError):
        script.fail()
    work(32)
    clock.note()
    assert clock.seconds == {stages.REST: 8 + 32, "steps": 1 + 2, "validation": 4, "saving": 16}


@pytest.mark.parametrize("stage", stages.STAGES)
def test_what_is_watched_is_there(stage: str) -> None:
    functions: list[tuple[Any, str]] = stages.STAGES[stage]
    assert all(callable(getattr(owner, name)) for owner, name in functions)
