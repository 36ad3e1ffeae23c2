"""The report: whole, self-contained, escaped, and with every point of the log."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from custom_diffusion.report import curves, page
from custom_diffusion.report.page import render, smooth, write_report
from custom_diffusion.report.thumbnails import evenly
from tests.conftest import draw_images

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<script>alert(1)</script> & \"cat\" 'x' $a_b$"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that every element is closed in its order, and collects what a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._look(dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._look(dict(attrs))

    def _look(self, attributes: dict[str, str | None]) -> None:
        self.sources += [value for name in ("src", "href") if (value := attributes.get(name))]
        self.ids += [attributes["id"]] if attributes.get("id") else []
        assert not [name for name in attributes if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def log_of(folder: Path, steps: int = 40, prompts: int = 2, **facts: object) -> dict[str, object]:
    """A log as a run leaves it, with its images."""
    draw_images(folder / "validation", 6)
    images = [[str(path), NASTY] for path in sorted(draw_images(folder / "own", 5).iterdir())]
    return {
        "facts": {
            "base_model": "CompVis/stable-diffusion-v1-4",
            "tokens": ["<new1>"],
            "instance_images": images[:4],
            "validation_images": images[4:],
            "class_images": 200,
            "total_steps": steps,
            "settings": {"learning_rate": 1e-5},
            "next": ["python infer.py --prompt '<new1> cat'"],
            **facts,
        },
        "steps": [
            {"step": n, "loss": 3 / n, "lr": 1e-5, "instance_loss": 2 / n, "prior_loss": 1 / n}
            for n in range(1, steps + 1)
        ],
        "validations": [
            {"step": n, "validation_loss": abs(n - 20) / 20 + 0.5, "validation_prior_loss": 0.1}
            for n in (0, 10, 20, 40)
        ],
        "images": [
            {"step": n, "prompt": f"{NASTY} {number}", "files": ["validation/0.png", "validation/1.png"]}
            for n in (0, 20, 40)
            for number in range(prompts)
        ],
    }


def charts(text: str) -> dict[str, ElementTree.Element]:
    """The charts of a page by name; each has to be XML."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    return {str(svg.get("aria-label")): svg for svg in found}


def points(svg: ElementTree.Element, line: str) -> int:
    """How many points the first path of a line has."""
    (group,) = (element for element in svg.iter(f"{SVG}g") if element.get("id") == line)
    path = next(group.iter(f"{SVG}path"))
    return len(re.findall(r"[ML] ", str(path.get("d"))))


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    text = render(tmp_path, log_of(tmp_path))
    found = Page(text)
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in found.sources), "nothing is loaded"
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert len(found.ids) == len(set(found.ids))
    assert 'name="viewport"' in text and "color-scheme: light dark" in text
    assert "<title>Custom Diffusion: &lt;new1&gt;</title>" in text


def test_every_image_decodes(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    images = [source for source in Page(render(tmp_path, log)).sources if source.startswith("data:")]
    assert len(images) == 4 + 1 + 3 * 2 * 2
    for source in images:
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True)))
        image.load()
        assert max(image.size) <= 192


@pytest.mark.parametrize("steps", [40, 2500])
def test_the_curves_have_as_many_points_as_the_log(steps: int, tmp_path: Path) -> None:
    found = charts(render(tmp_path, log_of(tmp_path, steps=steps)))
    assert set(found) == {"losses", "validation-loss", "validation-prior-loss", "learning-rate"}
    for number in range(4):  # instance and prior loss, of every step and smoothed
        assert points(found["losses"], f"losses-{number}") == steps
    assert points(found["learning-rate"], "learning-rate-0") == steps
    for name in ("validation-loss", "validation-prior-loss"):
        assert points(found[name], f"{name}-0") == 4
    assert "currentColor" in ElementTree.tostring(found["losses"]).decode(), "it can be read in dark mode"


def test_what_people_typed_shows_as_text(tmp_path: Path) -> None:
    log = log_of(tmp_path, tokens=[NASTY], next=[NASTY], settings={NASTY: NASTY}, base_model=NASTY, best=NASTY)
    measure = {"name": NASTY, "kind": "text", "encoder": NASTY, "value": 0.5, "spread": None, "control": 0.4,
               "control_spread": None, "control_name": NASTY, "higher_is_better": True}  # fmt: skip
    evaluation = {
        "measures": [measure],
        "verdict": {"sentence": NASTY, "best": NASTY},
        "checkpoints": [{"checkpoint": NASTY, "text alignment": 0.5, "image alignment": 0.6}],
    }
    text = render(tmp_path, log, [evaluation])
    assert "<script" not in text
    found = Page(text)
    assert "".join(found.words).count(NASTY) >= 8
    assert "trade-off" in charts(text)


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    log = log_of(tmp_path, steps=20_000, prompts=3)
    # Noise: no image is larger.
    for number in range(2):
        Image.effect_noise((512, 512), 100).convert("RGB").save(tmp_path / "validation" / f"{number}.png")
    log["images"] = [
        {"step": 50 * n, "prompt": f"prompt {number}", "files": ["validation/0.png", "validation/1.png"] * 3}
        for n in range(400)
        for number in range(3)
    ]
    (tmp_path / page.LOG_NAME).write_text(json.dumps(log))
    path = write_report(tmp_path)
    assert path is not None and path.stat().st_size < 3_000_000
    text = path.read_text()
    for number in range(3):
        assert f"prompt {number}, step 0" in text
    assert "prompt 2, step 19950" in text, "the last of each prompt is there"
    assert points(charts(text)["losses"], "losses-0") <= curves.MOST_POINTS


