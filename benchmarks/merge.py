"""Seconds that merging two concepts takes, on a random model of a real shape.

    python -m benchmarks.merge --shape sd14

``merge.py`` runs in a process of its own, as users start it: importing the libraries and reading the model count too.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benchmarks.random_model import SHAPES, ensure_random_model
from custom_diffusion.command_line import HelpFormatter
from custom_diffusion.concept.files import Concept, save_concept
from custom_diffusion.concept.formats import key_of_parameter

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("cat", "wooden pot")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument("--shape", default="sd14", choices=SHAPES, help="Size of the random model.")
    parser.add_argument("--base_model_dir", type=Path, help="Folder to keep the random model in between runs.")
    parser.add_argument("--repeats", type=int, default=3, help="Merges; the median counts.")
    parser.add_argument("--threads", type=int, help="Threads; if not given, what torch takes by itself.")
    return parser.parse_args(argv)


def write_random_concepts(model: Path, folder: Path) -> list[Path]:
    """A concept for each of :data:`CLASSES`: the model's own keys and values, moved by a tenth of their size at random.

    Args:
        model: folder of the base model.
        folder: where the concepts' folders are made.

    Returns:
        The concepts' folders.
    """
    generator = torch.Generator().manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    originals = {name: weight for name, weight in unet.named_parameters() if re.search(r"attn2\.to_[kv]\.", name)}
    folders = []
    for number, words in enumerate(CLASSES):
        attention = {}
        for name, weight in originals.items():
            noise = torch.randn(weight.shape, generator=generator) * weight.detach().std()
            attention[key_of_parameter(name)] = weight.detach() + 0.1 * noise
        token = torch.randn(unet.config.cross_attention_dim, generator=generator) * 0.02
        folders.append(folder / f"{number}-{words.replace(' ', '-')}")
        save_concept(Concept(attention, {f"<new{number + 1}>": {"text_encoder": token}}), folders[-1])
    return folders


def measure(model: Path, concepts: Sequence[Path], output: Path, threads: int | None) -> tuple[float, float]:
    """Merge once; gives the seconds of the whole command, and those that it names itself (without the imports).

    Raises:
        SystemExit: with the end of its output, where it failed.
    """
    command = [sys.executable, str(ROOT / "merge.py"), "--pretrained_model_name_or_path", str(model)]
    command += ["--model_dir", *map(str, concepts), "--class_words", *CLASSES, "--output_dir", str(output)]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    started = time.perf_counter()
    run = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - started
    named = re.search(r" in ([\d.]+) s;", run.stdout)
    if run.returncode or named is None:
        sys.exit(f"error: merge.py failed:\n{run.stderr[-3000:]}")
    return seconds, float(named[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Build what is needed, merge, print the medians."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = args.base_model_dir or work / "model"
        ensure_random_model(args.shape, model)
        concepts = write_random_concepts(model, work)
        runs = [measure(model, concepts, work / f"merged-{run}", args.threads) for run in range(args.repeats)]
    whole, own = (statistics.median(column) for column in zip(*runs, strict=True))
    count = args.threads or os.environ.get("OMP_NUM_THREADS")
    threads = f"OMP_NUM_THREADS={count}" if count else f"{os.cpu_count()} CPU cores"
    print(f"{args.shape}, two concepts, {threads}, torch {torch.__version__}, Python {platform.python_version()}:")
    print(f"merged in {own:.1f} s, {whole:.1f} s with the imports (median of {args.repeats})")


if __name__ == "__main__":
    main()
