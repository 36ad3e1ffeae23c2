"""``report.html``: a run at a glance, in one file that needs nothing else.

It is made of what the run has left in its output folder, so that it can be made again at any time.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from custom_diffusion.files import write_bytes
from custom_diffusion.report.curves import MISSING, Curve, can_draw, chart
from custom_diffusion.report.thumbnails import Thumbnails, evenly

REPORT_NAME = "report.html"
LOG_NAME = "training_log.json"
EVALUATIONS = (Path("evaluation", "evaluation.json"), Path("evaluation", "checkpoints", "evaluation.json"))

BUDGET = 2_000_000  # bytes of images; with curves and text the page stays below 3 MB
MOST_INSTANCE_IMAGES = 12
MOST_COLUMNS = 16  # of a timeline
MOST_AT_ONCE = 4  # images of a prompt and step
MOST_TIMELINE_IMAGES = 110  # of all prompts together
SMOOTHING = 0.1  # weight of the newest loss in the running mean

BLUE, ORANGE, GREEN, GREY = "#3b82f6", "#ea7317", "#16a34a", "#8a8f98"

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { border-radius: 4px; height: auto; max-width: 100%; vertical-align: top; }
.row { display: flex; flex-wrap: wrap; gap: .5rem; }
.row img { max-width: 9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem .25rem 0;
text-align: left; vertical-align: top; }
.time td { white-space: nowrap; } .time img { display: block; margin-bottom: .25rem; max-width: none; width: 7rem; }
.chart { display: block; height: auto; max-width: 44rem; min-width: 34rem; width: 100%; }
.best { font-weight: bold; }
code, pre { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
pre { background: #8882; border-radius: 4px; padding: .6rem; white-space: pre-wrap; }
"""


