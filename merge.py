"""Merge separately trained concepts into one: ``python merge.py --model_dir cat-model pot-model``.

Or weigh one concept, or several, against what the base model knew: ``--prior_weight 0.5``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import transformers

from custom_diffusion.command_line import CONFIG_NAME, HelpFormatter, parse_with_config, run, save_config
from custom_diffusion.concept.applying import original_projections
from custom_diffusion.concept.cards import merged_card
from custom_diffusion.concept.files import CARD_NAME, find_base_model, load_concept, save_concept
from custom_diffusion.concept.merging import (
    CAPTIONS,
    add_tokens,
    concept_prompts,
    mean_square,
    merge_concepts,
    prepare_parts,
    read_captions,
    target_features,
    text_features,
    weigh_concepts,
)
from custom_diffusion.files import new_folder, write_whole


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
    add("--captions", help="Text file with one caption per line, on which the base model's answers are kept; "
        "if not given, those that come with this project.")
    add("--prior_weight", type=float,
        help="Weigh what the base model answers to the captions against what the concepts' own weights answer to their "
        "prompts, rather than keep the concepts' words exactly; such as 0.5. One concept alone then leaves what the "
        "model knew as it was. The captions should name the things that are to stay, and the concepts' classes.")
    add("--num_captions", type=int, default=500, help="How many of them are used, spread evenly over the file.")
    add("--pretrained_model_name_or_path", help="Base model; if not given, the one that the concepts' cards name.")
    add("--revision", help="Branch, tag or commit of the base model on the Hub.")
    add("--variant", help="Variant of the base model's files, such as fp16.")
    args = parse_with_config(parser, argv)
    if len(args.model_dir) < 2 and args.prior_weight is None:
        parser.error("--model_dir needs at least two concepts to merge, or --prior_weight for one")
    if args.prior_weight is not None and not 0 <= args.prior_weight < math.inf:
        parser.error(f"--prior_weight {args.prior_weight} is not a number from 0 on")
    if args.num_captions < 1:
        parser.error("--num_captions must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Read, merge, write, and say what to type next."""
    args = parse_args(argv)
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    concepts = [load_concept(source) for source in args.model_dir]
    parts = prepare_parts(concepts, args.class_words)
    captions = read_captions(Path(args.captions or CAPTIONS), args.num_captions)
    model = find_base_model(args.pretrained_model_name_or_path, args.revision, args.variant, concepts)
    folder = new_folder(args.output_dir)
    base = original_projections(model, [*concepts[0].attention, *concepts[0].differences])
    family = model.family()
    tokenizer = model.tokenizers(family)["text_encoder"]
    encoder = model.text_encoders(family)["text_encoder"]
    add_tokens(parts, tokenizer, encoder)
    settings: dict[str, object] = {"captions": len(captions)}
    if args.prior_weight is None:
        targets = target_features(parts, tokenizer, encoder)
        merged, error = merge_concepts(parts, base, targets, text_features(captions, tokenizer, encoder))
        settings["relative error of the constraint"] = f"{error:.1e}"
        outcome = f"the concepts' words keep their meaning to {error:.0e}"
    else:
        targets = [mean_square(concept_prompts(part, captions), tokenizer, encoder) for part in parts]
        regularization = mean_square(captions, tokenizer, encoder)
        merged, moved = weigh_concepts(parts, base, targets, regularization, args.prior_weight)
        settings |= {"prior weight": args.prior_weight, "what is left of the captions' change": f"{moved:.0%}"}
        outcome = f"the answers to the captions change {moved:.0%} as far as by what was learned"
    merged = replace(merged, base_model=model.name)
    save_concept(merged, folder)
    write_whole(folder / CARD_NAME, lambda file: file.write(merged_card(merged, parts, settings)))
    save_config(args, folder / CONFIG_NAME)
    phrases = " and a ".join(phrase for part in parts for phrase in part.phrases())
    print(f"merged {' and '.join(args.model_dir)} in {time.perf_counter() - started:.1f} s; {outcome}")
    what = "it" if len(merged.tokens) == 1 else "them together"
    print(f'See {what}:\n  python infer.py --model_dir {args.output_dir} --prompt "photo of a {phrases}"')


if __name__ == "__main__":
    run(main)
