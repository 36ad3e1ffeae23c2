"""Make images of a learned concept: ``python infer.py --prompt "<new1> cat"``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from custom_diffusion.command_line import (
    DEFAULT_MODEL,
    DTYPES,
    HelpFormatter,
    add_base_model_flags,
    add_sampling_flags,
    end_quietly_on_interrupt,
    finite_number,
    given_base_model,
    import_diffusers,
    parse_with_config,
    positive_int,
    run,
    save_config,
)
from custom_diffusion.files import read_text_again

# Flags that decide what an image looks like; they stand in its metadata.
SETTINGS = ("model_dir", "negative_prompt", "num_inference_steps", "guidance_scale", "eta", "scheduler", "scale")


# fmt: off
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; prompts of ``--prompts_file`` join those of ``--prompt``."""
    parser = argparse.ArgumentParser(
        description="Make images of a concept that train_custom_diffusion.py has learned.",
        usage="%(prog)s --prompt '<new1> cat in a bucket' [--prompt ...] [more options: --help]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompt", action="extend", nargs="+", default=[], help="One or several prompts with a learned token.")
    add("--prompts_file", help="Text file with one prompt per line, after those of --prompt.")
    add("--model_dir", nargs="+", default=[DEFAULT_MODEL],
        help="Output folder of a training run, one of its checkpoints, the authors' delta.bin, or a Hub id "
        "(owner/name or owner/name@revision); several are applied together.")
    add_base_model_flags(parser, "the one that the concept's card names")
    add("--num_images", type=positive_int, default=1, help="Images per prompt.")
    add("--batch_size", type=positive_int, default=1, help="Images made at once; more is faster and takes more memory.")
    add_sampling_flags(add)
    add("--height", type=int, help="Height in pixels; if not given, the base model's.")
    add("--width", type=int, help="Width in pixels; if not given, the base model's.")
    add("--negative_prompt", help="What should not be in the images.")
    add("--no_safety_checker", action="store_true",
        help="Leave out the base model's safety checker, if it has one, and XL's watermark; read its licence first.")
    add("--dtype", choices=DTYPES,
        help="Precision; if not given, fp16 on a GPU, bf16 on a CPU that computes it (but for tiny models), or else "
        "fp32.")
    add("--scale", type=finite_number, nargs="+", default=[1.0],
        help="Strength of the learned weights: 0 is the base model's attention. One, or one for each --model_dir.")
    add("--output_dir", default="samples",
        help="Where the images are written. Existing images are not replaced; contact_sheet.png is.")
    args = parse_with_config(parser, argv)

    if args.prompts_file is not None:
        try:
            lines = read_text_again(args.prompts_file).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--prompts_file {args.prompts_file!r} cannot be read: {getattr(error, 'strerror', error)}")
        args.prompt += [line.strip() for line in lines if line.strip()]
        args.prompts_file = None  # they are prompts now: the saved configuration should not have them twice
    if not args.prompt:
        parser.error("give a prompt, such as --prompt '<new1> cat'")
    if len(args.scale) not in (1, len(args.model_dir)):
        parser.error(f"--scale has {len(args.scale)} values, --model_dir {len(args.model_dir)}: give one, or as many")
    args.scale = args.scale[0] if len(args.scale) == 1 else args.scale
    for name in ("height", "width"):
        if getattr(args, name) is not None and (getattr(args, name) < 8 or getattr(args, name) % 8):
            parser.error(f"--{name} {getattr(args, name)} is not a multiple of 8, which the VAE needs")
    return args


# fmt: on


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag end here, before the libraries below are loaded
    end_quietly_on_interrupt()
    import_diffusers()

import functools
import re
import sys

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.files import Concept, find_base_model, load_concept
from custom_diffusion.files import output_folder
from custom_diffusion.images import contact_sheet, write_generated, write_image
from custom_diffusion.models.drawing import (
    PRECISIONS,
    best_device,
    encode_prompts,
    fast_precision,
    load_to_draw,
    put_on,
)
from custom_diffusion.models.families import family_of, text_models_of
from custom_diffusion.models.vocabulary import cut_off, names_word
from custom_diffusion.text import slug


def load_pipeline(args: argparse.Namespace, concepts: Sequence[Concept]) -> DiffusionPipeline:
    """The base model with the concepts applied, on its device.

    Raises:
        UserError: where no base model is known or it cannot be loaded, or a concept does not fit it.
    """
    base_model = find_base_model(concepts=concepts, **given_base_model(args))
    device = args.device or best_device()
    dtype = args.dtype or fast_precision(base_model, device)
    if args.dtype is None and dtype == "bf16":
        print("In bf16, which is faster on this CPU; --dtype fp32 draws in full precision")
    pipeline = load_to_draw(base_model, args.scheduler, dtype, device, not args.no_safety_checker)
    apply_concepts(pipeline, *concepts, scale=args.scale)
    return put_on(pipeline, device)