def write_report(folder: Path) -> Path | None:
    """Write ``report.html`` into the output folder of a run, whole; gives its path, None where no run has left a log.

    Raises:
        OSError: where it cannot be written.
    """
    log = _read(folder / LOG_NAME)
    if log is None:
        return None
    evaluations = [found for path in EVALUATIONS if (found := _read(folder / path)) is not None]
    write_bytes(folder / REPORT_NAME, render(folder, log, evaluations).encode(errors="backslashreplace"))
    return folder / REPORT_NAME


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def render(folder: Path, log: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page.

    Args:
        folder: where the validation images are.
        log: the content of ``training_log.json``, see :class:`history.History`.
        evaluations: the contents of the ``evaluation.json`` of the result and of the checkpoints, as far as there are.
    """
    facts, thumbnails = log.get("facts", {}), Thumbnails(BUDGET)
    title = f"Custom Diffusion: {', '.join(facts.get('tokens', [])) or folder.resolve().name}"
    sections = [
        _summary(log),
        _section("Your images", _instance_images(facts, thumbnails)),
        _section("Losses", _losses(log)),
        _section("Validation images", _timelines(folder, log.get("images", []), thumbnails)),
        _section("Evaluation", "".join(map(_evaluation_or_nothing, evaluations))),
        _section("Learning rate", _learning_rate(log.get("steps", []))),
        _section("Settings", _pairs({"base model": facts.get("base_model"), **facts.get("settings", {})})),
        _section("What to type next", "".join(f"<pre>{escape(line)}</pre>" for line in facts.get("next", []))),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{content}</section>\n" if content else ""


def _summary(log: Mapping[str, Any]) -> str:
    """How far the run is, what it took, and which step was best."""
    facts, steps = log.get("facts", {}), log.get("steps", [])
    done, total = (steps[-1]["step"] if steps else 0), facts.get("total_steps")
    parts = [f"{done} of {total} steps."]
    if "seconds_per_step" in facts:
        parts.append(f"{facts['precision']}, {facts['seconds_per_step']:.2f} s per step, at most {facts['memory']}.")
    images, classes = len(facts.get("instance_images", [])), facts.get("class_images", 0)
    parts.append(f"{images} instance images, {classes} class images.")
    lowest = _lowest(log.get("validations", []))
    best = facts.get("best") or (
        f"The validation loss is lowest at step {int(lowest['step'])} so far: {lowest['validation_loss']:.4f}"
        if lowest
        else None
    )
    return f"<p>{escape(' '.join(parts))}</p>" + (f'<p class="best">{escape(best)}.</p>' if best else "")


def _lowest(validations: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The validation with the lowest loss after the first step."""
    learned = [row for row in validations if row["step"] > 0]
    return min(learned, key=lambda row: row["validation_loss"], default=None)


def _instance_images(facts: Mapping[str, Any], thumbnails: Thumbnails) -> str:
    shown = [
        thumbnails.element(Path(path), escape(prompt))
        for path, prompt in evenly(facts.get("instance_images", []), MOST_INSTANCE_IMAGES)
    ]
    content = f'<div class="row">{"".join(shown)}</div>' if any(shown) else ""
    held_out = [
        thumbnails.element(Path(path), escape(prompt))
        for path, prompt in evenly(facts.get("validation_images", []), MOST_INSTANCE_IMAGES)
    ]
    if any(held_out):
        content += f'<p>Not trained on, for the validation loss:</p><div class="row">{"".join(held_out)}</div>'
    return content


# --- curves --------------------------------------------------------------------------------------


def _chart(*arguments: Any, **options: Any) -> str:
    return _scrolling(chart(*arguments, **options))


def _scrolling(content: str) -> str:
    """What a narrow screen scrolls, so that it stays legible."""
    return f'<div class="scroll">{content}</div>\n' if content else ""


def smooth(values: Sequence[float]) -> list[float]:
    """The exponential running mean of values, without the bias of its start; what is not finite is left out of it."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = mean + SMOOTHING * (value - mean), weight + SMOOTHING * (1 - weight)
        result.append(mean / weight if weight else value)
    return result


def _columns(rows: Iterable[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """The steps that have a value of this name, and the values."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def _losses(log: Mapping[str, Any]) -> str:
    """Training and validation losses, and a table of the latter."""
    rows, validations = log.get("steps", []), log.get("validations", [])
    if not rows:
        return ""
    if not can_draw():
        return f"<p>{escape(MISSING)}</p>" + _validation_table(validations)
    prior = "instance_loss" in rows[0]
    curves = []
    for name, label, colour in [
        ("instance_loss" if prior else "loss", "instance loss", BLUE),
        *([("prior_loss", "prior loss", ORANGE)] if prior else []),
    ]:
        x, y = _columns(rows, name)
        curves.append(Curve(f"{label} of every step", x, y, colour, 0.6, 0.25))
        curves.append(Curve(f"{label}, smoothed", x, smooth(y), colour))
    content = _chart("losses", curves, "step", "loss", log=prior)
    for name, label, colour in (
        ("validation_loss", "validation loss", BLUE),
        ("validation_prior_loss", "loss of class images", ORANGE),
    ):
        x, y = _columns(validations, name)
        # A chart each: their sizes differ so much that the changes in one would not be seen.
        content += _chart(name.replace("_", "-"), [Curve(label, x, y, colour)], "step", label) if x else ""
    return content + _validation_table(validations)


def _validation_table(validations: Sequence[Mapping[str, float]]) -> str:
    if not validations:
        return ""
    best = _lowest(validations)
    lines = []
    for row in evenly(list(validations), 40):
        cells = [str(int(row["step"])), f"{row['validation_loss']:.4f}"]
        cells += [f"{row['validation_prior_loss']:.4f}"] if "validation_prior_loss" in row else []
        cells += ["lowest"] if row is best else []
        mark = ' class="best"' if row is best else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<tr><th>step</th><th>validation loss</th><th>of class images</th></tr>"
    return f"<details><summary>Validation losses</summary><table>{head}{''.join(lines)}</table></details>"


def _learning_rate(rows: Sequence[Mapping[str, float]]) -> str:
    if not rows or not can_draw():
        return ""
    x, y = _columns(rows, "lr")
    return _chart("learning-rate", [Curve("learning rate", x, y, GREEN)], "step", "learning rate")


# --- images and tables ---------------------------------------------------------------------------


def _timelines(folder: Path, rows: Sequence[Mapping[str, Any]], thumbnails: Thumbnails) -> str:
    """A row of images for each validation prompt, from the first step to the last."""
    by_prompt: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_prompt[row["prompt"]].append(row)
    at_once = sum(min(MOST_AT_ONCE, len(shown[0]["files"])) for shown in by_prompt.values())
    most = max(2, min(MOST_COLUMNS, MOST_TIMELINE_IMAGES // max(1, at_once)))
    content = []
    for prompt, shown in by_prompt.items():
        cells = []
        for row in evenly(shown, most):
            text = escape(f"{prompt}, step {row['step']}")
            images = "".join(thumbnails.element(folder / file, text) for file in row["files"][:MOST_AT_ONCE])
            cells.append(f"<td>{images}step {int(row['step'])}</td>")
        table = f'<table class="time"><tr>{"".join(cells)}</tr></table>'
        content.append(f'<p>{escape(prompt)}</p><div class="scroll">{table}</div>')
    return "".join(content)


def _evaluation_or_nothing(evaluation: Mapping[str, Any]) -> str:
    # The file may be another program's, or of another version; a run should not end for that.
    try:
        return _evaluation(evaluation)
    except (KeyError, TypeError, AttributeError, ValueError):
        return ""


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    """The measures beside their controls, and of an evaluation of checkpoints which is best."""
    lines = []
    for one in evaluation.get("measures", []):
        digits = 2 if one["kind"] == "kid" else 4
        result = _number(one["value"], one["spread"], digits)
        control = _number(one["control"], one["control_spread"], digits)
        named = f"{control} ({one['control_name']})" if control else ""
        cells = (one["name"], "higher" if one["higher_is_better"] else "lower", one["encoder"], result, named)
        lines.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    head = "<tr><th>measure</th><th>better</th><th>encoder</th><th>result</th><th>control</th></tr>"
    content = f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>' if lines else ""
    verdict = evaluation.get("verdict")
    if verdict:
        sentence = f'<p class="best">{escape(verdict["sentence"])}</p>'
        content = sentence + _scrolling(trade_off(evaluation)) + _checkpoints(evaluation) + content
    return content


def _number(value: float | None, spread: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def trade_off(evaluation: Mapping[str, Any]) -> str:
    """What the checkpoints pay for their image alignment, as an SVG element.

    That is the text alignment or, where it was not measured, the KID; nothing without both.
    """
    rows = evaluation.get("checkpoints", [])
    x_label = next((name for name in ("text alignment", "KID x 1000") if rows and name in rows[0]), None)
    if x_label is None or not can_draw():
        return ""
    best = [row for row in rows if row["checkpoint"] == evaluation["verdict"]["best"]]
    notes = [str(row["checkpoint"]) for row in rows]
    curves = [_dots("checkpoints", rows, x_label, BLUE, notes), _dots("best", best, x_label, ORANGE)]
    return chart("trade-off", curves, x_label, "image alignment")


def _dots(label: str, rows: Sequence[Mapping[str, Any]], x_label: str, colour: str, notes: Sequence[str] = ()) -> Curve:
    x, y = ([row[name] for row in rows] for name in (x_label, "image alignment"))
    return Curve(label, x, y, colour, width=0, notes=notes)


def _checkpoints(evaluation: Mapping[str, Any]) -> str:
    """The numbers of all checkpoints as a table."""
    rows = evaluation.get("checkpoints", [])
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    lines = []
    for row in rows:
        cells = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]
        mark = ' class="best"' if row["checkpoint"] == evaluation["verdict"]["best"] else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _pairs(values: Mapping[str, Any]) -> str:
    lines = [f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in values.items()]
    return f"<table>{''.join(lines)}</table>"
