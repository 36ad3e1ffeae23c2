"""Time of infer.py beside a plain loop over diffusers' pipeline, as the documentation of diffusers has it.

    python -m benchmarks.infer --model base --height 64
    python -m benchmarks.infer --shape sd14 --height 256 --steps 10

Both draw the same images of the same concept with the same sampler, alternating, each in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.merge import write_random_concepts
from benchmarks.random_model import SHAPES, ensure_random_model
from custom_diffusion.command_line import HelpFormatter

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("photo of a <new1> cat", "a <new1> cat on a hill")
SEED = 42
LOOP = """
import sys
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

base_model, concept, _, side, steps, count, seed, *prompts = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(base_model, safety_checker=None)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
pipeline.unet.load_attn_procs(concept, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipeline)
pipeline.load_textual_inversion(concept, weight_name="<new1>.safetensors")
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
for row, prompt in enumerate(prompts):
    for number in range(int(count)):
        generator = torch.Generator().manual_seed(int(seed) + number)
        options = {"num_inference_steps": int(steps), "guidance_scale": 6.0, "eta": 1.0, "generator": generator}
        (image,) = pipeline(prompt, height=int(side), width=int(side), **options).images
        image.save(f"{sys.argv[3]}/{row}{number}.png")
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--shape", default="sd14", choices=SHAPES, help="Size of a random model.")
    parser.add_argument("--model", type=Path, help="Folder of a model; where there is none, the random one goes there.")
    parser.add_argument("--height", type=int, default=256, help="Height and width of the images in pixels.")
    parser.add_argument("--steps", type=int, default=50, help="Denoising steps.")
    parser.add_argument("--count", type=int, default=4, help="Images of each of the two prompts; at least 2.")
    parser.add_argument("--repeats", type=int, default=2, help="Runs of each, alternating; the median counts.")
    return parser.parse_args(argv)


def commands(args: argparse.Namespace, model: Path, concept: Path) -> dict[str, list[str]]:
    """Each way of drawing by its name: a command that lacks the folder of its images."""
    ours = [sys.executable, str(ROOT / "infer.py"), "--model_dir", str(concept), "--prompt", *PROMPTS]
    ours += [f"--pretrained_model_name_or_path={model}", f"--num_images={args.count}", f"--seed={SEED}"]
    ours += [f"--height={args.height}", f"--width={args.height}", f"--num_inference_steps={args.steps}"]
    numbers = map(str, (args.height, args.steps, args.count, SEED))
    return {
        "diffusers' loop": [sys.executable, "-c", LOOP, str(model), str(concept), "{folder}", *numbers, *PROMPTS],
        "infer.py --dtype fp32": [*ours, "--dtype=fp32", "--output_dir={folder}"],
        "infer.py": [*ours, "--output_dir={folder}"],
    }


def measure(command: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """Run once; gives the seconds from launch to exit, of processor time, and between the first image and the last.

    Raises:
        SystemExit: with the end of its output, where it failed.
    """
    folder.mkdir()
    words = [word.replace("{folder}", str(folder)) for word in command]
    started, before = time.perf_counter(), os.times()
    run = subprocess.run(words, capture_output=True, text=True, errors="replace")
    seconds, after = time.perf_counter() - started, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    if run.returncode:
        sys.exit(f"error: {' '.join(words[:2])} failed:\n{run.stderr[-3000:]}")
    written = sorted(path.stat().st_mtime for path in folder.glob("[0-9]*.png"))
    return seconds, processor, written[-1] - written[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Build what is needed, draw, print the table."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = args.model or work / "model"
        ensure_random_model(args.shape, model)
        ways = commands(args, model, write_random_concepts(model, work)[0])
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for repeat in range(args.repeats):
            for name, command in ways.items():
                times[name].append(measure(command, work / f"{len(times[name])}-{name.replace(' ', '')}"))
                print(f"{name}, run {repeat + 1}: {times[name][-1]}", file=sys.stderr)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(
        f"{args.model or args.shape}, {args.height} px, {args.steps} steps, {args.count} images of each of two prompts"
    )
    print(f"on {where}, torch {torch.__version__}, Python {platform.python_version()}; median of {args.repeats}\n")
    print("| | whole command, s | its processor time, s | first to last image, s |\n|---|---|---|---|")
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in times.items()
    }
    for name, (whole, processor, drawing) in medians.items():
        print(f"| {name} | {whole:.1f} | {processor:.1f} | {drawing:.1f} |")


if __name__ == "__main__":
    main()
