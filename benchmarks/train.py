"""Time, memory and arithmetic of training, beside diffusers' example where its path is given.

Both run on the same random model, images and settings, alternating, each launched as its documentation says:

    python -m benchmarks.train --shape sd14 --resolution 256 --instance_data_dir IMAGES \
        --example DIFFUSERS/examples/custom_diffusion/train_custom_diffusion.py

``--rows cpu`` or ``--rows gpu`` in place of settings runs all that the project has set itself as goals, and
``--class_images 20 200 2000`` shows what their number costs, and ``--stages`` where the time of a first run goes, which
generates its class images. ``--shape sdxl --recipes`` counts what a step takes of a
GPU's memory, without one. The example stops at its first step on today's
libraries; the line that looks up the initializer is mended on the fly.
"""

from __future__ import annotations

import argparse
import ctypes.util
import itertools
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.memory import print_recipes
from benchmarks.random_model import SHAPES, ensure_random_model
from custom_diffusion.command_line import HelpFormatter
from custom_diffusion.machine import computes_bf16

ROOT = Path(__file__).resolve().parent.parent
BROKEN_LINE = "tokenizer.encode([initializer_token], add_special_tokens=False)"
MENDED_LINE = "tokenizer.convert_tokens_to_ids([initializer_token])"


@dataclass(frozen=True)
class Goal:
    """What a row has to reach; ratios are to the example, of steps per second, peak memory and the whole run."""

    speed: float | None = None
    memory: float | None = None
    run: float | None = None
    run_seconds: float | None = None
    peak_gib: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Row:
    """Settings to measure.

    Attributes:
        both, ours: flags of both scripts, and of ours alone.
        threads: of both; None for what each takes by itself.
        preload: library that ours starts with, or with `preload_both` the example too.
        alone: whether ours runs without the example.
    """

    name: str
    resolution: int
    train_batch_size: int
    steps: int
    class_images: int = 8
    both: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    threads: int | None = None
    preload: str | None = None
    preload_both: bool = False
    alone: bool = False
    goal: Goal = field(default_factory=Goal)


@dataclass
class Measurement:
    """What one run took; the median of the steps without the first, the whole run from launch to exit."""

    seconds_per_step: float
    images_per_second: float
    peak_gib: float
    start_seconds: float
    run_seconds: float
    output_mb: float
    checkpoint_mb: float
    tflop_per_step: float | None = None
    share: float | None = None


COLUMNS = {
    "seconds_per_step": "s per step",
    "images_per_second": "images per s",
    "peak_gib": "peak GiB",
    "tflop_per_step": "TFLOP per step",
    "share": "share of matrix rate",
    "start_seconds": "to the first step, s",
    "run_seconds": "whole run, s",
    "output_mb": "output, MB",
    "checkpoint_mb": "checkpoint, MB",
}


