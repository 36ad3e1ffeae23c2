"""Merge separately trained concepts into one: ``python merge.py --model_dir cat-model pot-model``.

Or weigh one concept, or several, against what the base model knew: ``--prior_weight 0.5``.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence

from custom_diffusion.command_line import (
    CONFIG_NAME,
    HelpFormatter,
    add_base_model_flags,
    end_quietly_on_interrupt,
    given_base_model,
    import_diffusers,
    parse_with_config,
    run,
    save_config,
)


# fmt: off
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Merge concepts that were trained separately into one folder for infer.py, in seconds and without "
        "their images (closed form of the Custom Diffusion paper, section 3.2).",
        usage="%(prog)s --model_dir CONCEPT [CONCEPT ...] [--output_dir FOLDER] [more options: --help]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model_dir", nargs="+", required=True,
        help="The concepts: output folders of training runs, the authors' delta.bin, or Hub ids (owner/name or "
        "owner/name@revision). Tokens of the same name are renamed.")
    add("--class_words", nargs="+",
        help="The class of each token, in the order of --model_dir, such as cat 'wooden pot'; if not given, the words "
        "that follow the token in the instance prompt of the concept's card.")
    add("--output_dir", default="merged-concepts", help="Where the merged concept is written; must be new or empty.")
    add("--captions", help="Text file with one caption per line, for which the base model's keys and values are "
        "kept; if not given, those that come with this project.")
    add("--prior_weight", type=float,
        help="Weigh the base model's keys and values for the captions against those of the concepts for their prompts, "
        "rather than keep the concepts' words exactly; such as 0.5. One concept alone then leaves what the "
        "model knew as it was. The captions should name the things that are to stay, and the concepts' classes.")
    add("--num_captions", type=int, default=500, help="How many of them are used, spread evenly over the file.")
    add_base_model_flags(parser, "the one that the concepts' cards name")
    args = parse_with_config(parser, argv)
    if len(args.model_dir) < 2 and args.prior_weight is None:
        parser.error("--model_dir needs at least two concepts to merge, or --prior_weight for one")
    if args.prior_weight is not None and not 0 <= args.prior_weight < math.inf:
        parser.error(f"--prior_weight {args.prior_weight} is not a number from 0 on")
    if args.num_captions < 1:
        parser.error("--num_captions must be at least 1")
    return args


# fmt: on


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag end here, before the libraries below are loaded
    end_quietly_on_interrupt()
    import_diffusers()

import time
from pathlib import Path

import transformers
from torch import Tensor

from custom_diffusion.concept.cards import merged_card
from custom_diffusion.concept.files import CARD_NAME, Concept, find_base_model, load_concept, save_concept
from custom_diffusion.concept.merging import merge_concepts, weigh_concepts
from custom_diffusion.concept.parts import Part, concept_prompts, prepare_parts
from custom_diffusion.concept.projections import original_projections
from custom_diffusion.concept.text_features import CAPTIONS, TextModels, check_enough, read_captions
from custom_diffusion.files import new_folder, write_bytes
from custom_diffusion.models.base_model import BaseModel


def main(argv: Sequence[str] | None = None) -> None:
    """Read, merge, write, and say what to type next."""
    args = parse_args(argv)
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    concepts = [load_concept(source) for source in args.model_dir]
    parts = prepare_parts(concepts, args.class_words)
    captions = read_captions(Path(args.captions or CAPTIONS), args.num_captions)
    base_model = find_base_model(concepts=concepts, **given_base_model(args))
    with new_folder(args.output_dir) as folder:
        merged, outcome = merge_into(folder, args, parts, captions, base_model)
    phrases = " and a ".join(phrase for part in parts for phrase in part.phrases())
    print(f"merged {' and '.join(args.model_dir)} in {time.perf_counter() - started:.1f} s; {outcome}")
    what = "it" if len(merged.tokens) == 1 else "them together"
    command = ["python", "infer.py", "--model_dir", args.output_dir, "--prompt", f"photo of a {phrases}"]
    print(f"See {what}:\n  {shlex.join(command)}")


def merge_into(
    folder: Path, args: argparse.Namespace, parts: Sequence[Part], captions: Sequence[str], base_model: BaseModel
) -> tuple[Concept, str]:
    """Merge the parts and write the result; gives it and what to tell of it."""
    concept = parts[0].concept
    originals = original_projections(base_model, concept.projections())
    text_models = TextModels.load(base_model)
    text_models.add_tokens(parts)
    if args.prior_weight is None:
        merged, settings, outcome = merge_exactly(parts, originals, text_models, captions)
    else:
        merged, settings, outcome = weigh(parts, originals, text_models, captions, args.prior_weight)
    merged = merged.trained_on(base_model)
    save_concept(merged, folder)
    write_bytes(folder / CARD_NAME, merged_card(merged, parts, settings).encode())
    save_config(args, folder / CONFIG_NAME)
    return merged, outcome


def merge_exactly(
    parts: Sequence[Part], originals: dict[str, Tensor], text_models: TextModels, captions: Sequence[str]
) -> tuple[Concept, dict[str, object], str]:
    """Merge so that the concepts' words keep their keys and values; also what to tell on the card and the screen."""
    targets, regularization = text_models.target_features(parts), text_models.features(captions)
    check_enough(regularization, len(captions))
    merged, error = merge_concepts(parts, originals, targets, regularization)
    settings = {"captions": len(captions), "relative error of the constraint": f"{error:.1e}"}
    return merged, settings, f"the concepts' words keep their meaning to {error:.0e}"


def weigh(
    parts: Sequence[Part],
    originals: dict[str, Tensor],
    text_models: TextModels,
    captions: Sequence[str],
    prior_weight: float,
) -> tuple[Concept, dict[str, object], str]:
    """Weigh the concepts against the captions, as ``--prior_weight`` says; gives the same as :func:`merge_exactly`."""
    targets = [text_models.mean_square(concept_prompts(part, captions)) for part in parts]
    merged, moved = weigh_concepts(parts, originals, targets, text_models.mean_square(captions), prior_weight)
    settings = {
        "captions": len(captions),
        "prior weight": prior_weight,
        "what is left of the captions' change": f"{moved:.0%}",
    }
    return merged, settings, f"the captions' keys and values change {moved:.0%} as far as they did in training"


if __name__ == "__main__":
    run(main)
