"""Measure how good a learned concept is: ``python evaluate.py --instance_data_dir data/cat``."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence

from custom_diffusion.command_line import (
    DEFAULT_MODEL,
    DTYPES,
    HelpFormatter,
    add_base_model_flags,
    add_sampling_flags,
    end_quietly_on_interrupt,
    import_diffusers,
    number_from_zero,
    parse_with_config,
    positive_int,
    run,
    save_config,
    whole_number,
)

# The names alone: what they stand for takes seconds to import.
PROMPTS = ("objects", "living")
PLOT_NAME, FLAGS_NAME = "trade_off.svg", "evaluation.yaml"
DINO = "facebook/dino-vits16"


# fmt: off
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and check what can be checked before anything is read."""
    parser = argparse.ArgumentParser(
        description="Measure a learned concept as the paper does: text alignment, image alignment and KID, each beside "
        "a control.",
        usage="%(prog)s [--model_dir CONCEPT | --images_dir IMAGES] --instance_data_dir data/cat "
              "[more options: --help]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--model_dir", default=DEFAULT_MODEL,
        help="Output folder of a training run, one of its checkpoints, the authors' delta.bin, or a Hub id.")
    add("--images_dir",
        help="Evaluate these images rather than make some: a folder of infer.py's, CustomConcept101's samples/ and "
        "prompts.json, or DreamBench++'s layout.")
    add("--checkpoints", action="store_true",
        help="Evaluate every checkpoint of the run in --model_dir, and name the best.")
    add("--margin", type=number_from_zero, default=0.05,
        help="With --checkpoints, how far the best's text alignment may be below the highest, as a fraction of it.")
    add("--instance_data_dir", nargs="+", default=[],
        help="Folders of real images of the concept, one for each where there are several.")
    add("--modifier_token", help="Tokens to leave out of scored prompts, joined with '+'; if not given, those of the "
        "concept, or with --images_dir all words in angle brackets.")
    add("--class_prompt", help="Class of each concept, joined with '+'; if not given, as the concept's card says.")
    add("--class_data_dir", nargs="+", default=[],
        help="Folders of real class images, one for each class: measures KID too.")
    add_base_model_flags(parser, "the one that the concept's card names")

    add = parser.add_argument_group("prompts and sampling").add_argument
    add("--prompts", default="objects", choices=PROMPTS, help="Which of the 20 prompts that come with the project.")
    add("--prompts_file", help="Prompts in place of these: a text file with one per line and {} for the concept, or "
        "CustomConcept101's dataset.json or dataset_multiconcept.json.")
    add("--num_images", type=positive_int, help="Images per prompt; if not given, 5, and 1 with --checkpoints.")
    add("--num_class_images", type=positive_int, default=200, help="Images of each plain class prompt, for KID.")
    add("--batch_size", type=positive_int, default=4, help="Images made at once.")
    add_sampling_flags(add)
    add("--dtype", choices=DTYPES, help="Precision of sampling; if not given, fp16 on a GPU and fp32 on a CPU.")

    add = parser.add_argument_group("measures").add_argument
    add("--clip", default="openai/clip-vit-base-patch32",
        help="CLIP for text and image alignment, a folder or Hub id; 'none' to do without.")
    add("--dino", nargs="?", const=DINO, metavar="DINO",
        help=f"Image alignment by DINO too; {DINO}, or another such as facebook/dinov2-small.")
    add("--encoder", help="Image alignment by yet another image encoder of transformers, folder or Hub id.")
    add("--no_controls", action="store_true",
        help="Leave out the controls: the same prompts with the untrained word, and KID of the base model.")
    add("--initializer_token", default="ktn+pll+ucd", help="What the untrained words are, as in training.")
    add("--kid_subset_size", type=whole_number(2), default=50, help="Images in each of KID's subsets.")
    add("--kid_subsets", type=positive_int, default=100, help="How many subsets.")
    add("--output_dir", help="Where everything is written; if not given, evaluation in --model_dir, or evaluation. "
        "Images that are there already are not made again.")
    args = parse_with_config(parser, argv)

    if not args.instance_data_dir and args.images_dir is None:
        parser.error("give the real images of the concept: --instance_data_dir data/cat")
    if args.class_data_dir and importlib.util.find_spec("torch_fidelity") is None:
        parser.error("KID needs the package torch-fidelity: pip install '.[evaluation]'")
    if args.class_data_dir and args.images_dir is not None:
        parser.error("KID makes images of the class with the concept in --model_dir: leave out --images_dir")
    if args.checkpoints and args.images_dir is not None:
        parser.error("--checkpoints makes images with each of them: leave out --images_dir")
    args.num_images = args.num_images or (1 if args.checkpoints else 5)
    return args


# fmt: on


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag end here, before the libraries below are loaded
    end_quietly_on_interrupt()
    import_diffusers()

from pathlib import Path

import diffusers
import transformers

from custom_diffusion.evaluation.evaluating import (
    default_output_dir,
    evaluate_checkpoints,
    evaluate_concept,
    evaluate_images,
)
from custom_diffusion.evaluation.results import TABLE_NAME, write_results
from custom_diffusion.files import write_bytes
from custom_diffusion.report.page import trade_off, write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, measure, write, and print the table."""
    args = parse_args(argv)
    for library in (transformers, diffusers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    args.output_dir = args.output_dir or default_output_dir(args)
    is_shown = args.output_dir == default_output_dir(args) and args.images_dir is None
    if args.images_dir is not None:
        evaluation = evaluate_images(args)
    else:
        evaluation = evaluate_checkpoints(args) if args.checkpoints else evaluate_concept(args)
    folder = Path(args.output_dir)
    write_results(evaluation, folder)
    save_config(args, folder / FLAGS_NAME)  # beside images or a concept, config.yaml is theirs
    plot = trade_off(evaluation.as_json())
    if plot:
        write_bytes(folder / PLOT_NAME, plot.encode())
    if is_shown:
        write_report(Path(args.model_dir))  # that of the run, if it has left one, shows the evaluation too
    print(f"{evaluation.as_markdown()}\nIn {folder / TABLE_NAME}, and with all details in evaluation.json beside it.")


if __name__ == "__main__":
    run(
        main,
        "interrupted: run the same command again, the images that are there are not made again",
        needs_memory="give a smaller --batch_size",
    )
