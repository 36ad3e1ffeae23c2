"""Take a concept to other programs: ``python export.py --model_dir custom-diffusion-model --format lora``."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import transformers
from huggingface_hub import ModelCardData
from torch import Tensor

import formats
from base_model import BaseModel, find_base_model
from concept import (
    CARD_NAME,
    Concept,
    UserError,
    apply_concepts,
    check_token_name,
    complete,
    is_hub_id,
    load_concept,
    new_folder,
)
from config import CONFIG_NAME, HelpFormatter, parse_with_config, save_config
from images import write_whole

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
PAPER_ENERGY = 0.6
LEVELS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


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
    add("--model_dir", default="custom-diffusion-model",
        help="Output folder of a training run or of merge.py, the authors' delta.bin, or a Hub id (owner/name or "
        "owner/name@revision).")
    add("--energy", type=float,
        help="Share of the singular values' sum that is kept per layer, above 0 and up to 1 (all); if not given, the "
        "paper's 0.6 for a LoRA and no compression for a delta.")
    add("--rank", type=int, help="The same rank for every layer, instead of --energy.")
    add("--dtype", choices=DTYPES,
        help="Type of the numbers; if not given, fp16 for a LoRA and fp32 for a pipeline. A delta keeps its own.")
    add("--output_dir", help="Must be new or empty; a LoRA gets its name. If not given, the concept's name and the "
        "format: custom-diffusion-model-lora.")
    add("--pretrained_model_name_or_path", help="Base model; if not given, the one that the concept's card names.")
    add("--revision", help="Branch, tag or commit of the base model on the Hub.")
    add("--variant", help="Variant of the base model's files, such as fp16.")
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
    if args.format == "delta" and args.dtype:
        parser.error("--format delta keeps the type that was trained: --dtype is for lora and pipeline")
    if args.output_dir is None and args.format is not None:
        args.output_dir = f"{Path(args.model_dir.split('@')[0]).resolve().stem}-{args.format}"
    return args
# fmt: on


# --- compression ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decomposition:
    """Singular value decomposition of what was learned in one projection, ``W - W0 = u diag(s) v``.

    Attributes:
        u, s, v: (out, n), (n,), (n, in) with n the smaller side, float32; s descends.
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def rank(self, energy: float) -> int:
        """The smallest rank whose singular values make up this share of their sum (paper, appendix)."""
        if energy >= 1:
            return len(self.s)
        share = self.s.double().cumsum(0) / self.s.double().sum().clamp(min=1e-300)
        return min(len(self.s), int((share < energy).sum()) + 1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(out, rank) and (rank, in), whose product is the best approximation of that rank; both sides alike large."""
        root = self.s[:rank].sqrt()
        return self.u[:, :rank] * root, root.unsqueeze(1) * self.v[:rank]


def decompose(concept: Concept, base: Mapping[str, Tensor]) -> dict[str, Decomposition]:
    """Per trained projection matrix the singular values of its change.

    Raises:
        UserError: where the concept does not fit the base model.
    """
    result = {}
    for key, weight in concept.attention.items():
        if weight.shape != base[key].shape:
            raise UserError(
                f"{concept.source!r} has {key!r} of shape {tuple(weight.shape)}, the base model has "
                f"{tuple(base[key].shape)}: give the base model that it was trained on"
            )
        if weight.dim() == 2:
            u, s, v = torch.linalg.svd(weight.float() - base[key], full_matrices=False)
            result[key] = Decomposition(u, s, v)
    return result


def relative_error(decompositions: Mapping[str, Decomposition], ranks: Mapping[str, int]) -> float:
    """``||difference - its approximation|| / ||difference||`` over all layers together, in the Frobenius norm."""
    lost = sum(d.s[ranks[key] :].double().square().sum().item() for key, d in decompositions.items())
    whole = sum(d.s.double().square().sum().item() for d in decompositions.values())
    return math.sqrt(lost / whole) if whole else 0.0


def megabytes(decompositions: Mapping[str, Decomposition], ranks: Mapping[str, int], dtype: torch.dtype) -> float:
    """What the factors take in a file, in 10^6 bytes."""
    count = sum(ranks[key] * (len(d.u) + d.v.shape[1]) for key, d in decompositions.items())
    return count * dtype.itemsize / 1e6


def energy_table(decompositions: Mapping[str, Decomposition]) -> str:
    """A Markdown table: per energy the ranks, the sizes and the error of a LoRA."""
    lines = ["| energy | rank per layer | fp16 | fp32 | relative error |", "|---|---|---|---|---|"]
    for level in LEVELS:
        ranks = {key: d.rank(level) for key, d in decompositions.items()}
        sizes = " | ".join(f"{megabytes(decompositions, ranks, dtype):.1f} MB" for dtype in DTYPES.values())
        error = relative_error(decompositions, ranks)
        lines.append(f"| {level:.0%} | {min(ranks.values())} to {max(ranks.values())} | {sizes} | {error:.1%} |")
    return "\n".join(lines)


# --- formats -------------------------------------------------------------------------------------


def export_lora(concept: Concept, base: Mapping[str, Tensor], args: argparse.Namespace, folder: Path) -> None:
    """Write a LoRA in kohya-ss' naming, and one embedding file per token."""
    decompositions = decompose(concept, base)
    ranks = {key: chosen_rank(d, args) for key, d in decompositions.items()}
    dtype = DTYPES[args.dtype or "fp16"]
    tensors = formats.to_lora({key: d.factors(ranks[key]) for key, d in decompositions.items()}, dtype)
    name = lora_name(folder, concept)
    data = safetensors.torch.save(tensors, metadata=lora_metadata(concept, ranks))
    write_whole(folder / name, lambda file: file.write(data))
    for token, vector in concept.tokens.items():
        check_token_name(token)
        embedding = safetensors.torch.save(formats.to_embedding(vector), metadata={"format": "pt"})
        write_whole(folder / f"{token}.safetensors", lambda file, data=embedding: file.write(data))
    write_whole(folder / CARD_NAME, lambda file: file.write(lora_card(concept, name).encode()))
    biases = [key for key, weight in concept.attention.items() if weight.dim() == 1]
    if biases:
        change = sum((concept.attention[key] - base[key]).float().square().sum().item() for key in biases)
        whole = sum(base[key].square().sum().item() for key in biases)
        print(
            f"warning: a LoRA holds matrices only, so the trained biases of {len(biases)} output projections are left "
            f"out (they changed by {math.sqrt(change / max(whole, 1e-300)):.1%}); --format pipeline or delta holds all",
            file=sys.stderr,
        )
    print(
        f"{folder / name}: rank {min(ranks.values())} to {max(ranks.values())}, {len(data) / 1e6:.1f} MB, "
        f"relative error of the change {relative_error(decompositions, ranks):.1%}"
    )
    print("In diffusers, ComfyUI, AUTOMATIC1111/Forge and InvokeAI: see " + str(folder / CARD_NAME))


def chosen_rank(decomposition: Decomposition, args: argparse.Namespace) -> int:
    """The rank of a layer as the command line asks for."""
    if args.rank is not None:
        return min(args.rank, len(decomposition.s))
    return decomposition.rank(args.energy if args.energy is not None else PAPER_ENERGY)


def lora_name(folder: Path, concept: Concept) -> str:
    """The LoRA's file name: that of its folder, because programs show it and prompts name it."""
    name = folder.resolve().name
    return f"{name}-lora.safetensors" if name in concept.tokens else f"{name}.safetensors"


def lora_metadata(concept: Concept, ranks: Mapping[str, int]) -> dict[str, str]:
    """What programs read of a LoRA without loading it; kohya-ss' names."""
    width = next(iter(concept.tokens.values())).shape[0] if concept.tokens else 0
    same = len(set(ranks.values())) == 1
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks.values())) if same else "Dynamic",
        "ss_network_alpha": str(max(ranks.values())),
        "ss_base_model_version": {768: "sd_v1", 1024: "sd_v2"}.get(width, "unknown"),
        "ss_v2": str(width == 1024),
        "modelspec.trigger_phrase": " ".join(concept.tokens),
    }
    return {"format": "pt"} | metadata


