"""Take a concept to other programs: ``python export.py --model_dir custom-diffusion-model --format lora``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from custom_diffusion.command_line import (
    CONFIG_NAME,
    DEFAULT_MODEL,
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
        description="Take a concept to other programs: as LoRA to diffusers, ComfyUI, AUTOMATIC1111/Forge, InvokeAI "
        "and kohya-ss' scripts, as a complete pipeline to anything that reads diffusers folders, as delta.bin to the "
        "authors' code.",
        usage="%(prog)s --format {lora,pipeline,delta} [--model_dir CONCEPT] [--output_dir FOLDER] [more: --help]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--format", choices=["lora", "pipeline", "delta"], help="What to write.")
    add("--table", action="store_true",
        help="Only print what a LoRA takes and loses at several energies; writes nothing.")
    add("--model_dir", default=DEFAULT_MODEL,
        help="Output folder of a training run or of merge.py, the authors' delta.bin, or a Hub id (owner/name or "
        "owner/name@revision).")
    add("--energy", type=float,
        help="Share of the singular values' sum that is kept per layer, above 0 and up to 1 (all); if not given, the "
        "paper's 0.6 for a LoRA and no compression for a delta. A LoRA of a concept that was trained with --rank "
        "holds its factors as they are.")
    add("--rank", type=int, help="The same rank for every layer, instead of --energy.")
    add("--dtype", choices=["fp16", "fp32"],
        help="Type of the numbers; if not given, fp16 for a LoRA, and fp32 for a pipeline and for a LoRA that was "
        "trained as one (--rank). A delta keeps its own.")
    add("--bundle", action="store_true",
        help="Put the words into the LoRA's own file, in the form that AUTOMATIC1111, Forge and OneTrainer read; other "
        "programs want them in files of their own.")
    add("--token_name", nargs="+", metavar="NAME",
        help="Other names for the concept's tokens, in their order, such as '<my-cat>'; the prompt needs them then.")
    add("--output_dir", help="Must be new or empty; a LoRA gets its name. If not given, the concept's name and the "
        "format: custom-diffusion-model-lora.")
    add_base_model_flags(parser, "the one that the concept's card names")
    args = parse_with_config(parser, argv)
    if (args.format is None) == (not args.table):
        parser.error("give --format lora, pipeline or delta, or else --table")
    if args.energy is not None and not 0 < args.energy <= 1:
        parser.error(f"--energy {args.energy:g} must be above 0 and at most 1")
    if args.rank is not None and args.rank < 1:
        parser.error(f"--rank {args.rank} must be at least 1")
    if args.rank is not None and args.energy is not None:
        parser.error("give --energy or --rank, not both")
    if args.format == "pipeline" and (args.rank or args.energy):
        parser.error("--format pipeline holds whole weights: --energy and --rank are for lora and delta")
    if args.bundle and args.format != "lora":
        parser.error("--bundle puts words into a LoRA: it needs --format lora")
    if args.format == "delta" and args.dtype:
        parser.error("--format delta keeps the type that was trained: --dtype is for lora and pipeline")
    if args.output_dir is None and args.format is not None:
        args.output_dir = f"{Path(args.model_dir.split('@')[0]).resolve().stem}-{args.format}"
    return args


# fmt: on


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag end here, before the libraries below are loaded
    end_quietly_on_interrupt()
    import_diffusers()

import transformers
from torch import Tensor

from custom_diffusion.concept.compression import decompose, energy_table
from custom_diffusion.concept.exporting import export_delta, export_lora, export_pipeline, rename_tokens
from custom_diffusion.concept.files import find_base_model, load_concept
from custom_diffusion.concept.projections import complete, original_projections
from custom_diffusion.errors import UserError
from custom_diffusion.files import new_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Read, export, and say where everything is."""
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    concept = load_concept(args.model_dir)
    if concept.gates:
        raise UserError(
            f"{concept.source!r} acts at its own words alone (--token_gate), which no other format can express: use it "
            "with infer.py or apply_concepts, or train it without --token_gate"
        )
    compressed = args.rank is not None or args.energy is not None
    originals: dict[str, Tensor] = {}
    base_model = None
    if args.format != "delta" or compressed or concept.differences:
        base_model = find_base_model(concepts=[concept], **given_base_model(args))
    if base_model is not None and args.format != "pipeline":
        originals = original_projections(base_model, concept.projections())
        completed = complete(concept, originals)
        # The factors that were trained are a LoRA already.
        as_trained = args.format == "lora" and not compressed and not concept.attention
        concept = concept if as_trained else completed
    if not concept.projections():
        raise UserError(f"{concept.source!r} has only tokens, no attention weights: its token files load as they are")
    if args.table:
        print(energy_table(decompose(concept, originals)))
        return
    if args.token_name is not None:
        concept = rename_tokens(concept, args.token_name, base_model)
    with new_folder(args.output_dir) as folder:
        if args.format == "delta":
            export_delta(concept, originals, args, folder)
        elif args.format == "lora" and base_model is not None:
            export_lora(concept, base_model, originals, args, folder)
        elif base_model is not None:
            export_pipeline(concept, base_model, args, folder)
        save_config(args, folder / CONFIG_NAME)


if __name__ == "__main__":
    run(main)