def goal_rows(machine: str) -> list[Row]:
    """The project's goals on ``cpu`` or ``gpu``, and the recipes of docs/recipes.md for small cards."""
    if machine == "cpu":
        bf16 = ("--mixed_precision=bf16",) * computes_bf16()
        tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
        same = Row("the same threads, fp32", 256, 1, 4, threads=os.cpu_count())
        rows = [
            Row(
                "each as documented, ours in bf16 if the CPU has it", 256, 1, 4,
                ours=bf16, preload=tcmalloc, goal=Goal(4.0, 0.6),
            ),
            replace(same, preload=tcmalloc, goal=Goal(1.5, 0.7)),
        ]  # fmt: skip
        if tcmalloc is None:
            print(
                "tcmalloc, which docs/recipes.md advises on CPUs, is not installed: measured without", file=sys.stderr
            )
            return rows
        return [
            *rows,
            replace(same, name="the same, neither with tcmalloc"),
            replace(same, name="the same, both with tcmalloc", preload=tcmalloc, preload_both=True),
        ]
    bf16 = ("--mixed_precision=bf16",)
    documented = (*bf16, "--scale_lr", "--lr_warmup_steps=0", "--validation_prompt=<new1> cat sitting in a bucket")
    return [
        Row("512 px, batch 2, bf16", 512, 2, 50, both=bf16, goal=Goal(2.5, 0.7, share=0.4)),
        Row("the documented 250 steps, bf16", 512, 2, 250, 200, documented, goal=Goal(run=2.0, run_seconds=30)),
        Row(
            "recipe for 6 GB", 512, 1, 20, alone=True, goal=Goal(peak_gib=6.0),
            both=(*bf16, "--gradient_checkpointing", "--use_8bit_adam", "--sample_batch_size=1"),
        ),
        Row("recipe for 8 GB", 512, 1, 20, alone=True, both=bf16, goal=Goal(peak_gib=8.0)),
        Row("recipe for 16 GB", 512, 2, 20, alone=True, both=bf16, goal=Goal(peak_gib=16.0)),
    ]  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what it does not know goes to both training scripts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--shape", default="sd14", choices=SHAPES, help="Size of the random model.")
    parser.add_argument("--base_model_dir", type=Path, help="Folder to keep the random model in between runs.")
    parser.add_argument("--rows", choices=["cpu", "gpu"], help="Run all goals for this machine.")
    parser.add_argument("--recipes", action="store_true", help="Only count a step's memory, by recipe; see memory.py.")
    parser.add_argument("--stages", action="store_true", help="Only time the stages of a first run of ours.")
    parser.add_argument("--class_images", type=int, nargs="+", default=[8], help="Several: ours with each number.")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--train_batch_size", type=int, default=1, help="Beside as many class images.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="Runs of each script, alternating.")
    parser.add_argument("--threads", type=int, help="Threads for both; if not given, what each takes by itself.")
    parser.add_argument("--preload", metavar="LIBRARY", help="Start ours with this, such as libtcmalloc_minimal.so.4.")
    parser.add_argument("--preload_both", action="store_true", help="Start the example with it, too.")
    parser.add_argument("--ours", default="", help="Further flags of ours alone, in one argument.")
    parser.add_argument("--instance_data_dir", type=Path, help="Images; random ones if not given.")
    parser.add_argument("--example", type=Path, help="The example's train_custom_diffusion.py.")
    args, args.extra = parser.parse_known_args(argv)
    if args.preload_both and args.preload is None:
        parser.error("--preload_both needs --preload")
    return args


def prepare_images(folder: Path, count: int, source: Path | None = None) -> Path:
    """A folder with images alone (the example stops at any other file): copies of ``source``, or random ones."""
    folder.mkdir(exist_ok=True)
    if source is not None:
        for path in source.iterdir():
            if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
                (folder / path.name).write_bytes(path.read_bytes())
        return folder
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = Image.fromarray(random.integers(256, size=(16, 16, 3), dtype=np.uint8))
        coarse.resize((512, 512), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    return folder


def matrix_rate(precision: torch.dtype) -> float:
    """Operations per second of a large matrix product on this machine, all its cores or its GPU; the best of ten."""
    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, b = (torch.randn(side, side, device=device).to(precision) for _ in range(2))

    def seconds() -> float:
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds()
    return 2 * side**3 / min(seconds() for _ in range(10))


def launch(script: Path, row: Row, ours: bool, model: Path, work: Path, count: bool = False) -> tuple[dict, Path]:
    """Launch one training run; gives what ``measure.py`` noted, with ``run_seconds``, and the output folder.

    Raises:
        SystemExit: with the end of its output, where the run failed.
    """
    output, result = work / "output", work / "result.json"
    shutil.rmtree(output, ignore_errors=True)
    class_images = prepare_images(work / f"class-{row.class_images}", 0)
    if not any(class_images.iterdir()):
        prepare_images(class_images, row.class_images)
    flags = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": work / "instance",
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
        "class_data_dir": class_images,
        "class_prompt": "cat",
        "num_class_images": row.class_images,
        "resolution": row.resolution,
        "train_batch_size": row.train_batch_size,
        "max_train_steps": 2 if count else row.steps,
        "checkpointing_steps": row.steps,
        "output_dir": output,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "benchmarks/measure.py"), str(result)]
    command += ["--count"] * count + [str(script), "--with_prior_preservation", "--hflip"]
    command += [f"--{name}={value}" for name, value in flags.items()] + [*row.both, *(row.ours if ours else ())]
    environment = os.environ | ({"OMP_NUM_THREADS": str(row.threads)} if row.threads else {})
    if row.preload and (ours or row.preload_both):
        environment["LD_PRELOAD"] = row.preload
    started = time.perf_counter()
    run = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - started
    if run.returncode:
        sys.exit(f"error: {script.name} failed:\n{run.stderr[-3000:]}")
    return json.loads(result.read_text()) | {"run_seconds": seconds}, output


