"""Time that an image of a gated concept takes, beside one of a concept that acts everywhere.

    python -m benchmarks.gate --base_model_dir base --width 64 --height 64
    python -m benchmarks.gate --shape sd14

Both concepts are the same random change of keys and values. They are applied in turns to one pipeline, with one prompt.
On a CPU the processor time of this process counts, which other programs disturb less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from benchmarks.random_model import SHAPES, ensure_random_model
from custom_diffusion import apply_concepts
from custom_diffusion.command_line import HelpFormatter
from custom_diffusion.concept.files import Concept
from custom_diffusion.concept.formats import key_of_parameter
from custom_diffusion.concept.gating import GatedWeights, GatedWords
from custom_diffusion.models.families import family_of, text_models_of
from custom_diffusion.models.vocabulary import embedding_table

PROMPT = "photo of a <new1> cat in a bucket"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--shape", default="sd14", choices=SHAPES, help="Size of the random model.")
    add("--base_model_dir", type=Path, help="A model's folder; a random model is made in it if it is not there.")
    add("--height", type=int, default=512, help="In pixels.")
    add("--width", type=int, default=512, help="In pixels.")
    add("--steps", type=int, default=10, help="Denoising steps of an image.")
    add("--repeats", type=int, default=5, help="Images of each concept, in turns; the medians count.")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where images are made.")
    return parser.parse_args(argv)


def random_concepts(pipeline: DiffusionPipeline) -> dict[str, Concept]:
    """The same change of keys and values, a tenth of their size at random, everywhere and at the new word alone."""
    generator = torch.Generator().manual_seed(0)
    originals = {
        key_of_parameter(name): weight.detach().float().cpu()
        for name, weight in pipeline.unet.named_parameters()
        if re.search(r"attn2\.to_[kv]\.", name)
    }
    changes = {
        key: 0.1 * torch.randn(weight.shape, generator=generator) * weight.std() for key, weight in originals.items()
    }
    _, text_encoders = text_models_of(family_of(pipeline.components, "this model"), pipeline)
    vectors: dict[str, Tensor] = {}
    for name, text_encoder in text_encoders.items():
        table = embedding_table(text_encoder)
        vectors[name] = 0.02 * torch.randn(table.shape[1], generator=generator)
    tokens = {"<new1>": vectors}
    gate = GatedWeights(GatedWords(("<new1>",), ("cat",)), changes)
    return {
        "everywhere": Concept({key: original + changes[key] for key, original in originals.items()}, tokens),
        "gated": Concept({}, tokens, gates=(gate,)),
    }


def seconds_of(pipeline: DiffusionPipeline, concept: Concept, args: argparse.Namespace) -> float:
    """Seconds of an image, from the prompt to the pixels."""
    applied = apply_concepts(pipeline, concept)
    is_on_cpu = torch.device(args.device).type == "cpu"
    clock = time.process_time if is_on_cpu else time.perf_counter
    started = clock()
    pipeline(PROMPT, num_inference_steps=args.steps, height=args.height, width=args.width)
    seconds = clock() - started  # the image is on the CPU by then, so nothing is under way
    applied.remove()
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Make images in turns, and print the medians and their ratio."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        model = args.base_model_dir or Path(temporary)
        ensure_random_model(args.shape, model)
        pipeline = DiffusionPipeline.from_pretrained(model, safety_checker=None).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    concepts = random_concepts(pipeline)
    seconds: dict[str, list[float]] = {name: [] for name in concepts}
    for turn in range(args.repeats + 1):
        for name, concept in concepts.items():
            taken = seconds_of(pipeline, concept, args)
            if turn:  # the first of each warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s (fastest {min(seconds[name]):.3f}, slowest {max(seconds[name]):.3f})")
    print(f"gated / everywhere: {medians['gated'] / medians['everywhere']:.3f} (median of {args.repeats})")


if __name__ == "__main__":
    main()
