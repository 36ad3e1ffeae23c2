"""Writing a concept for other programs."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from custom_diffusion.concept import formats
from custom_diffusion.concept.applying import apply_concepts
from custom_diffusion.concept.cards import lora_card
from custom_diffusion.concept.compression import DTYPES, PAPER_ENERGY, Decomposition, decompose, relative_error
from custom_diffusion.concept.files import CARD_NAME, Concept, check_token_name, vectors_by_key
from custom_diffusion.concept.prompts import replace_words
from custom_diffusion.errors import UserError
from custom_diffusion.files import half_written, write_bytes, write_whole
from custom_diffusion.models.base_model import BaseModel
from custom_diffusion.models.families import Family
from custom_diffusion.models.vocabulary import check_new_words, fold
from custom_diffusion.text import first_line


def rename_tokens(concept: Concept, names: Sequence[str], base_model: BaseModel | None) -> Concept:
    """The concept with other tokens, in its prompt too.

    Args:
        names: one for each token, in their order.
        base_model: where it is known, its tokenizer must not know the names.

    Raises:
        UserError: for names that cannot be used, or are too few or too many.
    """
    if len(names) != len(concept.tokens):
        raise UserError(
            f"--token_name has {len(names)} names for {len(concept.tokens)} tokens ({', '.join(concept.tokens)}): "
            "give one for each"
        )
    for name in names:
        check_token_name(name)
    if len({name.lower() for name in names}) < len(names):
        raise UserError("--token_name has a name twice; upper and lower case are the same to tokenizers")
    if base_model is not None:
        for tokenizer in base_model.tokenizers(base_model.family()).values():
            check_new_words(names, tokenizer, " (--token_name)")
    renamed = dict(zip(concept.tokens, names, strict=True))
    return replace(
        concept,
        tokens={renamed[token]: vectors for token, vectors in concept.tokens.items()},
        instance_prompt=None if concept.instance_prompt is None else replace_words(concept.instance_prompt, renamed),
    )


@dataclass(frozen=True)
class Lora:
    """What goes into a LoRA's file.

    Attributes:
        tensors: its content.
        ranks: of each projection.
        alpha: of all of them.
        loss: what to tell of the difference from what was learned.
    """

    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    alpha: float
    loss: str


def compressed_lora(
    concept: Concept, originals: Mapping[str, Tensor], args: argparse.Namespace, layer_name: Callable[[str], str]
) -> Lora:
    """The best approximation of whole projections by ranks as the command line asks for."""
    decompositions = decompose(concept, originals)
    ranks = {key: chosen_rank(d, args) for key, d in decompositions.items()}
    factors = {key: d.factors(ranks[key]) for key, d in decompositions.items()}
    error = f"relative error of the change {relative_error(decompositions, ranks):.1%}"
    tensors = formats.to_lora(factors, DTYPES[args.dtype or "fp16"], layer_name)
    return Lora(tensors, ranks, max(ranks.values()), error)


def trained_lora(concept: Concept, args: argparse.Namespace, layer_name: Callable[[str], str]) -> Lora:
    """The factors that were trained, as they are."""
    name = args.dtype or "fp32"
    differences = concept.differences
    if name == "fp16":
        differences = {key: difference.balanced() for key, difference in differences.items()}
    ranks = {key: difference.rank for key, difference in differences.items()}
    loss = f"the factors as they were trained, in {name}"
    alphas = {(difference.rank, difference.alpha) for difference in differences.values()}
    if len(alphas) == 1:
        factors = {key: (difference.up, difference.down) for key, difference in differences.items()}
        ((_, alpha),) = alphas
        return Lora(formats.to_lora(factors, DTYPES[name], layer_name, alpha), ranks, alpha, loss)
    factors = {key: difference.factors() for key, difference in differences.items()}
    return Lora(formats.to_lora(factors, DTYPES[name], layer_name), ranks, max(ranks.values()), loss)


def export_lora(
    concept: Concept,
    base_model: BaseModel,
    originals: Mapping[str, Tensor],
    args: argparse.Namespace,
    folder: Path,
    lost: str = "",
) -> None:
    """Write a LoRA in kohya-ss' naming, and one embedding file per token, or all in one with ``--bundle``.

    Args:
        lost: what the card has to say of a gate that the LoRA cannot express.
    """
    family = base_model.family()
    layer_name = partial(family.kohya_name, unet=base_model.unet_configuration())
    make = trained_lora if concept.differences else partial(compressed_lora, originals=originals)
    lora = make(concept, args=args, layer_name=layer_name)
    embeddings = embedding_names(list(concept.tokens), base_model.tokenizers(family).values())
    name = lora_name(folder, embeddings.values())
    contents = {
        embeddings[token]: formats.to_embedding(vectors_by_key(token, vectors))
        for token, vectors in concept.tokens.items()
    }
    tensors = lora.tensors | (formats.bundled(contents) if args.bundle else {})
    data = safetensors.torch.save(tensors, metadata=lora_metadata(concept, lora, family))
    write_bytes(folder / name, data)
    for token, stem in embeddings.items() if not args.bundle else ():
        # Programs name a word after its file; the token itself is inside.
        embedding = safetensors.torch.save(contents[stem], metadata={"format": "pt", "token": token})
        write_bytes(folder / f"{stem}.safetensors", embedding)
    write_bytes(folder / CARD_NAME, lora_card(concept, name, embeddings, args.bundle, lost).encode())
    warn_of_biases(concept, originals)
    print(
        f"{folder / name}: rank {min(lora.ranks.values())} to {max(lora.ranks.values())}, {len(data) / 1e6:.1f} MB, "
        f"{lora.loss}"
    )
    others = "OneTrainer" if args.bundle else "diffusers, ComfyUI and InvokeAI"
    print(f"In AUTOMATIC1111/Forge, {others}: see {folder / CARD_NAME}")


def warn_of_biases(concept: Concept, originals: Mapping[str, Tensor]) -> None:
    """Say what a LoRA cannot hold."""
    biases = [key for key, weight in concept.attention.items() if weight.dim() == 1]
    if biases:
        change = sum((concept.attention[key] - originals[key]).float().square().sum().item() for key in biases)
        whole = sum(originals[key].square().sum().item() for key in biases)
        print(
            f"warning: a LoRA holds matrices only, so the trained biases of {len(biases)} output projections are left "
            f"out (they changed by {math.sqrt(change / max(whole, 1e-300)):.1%}); --format pipeline or delta holds all",
            file=sys.stderr,
        )


def chosen_rank(decomposition: Decomposition, args: argparse.Namespace) -> int:
    """The rank of a layer as the command line asks for."""
    if args.rank is not None:
        return min(args.rank, len(decomposition.s))
    return decomposition.rank(args.energy if args.energy is not None else PAPER_ENERGY)


def lora_name(folder: Path, taken: Iterable[str]) -> str:
    """The LoRA's file name: that of its folder, because programs show it and prompts name it.

    Args:
        taken: names of other files, without ending.
    """
    name = folder.resolve().name
    is_taken = name.casefold() in map(str.casefold, taken)
    return f"{name}-lora.safetensors" if is_taken else f"{name}.safetensors"


def embedding_names(tokens: Sequence[str], tokenizers: Collection[Any]) -> dict[str, str]:
    """Token to the name of its embedding's file, without ending: ``new1`` for ``<new1>``.

    Programs look for this name in prompts, as tokens: it must stay the same tokens whatever stands around it. CLIP
    joins neighbouring punctuation, ``>,`` for one, but not letters and digits with punctuation. File systems forbid
    some of it, and ignore case. A name that is words of the language would always mean the concept.
    """
    names: dict[str, str] = {}
    vocabulary = {entry for tokenizer in tokenizers for entry in tokenizer.get_vocab()}
    for number, token in enumerate(tokens, 1):
        plain = re.sub(r"[^\w-]|_", "-", token)
        name = re.sub(r"-+", "-", plain).strip("-") or f"word{number}"
        words = [f"{fold(part, tokenizer)}</w>" for tokenizer in tokenizers for part in name.split("-")]
        if all(word in vocabulary for word in words) and not name.casefold().startswith("my-"):
            name = f"my-{name}"
        taken = set(map(str.casefold, names.values()))
        different = (name, *(f"{name}-{count}" for count in range(2, len(tokens) + 1)))
        names[token] = next(one for one in different if one.casefold() not in taken)
    return names


def lora_metadata(concept: Concept, lora: Lora, family: Family) -> dict[str, str]:
    """What programs read of a LoRA without loading it; kohya-ss' names."""
    vectors = next(iter(concept.tokens.values()), {})
    width = sum(len(vector) for vector in vectors.values())  # as the cross-attention has it
    ranks = set(lora.ranks.values())
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{lora.alpha:g}",
        "ss_base_model_version": family.kohya_version(width),
        "ss_v2": str(family.kohya_version(width) == "sd_v2"),
        "modelspec.trigger_phrase": " ".join(concept.tokens),
    }
    return {"format": "pt"} | metadata


