"""Teach two concepts to the small model in `base/`, and show what was learned in one image: `make demo`.

Everything is done by the commands that a user types, each printed before it runs.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from custom_diffusion.images import write_image

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "demo" / "results"
CELL, GAP, MARGIN = 96, 4, 14

# The concepts of concept_list.json, with class images of the demo's own: what a user has made stays as it is.
RETRIEVE = """python retrieve.py --concepts_list=demo/concept_list.json --path=examples/drawings.tar.gz
  --min_size=64 --num_class_images=400"""
TRAIN = """accelerate launch -q train_custom_diffusion.py
  --pretrained_model_name_or_path=base --concepts_list=demo/concept_list.json --modifier_token="<new1>+<new2>"
  --with_prior_preservation --real_prior --prior_loss_weight=45 --num_class_images=400
  --resolution=64 --train_batch_size=4 --learning_rate=1e-3 --lr_scheduler=cosine --lr_warmup_steps=0
  --max_train_steps=1200 --padding_mode=edge --hflip --cutmix_probability=0.5
  --validation_steps=300 --checkpointing_steps=300 --num_validation_images=1 --validation_at_start
  --validation_prompt="photo of a <new1> cat" --validation_prompt="photo of a <new2> plant"
  --output_dir=demo/results/concepts --report_to=none"""
WEIGH = """python merge.py --model_dir=demo/results/concepts --prior_weight=0.5 --captions=examples/captions.txt
  --output_dir=demo/results/weighed"""
CONTEXTS = {
    "cat": ("photo of a <new1> cat", "photo of a <new1> cat on a red background", "a <new1> cat in the snow"),
    "plant": ("photo of a <new2> plant", "photo of a <new2> plant on a pink background", "a <new2> plant at night"),
}
TOGETHER = "photo of a <new1> cat next to a <new2> plant"
EACH = 4


def run(command: str) -> None:
    """Print `command` as one would type it, and run it with this Python's programs; its failure ends the demo."""
    words = shlex.split(command)
    print("\n$ " + " \\\n    ".join(line.strip() for line in command.splitlines()), flush=True)
    program = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"]}
    result = subprocess.run([*program[words[0]], *words[1:]], cwd=ROOT)
    if result.returncode != 0:
        raise SystemExit(result.returncode)


def infer(folder: str, *prompts: str, options: str = "") -> list[list[Path]]:
    """Images of `prompts`, `EACH` of every one, made by infer.py into `demo/results/<folder>`."""
    quoted = " ".join(shlex.quote(prompt) for prompt in prompts)
    # At the usual guidance of 6, so small a model draws in colours that are too strong.
    run(
        f"python infer.py --model_dir=demo/results/weighed {options}--num_images={EACH} --batch_size=12\n"
        f"--num_inference_steps=50 --guidance_scale=3 --output_dir=demo/results/{folder} --prompt {quoted}"
    )
    images = sorted((RESULTS / folder).glob("[0-9]*.png"))
    return [images[row * EACH : (row + 1) * EACH] for row in range(len(prompts))]


def index(columns: list[tuple[str, list[list[Path]]]]) -> Image.Image:
    """One image of `columns`: a heading each, over groups of images, as many to a row as a prompt has.

    All images become `CELL` high; in a column they are equally wide.
    """
    font = ImageFont.load_default(13)
    cells = []
    for _, rows in columns:
        with Image.open(rows[0][0]) as image:
            cells.append((round(CELL * image.width / image.height), CELL))
    widths = [max(map(len, rows)) * (wide + GAP) + MARGIN for (_, rows), (wide, _) in zip(columns, cells, strict=True)]
    height = max(len(rows) for _, rows in columns) * (CELL + GAP)
    sheet = Image.new("RGB", (sum(widths) + MARGIN, height + 2 * MARGIN + 20), "white")
    left = MARGIN
    for (heading, rows), cell, width in zip(columns, cells, widths, strict=True):
        ImageDraw.Draw(sheet).text((left, MARGIN), heading, "black", font)
        for i, row in enumerate(rows):
            for j, path in enumerate(row):
                with Image.open(path) as image:
                    shown = image.convert("RGB").resize(cell, Image.Resampling.BICUBIC)
                sheet.paste(shown, (left + j * (cell[0] + GAP), MARGIN + 20 + i * (CELL + GAP)))
        left += width
    return sheet


def two_by_two(concepts: list[list[Path]]) -> list[list[Path]]:
    """Rows of two of the four images of every concept."""
    return [images[at : at + 2] for images in concepts for at in (0, 2)]


def main() -> None:
    """Train, make images, and lay them out in `demo/index.png`."""
    started = time.monotonic()
    shutil.rmtree(RESULTS, ignore_errors=True)
    run(RETRIEVE)
    run(TRAIN)
    run(WEIGH)
    known = infer("known", "photo of a cat", "photo of a plant", options="--scale=0 ")
    contexts = infer("contexts", *CONTEXTS["cat"], *CONTEXTS["plant"])
    # Two things have room beside each other in an image twice as wide.
    (together,) = infer("together", TOGETHER, options="--width=128 ")
    own = [sorted((ROOT / "examples" / noun).glob("*.png"))[:4] for noun in CONTEXTS]
    columns = [("your images", two_by_two(own)), ("what the model knew", two_by_two(known))]
    for number, heading in enumerate(("the concept", "on a colour", "in a scene")):
        columns.append((heading, two_by_two([contexts[number], contexts[number + 3]])))
    columns.append(("both together", [[path] for path in together]))
    file = ROOT / "demo" / "index.png"
    write_image(file, index(columns), "PNG")
    print(f"\nIn {time.monotonic() - started:.0f} seconds. Look at {file}")
    print(f"How the training went: {RESULTS / 'concepts' / 'report.html'}")


if __name__ == "__main__":
    main()