def lora_card(concept: Concept, name: str) -> str:
    """How to use the files, program by program."""
    words = ", ".join(f"`{token}`" for token in concept.tokens)
    prompt = (concept.instance_prompt or " ".join(concept.tokens)).split(", ")[0]
    comfy = prompt
    for token in concept.tokens:
        comfy = comfy.replace(token, f"embedding:{token}")
    stem = name.removesuffix(".safetensors")
    base = concept.base_model or "the base model"
    loads = "".join(
        f'pipeline.load_textual_inversion(folder, weight_name="{token}.safetensors", token="{token}")\n'
        for token in concept.tokens
    )
    data = ModelCardData(
        # The Hub refuses a card whose base model is no model of its own, such as a local folder.
        base_model=base if is_hub_id(base) else None,
        license="other",
        license_name="as-the-base-model",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "stable-diffusion", "lora", "textual_inversion", "custom-diffusion"],
        instance_prompt=concept.instance_prompt,
        widget=[{"text": prompt}],
    )
    return f"""---
{data.to_yaml()}
---

# LoRA and embeddings of {words}

For {base}. `{name}` has what was learned of the attention, each other `.safetensors` one word. Both are needed.

| program | `{name}` goes to | the words go to | prompt |
|---|---|---|---|
| ComfyUI | `models/loras` (node Load LoRA; only the model's strength matters) | `models/embeddings` | `{comfy}` |
| AUTOMATIC1111, Forge | `models/Lora` | `embeddings` | `{prompt} <lora:{stem}:1>` |
| InvokeAI | add both in the model manager | | `{prompt}`, with the LoRA switched on |

A word's name in these programs is the name of its file. Windows allows no angle brackets in names: call the file
`my-new1.safetensors` there, and write `my-new1`.

```python
from diffusers import DiffusionPipeline

folder = "."  # or the name on the Hub
pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights(folder, weight_name="{name}")
{loads}image = pipeline("{prompt}", guidance_scale=6.0).images[0]
```
"""