def measure(script: Path, row: Row, ours: bool, model: Path, work: Path) -> Measurement:
    """Launch one training run and work out what it took."""
    noted, output = launch(script, row, ours, model, work)
    seconds = statistics.median(after - before for before, after in itertools.pairwise(noted["step_ends"]))
    (checkpoint,) = output.glob("checkpoint-*")
    return Measurement(
        seconds_per_step=seconds,
        images_per_second=2 * row.train_batch_size / seconds,
        peak_gib=(noted["device_bytes"] or noted["resident_bytes"]) / 2**30,
        start_seconds=noted["step_ends"][0],
        run_seconds=noted["run_seconds"],
        output_mb=sum(path.stat().st_size for path in output.glob("*.*")) / 1e6,
        checkpoint_mb=sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e6,
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


def run_row(row: Row, scripts: dict[str, Path], model: Path, work: Path, repeats: int) -> dict[str, Measurement]:
    """The medians of alternating runs of a row, with the arithmetic of a step; prints their table."""
    runs: dict[str, list[Measurement]] = {name: [] for name in scripts if name == "ours" or not row.alone}
    for repeat in range(repeats):
        for name, found in runs.items():
            found.append(measure(scripts[name], row, name == "ours", model, work))
            print(f"{row.name}, {name}, run {repeat + 1}: {found[-1]}", file=sys.stderr)
    medians = {}
    for name, found in runs.items():
        flags = row.both + (row.ours if name == "ours" else ())
        precision = torch.bfloat16 if "--mixed_precision=bf16" in flags else torch.float32
        flops = launch(scripts[name], row, name == "ours", model, work, count=True)[0]["flops"]
        values = {
            column: statistics.median(getattr(run, column) for run in found)
            for column in COLUMNS
            if getattr(found[0], column) is not None
        }
        share = flops / values["seconds_per_step"] / matrix_rate(precision)
        medians[name] = Measurement(**values, tflop_per_step=flops / 1e12, share=share)
    print_table(row, medians, repeats)
    return medians


def print_table(row: Row, medians: dict[str, Measurement], repeats: int) -> None:
    """Print what a row took, and the ratios to the example."""
    threads = f"{row.threads} threads each" if row.threads else "launched as documented"
    flags = " ".join(row.both) + (f"; ours {' '.join(row.ours)}" if row.ours else "")
    if row.preload:
        flags += f"; {'both' if row.preload_both else 'ours'} with {row.preload}"
    print(f"\n{row.name}: {row.resolution} px, batch {row.train_batch_size} + prior, {row.steps} steps, ", end="")
    print(f"{row.class_images} class images, {threads} {flags}; median of {repeats}\n")
    print(f"| | {' | '.join(COLUMNS.values())} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, measured in medians.items():
        print(f"| {name} | {' | '.join(f'{getattr(measured, column):.3g}' for column in COLUMNS)} |")
    if len(medians) == 2:
        ours, example = medians.values()
        ratios = [getattr(ours, column) / getattr(example, column) for column in COLUMNS]
        print(f"| ours / example | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")


def judge(row: Row, medians: dict[str, Measurement]) -> list[tuple[str, str, bool]]:
    """Goal, what was reached, and whether that is enough; goals beside the example only where it ran."""
    ours, example, goal = medians["ours"], medians.get("example"), row.goal
    verdicts = []

    def compare(what: str, wanted: float | None, reached: float, at_least: bool) -> None:
        if wanted is not None:
            good = reached >= wanted if at_least else reached <= wanted
            verdicts.append((f"{what} {'at least' if at_least else 'at most'} {wanted:g}", f"{reached:.3g}", good))

    if example is not None:
        compare("steps per second, x", goal.speed, example.seconds_per_step / ours.seconds_per_step, True)
        compare("peak memory, x", goal.memory, ours.peak_gib / example.peak_gib, False)
        compare("whole run faster, x", goal.run, example.run_seconds / ours.run_seconds, True)
    compare("whole run, s", goal.run_seconds, ours.run_seconds, False)
    compare("peak GiB", goal.peak_gib, ours.peak_gib, False)
    compare("share of matrix rate", goal.share, ours.share, True)
    return verdicts


def show_class_images(counts: Sequence[int], row: Row, scripts: dict[str, Path], model: Path, work: Path) -> None:
    """What the number of class images and the number of steps cost ours."""
    print("\n| class images | steps | s per step | to the first step, s | whole run, s |\n|---|---|---|---|---|")
    for count, steps in [*((count, row.steps) for count in counts), (counts[-1], 2 * row.steps)]:
        found = measure(scripts["ours"], replace(row, class_images=count, steps=steps), True, model, work)
        times = (found.seconds_per_step, found.start_seconds, found.run_seconds)
        print(f"| {count} | {steps} | {' | '.join(f'{value:.3g}' for value in times)} |", flush=True)


def show_stages(row: Row, model: Path, work: Path) -> None:
    """Where the time of a first run of ours goes: it generates all of its class images, and validates at the end."""
    result = work / "stages.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "benchmarks/stages.py"), str(result)]
    command += [
        f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={work / 'instance'}",
        "--instance_prompt=photo of a <new1> cat", "--modifier_token=<new1>", "--validation_prompt=<new1> cat",
        "--with_prior_preservation", f"--class_data_dir={work / 'generated'}", "--class_prompt=cat",
        f"--num_class_images={row.class_images}", f"--resolution={row.resolution}", "--hflip", "--report_to=none",
        f"--train_batch_size={row.train_batch_size}", f"--max_train_steps={row.steps}",
        f"--output_dir={work / 'output'}", *row.both, *row.ours,
    ]  # fmt: skip
    started = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    whole = time.perf_counter() - started
    if run.returncode:
        sys.exit(f"error: the training failed:\n{run.stderr[-3000:]}")
    seconds = json.loads(result.read_text())
    seconds["launch and libraries"] = whole - sum(seconds.values())
    print(
        f"\n{row.resolution} px, {row.class_images} class images, {row.steps} steps of {row.train_batch_size} + prior"
    )
    print(f"{' '.join((*row.both, *row.ours))}\n\n| stage | s | share |\n|---|---|---|")
    for stage, taken in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"| {stage} | {taken:.1f} | {taken / whole:.0%} |")
    print(f"| the whole run | {whole:.1f} | |")


def main(argv: Sequence[str] | None = None) -> None:
    """Build what is needed, run everything, print the tables."""
    args = parse_args(argv)
    if args.recipes:
        print_recipes(args.shape, SHAPES[args.shape])
        return
    if args.rows == "gpu" and not torch.cuda.is_available():
        sys.exit("error: --rows gpu needs a CUDA GPU, and there is none")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"{args.shape} on {where}, torch {torch.__version__}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = args.base_model_dir or work / "model"
        ensure_random_model(args.shape, model)
        prepare_images(work / "instance", 5, args.instance_data_dir)
        scripts = {"ours": ROOT / "train_custom_diffusion.py"}
        if args.example:
            scripts["example"] = mended_example(args.example, work)
        row = Row(
            "settings of the command line",
            args.resolution,
            args.train_batch_size,
            args.steps,
            args.class_images[0],
            tuple(args.extra),
            tuple(shlex.split(args.ours)),
            args.threads,
            args.preload,
            args.preload_both,
        )
        if args.stages:
            show_stages(row, model, work)
            return
        if len(args.class_images) > 1:
            show_class_images(args.class_images, row, scripts, model, work)
            return
        rows = goal_rows(args.rows) if args.rows else [row]
        medians = {row.name: run_row(row, scripts, model, work, args.repeats) for row in rows}
        if args.rows:
            print("\n| row | goal | reached | |\n|---|---|---|---|")
            for row in rows:
                for goal, reached, good in judge(row, medians[row.name]):
                    print(f"| {row.name} | {goal} | {reached} | {'yes' if good else 'no'} |")


if __name__ == "__main__":
    main()