def test_no_log_no_report(tmp_path: Path) -> None:
    assert write_report(tmp_path) is None
    (tmp_path / page.LOG_NAME).write_text("{")
    assert write_report(tmp_path) is None
    assert not (tmp_path / page.REPORT_NAME).exists()


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    for log in ({}, {"facts": {}, "steps": [], "validations": [{"step": 0, "validation_loss": 1.0}], "images": []}):
        Page(render(tmp_path, log))
    gone = log_of(tmp_path)
    gone["facts"]["instance_images"] = [[str(tmp_path / "gone.png"), "x"]]
    Page(render(tmp_path, gone))


CHECKPOINTS = [
    {"checkpoint": "checkpoint-1", "text alignment": 0.8, "image alignment": 0.6, "KID x 1000": 20.0},
    {"checkpoint": "checkpoint-2", "text alignment": 0.7, "image alignment": 0.7, "KID x 1000": 25.0},
]


@pytest.mark.parametrize("left_out", ["KID x 1000", "text alignment"])
def test_checkpoints_are_shown_with_their_trade_off(left_out: str, tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != left_out} for row in CHECKPOINTS]
    verdict = {"best": "checkpoint-2", "sentence": "checkpoint-2 is best"}
    text = render(tmp_path, log_of(tmp_path), [{"measures": [], "checkpoints": rows, "verdict": verdict}])
    words = Page(text).words
    assert "checkpoint-2 is best" in words
    assert "0.6000" in words and words.count("checkpoint-1") == 2, "in the table and in the chart"
    assert '<tr class="best"><td>checkpoint-2</td>' in text
    (chart,) = (svg for name, svg in charts(text).items() if name == "trade-off")
    shown = {str(element.text) for element in chart.iter(f"{SVG}text")}
    assert {"text alignment", "KID x 1000"} - {left_out} <= shown and left_out not in shown


def test_an_evaluation_of_another_program_is_left_out(tmp_path: Path) -> None:
    for other in ({"measures": 3}, {"measures": [{"name": "x"}]}, {"verdict": "yes"}, {"verdict": {"sentence": 1}}):
        assert "<h2>Evaluation</h2>" not in render(tmp_path, log_of(tmp_path), [other])


def test_it_says_which_step_is_best(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    assert "lowest at step 20 so far: 0.5000." in render(tmp_path, log), "while the run goes on"
    log["facts"]["best"] = "The validation loss was lowest at step 20: 0.5000, kept in out/checkpoint-20"
    text = render(tmp_path, log)
    assert "kept in out/checkpoint-20." in text and "so far" not in text


def test_losses_that_are_not_finite_are_no_end(tmp_path: Path) -> None:
    log = log_of(tmp_path)
    log["steps"][3]["instance_loss"] = float("nan")
    Page(render(tmp_path, log))
    assert smooth([1.0, float("nan"), 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert smooth([2.0] * 50) == pytest.approx([2.0] * 50), "no bias at the start"


def test_without_matplotlib_it_says_how_to_get_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "can_draw", lambda: False)
    text = render(tmp_path, log_of(tmp_path))
    assert "pip install '.[report]'" in "".join(Page(text).words)
    assert "<svg" not in text
    assert '<tr class="best"><td>20</td>' in text, "the losses are there as a table"


def test_evenly() -> None:
    assert evenly([*range(5)], 9) == [0, 1, 2, 3, 4]
    assert evenly([*range(101)], 3) == [0, 50, 100]
    assert evenly([1, 2], 1) == [2]
    assert evenly([1], 0) == []


def test_a_run_leaves_its_report(trained: Path) -> None:
    text = (trained / "report.html").read_text()
    found = charts(text)
    assert points(found["losses"], "losses-0") == 6
    assert "python evaluate.py --model_dir" in text
    assert text.count("data:image/jpeg") == 5 + 3 * 2
    Page(text)