def export_pipeline(concept: Concept, model: BaseModel, args: argparse.Namespace, folder: Path) -> None:
    """Write the whole base model with the concept built in, in diffusers' layout."""
    pipeline = model.pipeline(DTYPES[args.dtype or "fp32"])
    apply_concepts(pipeline, concept)
    # Whole or not at all: it gets its name when it is complete.
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary)
        folder.rmdir()
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f'{folder}: DiffusionPipeline.from_pretrained("{folder}") knows {", ".join(concept.tokens)}')


def export_delta(concept: Concept, base: Mapping[str, Tensor], args: argparse.Namespace, folder: Path) -> None:
    """Write the authors' delta.bin, compressed where that is asked for."""
    factors = None
    if args.rank is not None or args.energy is not None:
        # Their compress.py leaves queries and outputs whole, and their loader expects that.
        small = {k: w for k, w in concept.attention.items() if "to_k_custom" in k or "to_v_custom" in k}
        decompositions = decompose(replace(concept, attention=small), base)
        factors = {key: d.factors(chosen_rank(d, args)) for key, d in decompositions.items()}
    content = formats.to_delta(concept.attention, concept.tokens, factors)
    name = "compressed_delta.bin" if factors else "delta.bin"
    write_whole(folder / name, lambda file: torch.save(content, file))
    size = (folder / name).stat().st_size / 1e6
    print(f"{folder / name}: {size:.1f} MB, for the authors' code" + (" with --compress" if factors else ""))


def main(argv: Sequence[str] | None = None) -> None:
    """Read, export, and say where everything is."""
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    concept = load_concept(args.model_dir)
    compressed = args.rank is not None or args.energy is not None
    base: dict[str, Tensor] = {}
    model = None
    if args.format != "delta" or compressed or concept.differences:
        model = find_base_model(args.pretrained_model_name_or_path, args.revision, args.variant, [concept])
    if model is not None and args.format != "pipeline":
        base = model.projections([*concept.attention, *concept.differences])
        concept = complete(concept, base)
    if not concept.attention and not concept.differences:
        raise UserError(
            f"{concept.source!r} has only tokens, no attention weights: its token files load as they are"
        )
    if args.table:
        print(energy_table(decompose(concept, base)))
        return
    folder = new_folder(args.output_dir)
    if args.format == "lora":
        export_lora(concept, base, args, folder)
    elif args.format == "delta":
        export_delta(concept, base, args, folder)
    elif model is not None:
        export_pipeline(concept, model, args, folder)
    save_config(args, folder / CONFIG_NAME)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
