"""Curves as SVG that stands in a page: drawn by matplotlib, in the colours of the page."""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

MISSING = "pip install '.[report]' (matplotlib) adds the curves to this page."

# Of a curve; beyond that every second, third, ... of them is left out. A report is no place for megabytes of numbers.
MOST_POINTS = 5000

_FOREGROUND = "#123456"  # stands for the colour of the page's text, which is another in dark mode
_COLOURS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_SIZE = (6.4, 2.9)  # inches; the page scales it


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        label: in the legend, and by which the line is found in the SVG.
        x, y: equally many numbers.
        colour: of the line, one that can be seen on white and on black.
        width: of the line in points; 0 for dots alone.
        opacity: from 0 to 1.
        notes: what to write beside the points, if anything.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    width: float = 1.8
    opacity: float = 1.0
    notes: Sequence[str] = ()


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def chart(name: str, curves: Sequence[Curve], x_label: str, y_label: str, log: bool = False) -> str:
    """An SVG element with one chart.

    Args:
        name: of the chart, unlike those of the others in the page.
        log: whether the y-axis is logarithmic.
    """
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    rules = {"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": False, "font.size": 9}
    rules |= dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _FOREGROUND
    )
    with matplotlib.rc_context(rules):
        figure = figures.Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            _draw(axes, f"{name}-{number}", curve)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_yscale("log" if log else "linear")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if len(curves) > 1:
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _fit_for_page(buffer.getvalue().decode(), name)


def _draw(axes: object, line_id: str, curve: Curve) -> None:
    every = max(1, -(-len(curve.x) // MOST_POINTS))
    x, y = list(curve.x)[::every], list(curve.y)[::every]
    style = {"color": curve.colour, "linewidth": curve.width, "alpha": curve.opacity, "label": curve.label}
    # A single point is no line.
    style |= {"marker": "o", "markersize": 4} if len(x) < 30 or not curve.width else {}
    axes.plot(x, y, gid=line_id, **style)  # type: ignore[attr-defined]
    for text, left, top in zip(curve.notes, x, y, strict=False):
        # "$" would be mathematics.
        note = text.replace("$", r"\$")
        axes.annotate(note, (left, top), xytext=(5, 4), textcoords="offset points")  # type: ignore[attr-defined]


def _fit_for_page(svg: str, name: str) -> str:
    """The element alone, in the page's colour and as wide as there is room, with names that no other chart has."""
    svg = svg[svg.index("<svg") :].replace(_FOREGROUND, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 class="chart" role="img" aria-label="{name}"', svg, count=1)
    # matplotlib calls the parts of every chart alike.
    svg = re.sub(r'\bid="(?!' + re.escape(name) + ")", f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", svg)
    return re.sub("<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