def export_pipeline(concept: Concept, base_model: BaseModel, args: argparse.Namespace, folder: Path) -> None:
    """Write the whole base model with the concept built in, in diffusers' layout."""
    pipeline = base_model.pipeline(DTYPES[args.dtype or "fp32"])
    apply_concepts(pipeline, concept)
    # Whole or not at all: the parts get their names when all are complete, and the one that makes it a model, last.
    temporary = half_written(folder, "pipeline")
    try:
        pipeline.save_pretrained(temporary)
        for part in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):
            part.rename(folder / part.name)
        temporary.rmdir()
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{str(folder)!r} cannot be written: {first_line(error)}") from error
    print(f'{folder}: DiffusionPipeline.from_pretrained("{folder}") knows {", ".join(concept.tokens)}')


def export_delta(concept: Concept, originals: Mapping[str, Tensor], args: argparse.Namespace, folder: Path) -> None:
    """Write the authors' delta.bin, compressed where that is asked for."""
    factors = None
    if args.rank is not None or args.energy is not None:
        # Their compress.py leaves queries and outputs whole, and their loader expects that.
        small = {k: w for k, w in concept.attention.items() if "to_k_custom" in k or "to_v_custom" in k}
        decompositions = decompose(replace(concept, attention=small), originals)
        factors = {key: d.factors(chosen_rank(d, args)) for key, d in decompositions.items()}
    tokens = {token: list(vectors_by_key(token, vectors).values()) for token, vectors in concept.tokens.items()}
    content = formats.to_delta(concept.attention, tokens, factors)
    name = "compressed_delta.bin" if factors else "delta.bin"
    write_whole(folder / name, lambda file: torch.save(content, file))
    size = (folder / name).stat().st_size / 1e6
    print(f"{folder / name}: {size:.1f} MB, for the authors' code" + (" with --compress" if factors else ""))
    if factors:
        print('Their loader adds it to weights on the CPU: call load_model before .to("cuda").')
