"""Teach two concepts to the small model in `base/`, and show what was learned in one image: `make demo`.

Everything is done by the commands that a user types, each printed before it runs. The concepts are taught apart, each
by a training of its own without class images, and then used together.
"""

import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from custom_diffusion.images import write_image

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "demo" / "results"
# Pixels of the layout: the side of an image, the space beside it, and the lines of the headings.
CELL, GAP, MARGIN, LINE = 144, 4, 14, 16
FONT = ImageFont.load_default(13)

Rows = Sequence[Sequence[Path]]
TOKENS = {"cat": "<new1>", "plant": "<new2>"}
TRAIN = """accelerate launch -q train_custom_diffusion.py --pretrained_model_name_or_path=base --token_gate
  --instance_data_dir=examples/{noun} --instance_prompt="photo of a {token} {noun}"
  --modifier_token="{token}" --class_prompt={noun} --validation_data_dir=examples/validation/{noun}
  --resolution=64 --train_batch_size=4 --learning_rate=5e-4 --lr_scheduler=cosine --lr_warmup_steps=0
  --max_train_steps=500 --padding_mode=edge --hflip
  --validation_prompt="photo of a {token} {noun}" --validation_steps=125 --validation_at_start
  --num_validation_images=1 --output_dir=demo/results/{noun} --report_to=none"""
# One step at a rate of zero: the new words as every training starts them.
UNTRAINED = """accelerate launch -q train_custom_diffusion.py --pretrained_model_name_or_path=base --token_gate
  --concepts_list=concept_list.json --modifier_token="<new1>+<new2>" --initializer_token="ktn+ktn"
  --resolution=64 --train_batch_size=1 --learning_rate=0 --max_train_steps=1
  --output_dir=demo/results/untrained --report_to=none"""
# At the usual guidance of 6, so small a model draws in colours that are too strong.
INFER = """python infer.py --model_dir {folders} --prompt {prompts} --num_images=2 --batch_size=10
  --num_inference_steps=50 --guidance_scale=3 {options}--output_dir=demo/results/{output}"""
CONTEXTS = {
    "cat": (
        "photo of a <new1> cat",
        "a <new1> cat on a red background",
        "a <new1> cat in the snow",
        "a <new1> cat at night",
    ),
    "plant": (
        "photo of a <new2> plant",
        "a <new2> plant on a pink background",
        "a <new2> plant on the beach",
        "a <new2> plant at night",
    ),
}
TOGETHER = ("photo of a <new1> cat next to a <new2> plant", "photo of a <new2> plant next to a <new1> cat")


def run(command: str) -> None:
    """Print `command` as one would type it, and run it with this Python's programs; its failure ends the demo."""
    words = shlex.split(command)
    print("\n$ " + " \\\n    ".join(line.strip() for line in command.splitlines()), flush=True)
    program = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"]}
    result = subprocess.run([*program[words[0]], *words[1:]], cwd=ROOT)
    if result.returncode != 0:
        raise SystemExit(result.returncode)


def infer(output: str, nouns: Sequence[str], prompts: Sequence[str], options: str = "") -> list[list[Path]]:
    """Two images of each of `prompts`, made by infer.py with the concepts of `nouns` into `demo/results/<output>`."""
    folders = " ".join(f"demo/results/{noun}" for noun in nouns)
    quoted = "\n  ".join(shlex.quote(prompt) for prompt in prompts)
    run(INFER.format(folders=folders, prompts=quoted, options=options, output=output))
    images = sorted((RESULTS / output).glob("[0-9]*.png"))
    return [images[row * 2 : row * 2 + 2] for row in range(len(prompts))]


def place(sheet: Image.Image, heading: str, rows: Rows, left: int, top: int, high: int = CELL) -> None:
    """Draw `rows` of images, each `high` pixels, below a `heading` of at most two lines."""
    with Image.open(rows[0][0]) as image:
        cell = (round(high * image.width / image.height), high)
    lines = textwrap.wrap(heading, len(rows[0]) * cell[0] * 2 // 13)
    ImageDraw.Draw(sheet).text((left, top + (2 - len(lines)) * LINE), "\n".join(lines), "black", FONT)
    for i, row in enumerate(rows):
        for j, path in enumerate(row):
            with Image.open(path) as image:
                shown = image.convert("RGB").resize(cell, Image.Resampling.BICUBIC)
            sheet.paste(shown, (left + j * (cell[0] + GAP), top + 2 * LINE + 4 + i * (high + GAP)))


def index(bands: list[list[tuple[str, Rows]]], together: list[tuple[str, list[Path]]]) -> Image.Image:
    """One image: for each concept a band of columns with their headings, and below them both concepts `together`."""
    deep = 2 * LINE + 4 + 2 * (CELL + GAP) + MARGIN
    wide = 7 * (CELL + GAP) - GAP + 4 * MARGIN
    half = (wide - 3 * MARGIN) // 2
    high = (half - GAP) // 4
    sheet = Image.new("RGB", (wide, MARGIN + len(bands) * deep + 2 * LINE + 4 + high + MARGIN), "white")
    for number, groups in enumerate(bands):
        left = MARGIN
        for position, (heading, rows) in enumerate(groups):
            place(sheet, heading, rows, left, MARGIN + number * deep)
            # What was there before the training stands a little apart from what came of it.
            left += len(rows[0]) * (CELL + GAP) + (MARGIN if position < 2 else 0)
    for number, (heading, images) in enumerate(together):
        place(sheet, heading, [images], MARGIN + number * (half + MARGIN), MARGIN + len(bands) * deep, high)
    return sheet


def main() -> None:
    """Train, make images, and lay them out in `demo/index.png`."""
    started = time.monotonic()
    shutil.rmtree(RESULTS, ignore_errors=True)
    run(UNTRAINED)
    first = [f"photo of a {token} {noun}" for noun, token in TOKENS.items()]
    untrained = dict(zip(TOKENS, infer("untrained-images", ["untrained"], first), strict=True))
    bands = []
    for noun, token in TOKENS.items():
        run(TRAIN.format(noun=noun, token=token))
        own = sorted((ROOT / "examples" / noun).glob("*.png"))[:4]
        # A gated concept leaves a prompt without its word exactly as it was.
        known, *contexts = infer(f"{noun}-images", [noun], (f"photo of a {noun}", *CONTEXTS[noun]))
        columns: list[tuple[str, Rows]] = [
            (f"your images of {token}", [own[:2], own[2:]]),
            (f"before training: {noun}, {token} {noun}", [known[:1], untrained[noun][:1]]),
        ]
        for prompt, images in zip(CONTEXTS[noun], contexts, strict=True):
            columns.append((prompt, [[path] for path in images]))
        bands.append(columns)
    # Two things have room beside each other in an image twice as wide.
    together = zip(TOGETHER, infer("together", list(TOKENS), TOGETHER, "--width=128 "), strict=True)
    file = ROOT / "demo" / "index.png"
    write_image(file, index(bands, list(together)), "PNG")
    print(f"\nIn {time.monotonic() - started:.0f} seconds. Look at {file}")
    for noun in TOKENS:
        print(f"How the training of the {noun} went: {RESULTS / noun / 'report.html'}")


if __name__ == "__main__":
    main()
