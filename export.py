"""Take a concept to other programs: ``python export.py --model_dir custom-diffusion-model --format lora``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
    add("--ungate", action="store_true",
        help="Export a concept that acts only at its own words (--token_gate), which no format here can express, as "
        "the weights that come nearest to it in the mean square over prompts. Says what is lost.")
    add("--prompts_file",
        help="Text file with one prompt per line, with the concept's words and without, for --ungate; if not given, "
        "captions that come with this project, with these words added and without.")
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
    if args.prompts_file is not None and not args.ungate:
        parser.error("--prompts_file is for --ungate")
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

from custom_diffusion.concept.cards import ungated_card
from custom_diffusion.concept.compression import decompose, energy_table
from custom_diffusion.concept.exporting import export_delta, export_lora, export_pipeline, rename_tokens
from custom_diffusion.concept.files import CARD_NAME, Concept, find_base_model, load_concept
from custom_diffusion.concept.projections import complete, original_projections
from custom_diffusion.concept.text_features import CAPTIONS, read_captions
from custom_diffusion.concept.ungating import prompts_of, ungate
from custom_diffusion.errors import UserError
from custom_diffusion.files import new_folder, write_bytes
from custom_diffusion.models.base_model import BaseModel

NUM_CAPTIONS = 500  # as merge.py's


def main(argv: Sequence[str] | None = None) -> None:
    """Read, export, and say where everything is."""
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    concept = load_concept(args.model_dir)
    prompts = prompts_to_ungate(concept, args)
    if args.table:
        whole = prepare(concept, prompts, args)
        print(energy_table(decompose(whole.concept, whole.originals)))
        return
    with new_folder(args.output_dir) as folder:
        export(prepare(concept, prompts, args), args, folder)
        save_config(args, folder / CONFIG_NAME)


def prompts_to_ungate(concept: Concept, args: argparse.Namespace) -> list[str]:
    """The prompts over which plain weights come nearest to a gated concept; none for a concept without gate.

    Raises:
        UserError: for a gated concept without ``--ungate``, and the other way round; for prompts that cannot be read.
    """
    if not concept.gates:
        if args.ungate:
            raise UserError(f"{concept.source!r} has no gate: leave out --ungate")
        return []
    if not args.ungate:
        raise UserError(
            f"{concept.source!r} acts only at its own words (--token_gate), which no other format can express: use it "
            "with infer.py or apply_concepts, or export the nearest weights that act everywhere with --ungate"
        )
    if args.prompts_file is not None:
        return read_captions(Path(args.prompts_file), flag="--prompts_file")
    return prompts_of(concept, read_captions(CAPTIONS, NUM_CAPTIONS))


class Prepared(NamedTuple):
    """What is written.

    Attributes:
        concept: without gate; its projections whole, unless its factors are a LoRA already.
        base_model: where it is needed.
        originals: the base model's projections, where they are needed.
        lost: how far the concept is from a gated one that it stands for; empty where nothing is lost.
    """

    concept: Concept
    base_model: BaseModel | None
    originals: dict[str, Tensor]
    lost: str


def prepare(concept: Concept, prompts: Sequence[str], args: argparse.Namespace) -> Prepared:
    """Everything that a format needs, before anything is written.

    Args:
        prompts: those of :func:`prompts_to_ungate`.

    Raises:
        UserError: where the concept or the base model cannot be exported.
    """
    compressed = args.rank is not None or args.energy is not None
    originals: dict[str, Tensor] = {}
    base_model, lost = None, ""
    if args.format != "delta" or compressed or concept.differences or concept.gates:
        base_model = find_base_model(concepts=[concept], **given_base_model(args))
    if base_model is not None and concept.gates:
        ungated = ungate(concept, base_model, prompts)
        concept, lost = ungated.concept, ungated.loss()
        print(f"ungated: {lost}")
    if base_model is not None and args.format != "pipeline":
        originals = original_projections(base_model, concept.projections())
        completed = complete(concept, originals)
        # The factors that were trained are a LoRA already.
        as_trained = args.format == "lora" and not compressed and not concept.attention
        concept = concept if as_trained else completed
    if not concept.projections():
        raise UserError(f"{concept.source!r} has only tokens, no attention weights: its token files load as they are")
    if args.token_name is not None:
        concept = rename_tokens(concept, args.token_name, base_model)
    return Prepared(concept, base_model, originals, lost)


def export(prepared: Prepared, args: argparse.Namespace, folder: Path) -> None:
    """Write what the command line asks for into a folder."""
    concept, base_model, originals, lost = prepared
    if args.format == "delta":
        export_delta(concept, originals, args, folder)
    elif args.format == "lora" and base_model is not None:
        export_lora(concept, base_model, originals, args, folder, lost)
    elif base_model is not None:
        export_pipeline(concept, base_model, args, folder)
    if lost and args.format != "lora":  # whose card says it
        write_bytes(folder / CARD_NAME, ungated_card(concept, lost).encode())


if __name__ == "__main__":
    run(main)
