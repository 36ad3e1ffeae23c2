"""What an evaluation has found: as JSON, as a table, and on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from custom_diffusion.files import write_bytes

JSON_NAME = "evaluation.json"
TABLE_NAME = "evaluation.md"


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation, beside its control.

    Attributes:
        name: what was measured.
        kind: ``text``, ``image`` or ``kid``.
        encoder: whose features it is of.
        value: the number.
        spread: its standard deviation over KID's subsets.
        control, control_spread: the same of the control.
        control_name: what the control is.
        higher_is_better: whether it is.
    """

    name: str
    kind: str
    encoder: str
    value: float
    spread: float | None = None
    control: float | None = None
    control_spread: float | None = None
    control_name: str = ""
    higher_is_better: bool = True


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        what: was evaluated, a folder or Hub id.
        measures: the numbers.
        facts: all that they depend on: base model, prompts, counts, sampling.
        checkpoints: of ``--checkpoints``, a row for each.
        verdict: which of them is best, and why.
    """

    what: str
    measures: list[Measure]
    facts: Mapping[str, Any] = field(default_factory=dict)
    checkpoints: Sequence[Mapping[str, Any]] = ()
    verdict: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything, as it stands in ``evaluation.json``."""
        return {
            "what": self.what,
            "facts": dict(self.facts),
            "measures": [asdict(measure) for measure in self.measures],
            "checkpoints": [dict(row) for row in self.checkpoints],
            "verdict": self.verdict,
        }

    def as_markdown(self) -> str:
        """The table, what the numbers depend on, and how to read them."""
        parts = [f"# Evaluation of {self.what}"]
        if self.verdict is not None:
            parts += [str(self.verdict["sentence"]), "\n".join(self.checkpoint_table())]
        if self.measures:
            parts.append("\n".join(self.table()))
        parts.append("\n".join(f"- {name}: {_shown(value)}" for name, value in self.facts.items()))
        return "\n\n".join(part for part in parts if part) + "\n"

    def table(self) -> list[str]:
        """The lines of the table of the measures."""
        lines = ["| measure | better | encoder | result | control |", "|---|---|---|---|---|"]
        for one in self.measures:
            result = number(one.value, one.spread, one.kind)
            control = "" if one.control is None else number(one.control, one.control_spread, one.kind)
            named = f"{control} ({one.control_name})" if control else ""
            better = "higher" if one.higher_is_better else "lower"
            lines.append(f"| {one.name} | {better} | {one.encoder} | {result} | {named} |")
        return lines

    def checkpoint_table(self) -> list[str]:
        """The lines of the table of the checkpoints."""
        if not self.checkpoints:
            return []
        names = list(self.checkpoints[0])
        lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        for row in self.checkpoints:
            cells = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]
            lines.append(f"| {' | '.join(cells)} |")
        return lines


def number(value: float, spread: float | None, kind: str) -> str:
    """A measure with as many digits as it means something to."""
    digits = 2 if kind == "kid" else 4
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def write_results(evaluation: Evaluation, folder: Path) -> None:
    """Write ``evaluation.json`` and ``evaluation.md``, each whole or not at all.

    Raises:
        OSError: where one cannot be written.
    """
    content = json.dumps(evaluation.as_json(), indent=2, ensure_ascii=False)
    write_bytes(folder / JSON_NAME, content.encode(errors="backslashreplace"))
    write_bytes(folder / TABLE_NAME, evaluation.as_markdown().encode(errors="backslashreplace"))
