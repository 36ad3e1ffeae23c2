"""Time and memory of a training step, beside diffusers' example where its path is given.

Both run on the same random model, pictures and settings, alternating, each launched as its documentation says:

    python -m benchmarks.train --shape sd14 --resolution 256 --instance_data_dir PICTURES \
        --example DIFFUSERS/examples/custom_diffusion/train_custom_diffusion.py

The example stops at its first step on today's libraries; the line that looks up the initializer is mended on the fly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.random_model import SHAPES, build_random_model
from config import HelpFormatter

ROOT = Path(__file__).resolve().parent.parent
BROKEN_LINE = "tokenizer.encode([initializer_token], add_special_tokens=False)"
MENDED_LINE = "tokenizer.convert_tokens_to_ids([initializer_token])"


@dataclass
class Measurement:
    """What one run took: seconds per step (median, without the first), start-up to the first step, peak memory."""

    seconds_per_step: float
    start_seconds: float
    run_seconds: float
    peak_gib: float
    output_mb: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what it does not know goes to both training scripts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--shape", default="sd14", choices=SHAPES, help="Size of the random model.")
    parser.add_argument("--model_dir", type=Path, help="Folder to keep the random model in between runs.")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--train_batch_size", type=int, default=1, help="Beside as many class images.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="Runs of each script, alternating.")
    parser.add_argument("--threads", type=int, help="Threads for both; if not given, what each takes by itself.")
    parser.add_argument("--instance_data_dir", type=Path, help="Pictures; random ones if not given.")
    parser.add_argument("--example", type=Path, help="The example's train_custom_diffusion.py.")
    args, args.extra = parser.parse_known_args(argv)
    return args


def prepare_pictures(folder: Path, count: int, source: Path | None = None) -> Path:
    """A folder with pictures alone (the example stops at any other file): copies of ``source``, or random ones."""
    folder.mkdir()
    if source is not None:
        for path in source.iterdir():
            if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                (folder / path.name).write_bytes(path.read_bytes())
        return folder
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(256, size=(512, 512, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    return folder


def measure(script: Path, args: argparse.Namespace, model: Path, work: Path, name: str) -> Measurement:
    """Launch one training run and read what ``measure.py`` noted.

    Raises:
        SystemExit: with the end of its output, where the run failed.
    """
    output, result = work / name, work / f"{name}.json"
    flags = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": work / "instance",
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
        "class_data_dir": work / "class",
        "class_prompt": "cat",
        "num_class_images": len(list((work / "class").iterdir())),
        "resolution": args.resolution,
        "train_batch_size": args.train_batch_size,
        "max_train_steps": args.steps,
        "output_dir": output,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "benchmarks/measure.py"), str(result)]
    command += [str(script), "--with_prior_preservation", "--hflip", *(f"--{k}={v}" for k, v in flags.items())]
    environment = os.environ | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
    run = subprocess.run(command + args.extra, env=environment, capture_output=True, text=True, errors="replace")
    if run.returncode:
        sys.exit(f"error: {name} failed:\n{run.stderr[-3000:]}")
    noted = json.loads(result.read_text())
    ends = noted["step_ends"]
    return Measurement(
        seconds_per_step=statistics.median(b - a for a, b in itertools.pairwise(ends)),
        start_seconds=ends[0],
        run_seconds=noted["seconds"],
        peak_gib=(noted["device_bytes"] or noted["resident_bytes"]) / 2**30,
        output_mb=sum(path.stat().st_size for path in output.glob("*.*")) / 1e6,
    )


def mended_example(path: Path, work: Path) -> Path:
    """A copy of the example with its initializer line mended.

    Raises:
        SystemExit: where the line is not there.
    """
    source = path.read_text()
    if BROKEN_LINE not in source:
        sys.exit(f"error: {path} does not have the line that is to be mended: {BROKEN_LINE}")
    mended = work / "example.py"
    mended.write_text(source.replace(BROKEN_LINE, MENDED_LINE))
    return mended


def print_table(measured: dict[str, list[Measurement]], args: argparse.Namespace) -> None:
    """Print the medians, and the ratios to the example."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    threads = f"{args.threads} threads each" if args.threads else "launched as documented"
    print(f"\n{args.shape}, {args.resolution} px, batch {args.train_batch_size} + prior, {threads}; {where},")
    print(f"torch {torch.__version__}, Python {platform.python_version()}; median of {args.repeats} runs\n")
    print("| | s per step | peak GiB | to the first step, s | whole run, s | output, MB |\n|---|---|---|---|---|---|")
    rows = {}
    for name, runs in measured.items():
        fields = ("seconds_per_step", "peak_gib", "start_seconds", "run_seconds", "output_mb")
        rows[name] = [statistics.median(getattr(run, field) for run in runs) for field in fields]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in rows[name]) + " |")
    if len(rows) == 2:
        ours, example = rows.values()
        print("| ours / example | " + " | ".join(f"{a / b:.2f}" for a, b in zip(ours, example, strict=True)) + " |")


def main(argv: Sequence[str] | None = None) -> None:
    """Build what is needed, run everything, print the table."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = args.model_dir or work / "model"
        if not (model / "model_index.json").exists():
            build_random_model(args.shape, model)
        prepare_pictures(work / "instance", 5, args.instance_data_dir)
        prepare_pictures(work / "class", 8)
        scripts = {"ours": ROOT / "train_custom_diffusion.py"}
        if args.example:
            scripts["example"] = mended_example(args.example, work)
        measured: dict[str, list[Measurement]] = {name: [] for name in scripts}
        for repeat in range(args.repeats):
            for name, script in scripts.items():
                measured[name].append(measure(script, args, model, work, f"{name}-{repeat}"))
                print(f"{name}, run {repeat + 1}: {measured[name][-1]}", file=sys.stderr)
    print_table(measured, args)


if __name__ == "__main__":
    main()