def warn_of_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], negative_prompt: str | None, tokens: Sequence[str]
) -> None:
    """Say which prompts do not name a concept, and which are too long: the commonest reasons for images without it.

    Args:
        tokens: the concepts' tokens, which are in the pipeline's tokenizers.
    """
    tokenizers, _ = text_models_of(family_of(pipeline.components, "the base model"), pipeline)
    tokenizer = next(iter(tokenizers.values()))  # all of a family's read the same words, and as many
    for prompt in prompts:
        named = [token for token in tokens if names_word(prompt, token, tokenizer)]
        lost = [token for token in named if not names_word(prompt, token, tokenizer, cut=True)]
        if tokens and not named:
            _warn(f"{prompt!r} has none of the learned tokens ({', '.join(tokens)})")
        if lost:
            _warn(
                f"{prompt!r} names {', '.join(lost)} after the {tokenizer.model_max_length} tokens that the text "
                "encoder reads, so the image will not show it: shorten the prompt"
            )
        elif rest := cut_off(prompt, tokenizer):
            _warn(f"{prompt!r} is too long for the text encoder, which does not read its end: {rest!r}")
    if rest := cut_off(negative_prompt or "", tokenizer):
        _warn(f"--negative_prompt is too long for the text encoder, which does not read its end: {rest!r}")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def image_size(pipeline: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """Height and width in pixels; where one alone is given, the other is the base model's.

    diffusers takes its own for both then, and says nothing.
    """
    if (height is None) == (width is None):
        return height, width
    size = pipeline.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return height or rows * pipeline.vae_scale_factor, width or columns * pipeline.vae_scale_factor


def generate(pipeline: DiffusionPipeline, args: argparse.Namespace) -> list[list[Path]]:
    """Make and write all images, each prompt's text encoded once; gives the paths, one list per prompt."""
    folder = Path(args.output_dir)
    jobs = [(row, number) for row in range(len(args.prompt)) for number in range(args.num_images)]
    first = _first_free_number(folder)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["dtype"] = next(name for name, dtype in PRECISIONS.items() if dtype == pipeline.unet.dtype)
    paths: list[list[Path]] = [[] for _ in args.prompt]
    height, width = image_size(pipeline, args.height, args.width)
    # The jobs are in the order of the prompts, so those of a batch are all that need to be kept.
    encode = functools.lru_cache(args.batch_size)(
        lambda row: encode_prompts(pipeline, [args.prompt[row]], args.negative_prompt, args.guidance_scale > 1)
    )
    pipeline.set_progress_bar_config(leave=False, desc="denoising")
    with tqdm(total=len(jobs), unit="image") as progress:
        for start in range(0, len(jobs), args.batch_size):
            batch = jobs[start : start + args.batch_size]
            texts = [encode(row) for row, _ in batch]
            output = pipeline(
                **{name: torch.cat([text[name] for text in texts]) for name in texts[0]},
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                eta=args.eta,
                height=height,
                width=width,
                # A generator of its own for every image, on the CPU: the same image in any batch, on any device.
                generator=[torch.Generator().manual_seed(args.seed + number) for _, number in batch],
            )
            flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(batch)
            for offset, ((row, number), image) in enumerate(zip(batch, output.images, strict=True)):
                ending = f"{slug(args.prompt[row], otherwise='picture')}_seed{args.seed + number}.png"
                path = _free_path(folder, first + start + offset, ending)
                write_generated(path, image, args.prompt[row], args.seed + number, settings)
                paths[row].append(path)
                if flagged[offset]:
                    tqdm.write(
                        f"warning: {path} is black: the base model's safety checker considers it unsafe, "
                        "perhaps wrongly; try another --seed, or --no_safety_checker where the model's licence allows",
                        file=sys.stderr,
                    )
            progress.update(len(batch))
    return paths


def _first_free_number(folder: Path) -> int:
    numbers = [int(match[1]) for path in folder.glob("*.png") if (match := re.match(r"(\d{5,})_", path.name))]
    return max(numbers, default=-1) + 1


def _free_path(folder: Path, number: int, ending: str) -> Path:
    """The path of an image; with a later number where another run has written one of this name meanwhile."""
    while (path := folder / f"{number:05d}_{ending}").exists():
        number += 1
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Load, apply, generate, and say where the images are."""
    args = parse_args(argv)
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()  # of long prompts and black images we warn in a line each
    concepts = [load_concept(source) for source in args.model_dir]
    folder = output_folder(args.output_dir)
    pipeline = load_pipeline(args, concepts)
    warn_of_prompts(pipeline, args.prompt, args.negative_prompt, [token for one in concepts for token in one.tokens])
    # Numbered like the first image: a folder may hold the images of several runs.
    save_config(args, folder / f"{_first_free_number(folder):05d}_config.yaml")
    paths = generate(pipeline, args)
    write_image(folder / "contact_sheet.png", contact_sheet(paths, args.prompt), "PNG")
    print(f"{sum(map(len, paths))} images in {args.output_dir}, all at a glance: {folder / 'contact_sheet.png'}")


if __name__ == "__main__":
    run(main, needs_memory="give a smaller --batch_size, --height or --width")
